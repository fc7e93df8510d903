//! The one communicator with a peer, which the copying threads share: each takes memory of the device, and NCCL's own beside it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use super::copies::tcp_lane;
use super::device_ways::DeviceWays;
use super::machine::NetConfig;
use super::peers::Peer;
use crate::lanes::{Lane, LaneError, Lease, NcclLane, Span};

/// Device memory of a communicator on either side. A group of as many bytes takes a fifth of a millisecond at the speed of
/// NVLink, which is long against what it costs to ask for it.
const STAGING_BYTES: usize = 64 << 20;

/// After so many communicators that were not made in time, another lane is used.
const LATE_MAX: usize = 2;

/// How often a thread that waits for another one looks whether it was cancelled.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The way to a peer over a communicator, which is made when it is first needed, and anew after an error.
#[derive(Debug)]
pub(super) struct NcclWay {
    /// No other lane may be used.
    is_forced: bool,
    lane: Mutex<Option<NcclLane>>,
    /// Times that one was not made in time.
    late: AtomicUsize,
    failure: OnceLock<String>,
}

impl NcclWay {
    pub(super) fn new(is_forced: bool) -> Self {
        Self {
            is_forced,
            lane: Mutex::new(None),
            late: AtomicUsize::new(0),
            failure: OnceLock::new(),
        }
    }

    /// Why the two sides cannot make a communicator, if that was tried in vain.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    pub(super) fn is_forced(&self) -> bool {
        self.is_forced
    }

    /// The lane, once no other thread uses it.
    fn lock(
        &self,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<MutexGuard<'_, Option<NcclLane>>, LaneError> {
        loop {
            if cancelled.load(Ordering::Relaxed) {
                return Err(LaneError::Cancelled { done_bytes: 0 });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LaneError::TimedOut { done_bytes: 0 });
            }
            if let Some(lane) = self.lane.try_lock_for(left.min(LOOK_EVERY)) {
                return Ok(lane);
            }
        }
    }
}

/// One thread's part of the way.
pub(super) struct SharedNcclLane {
    ways: Arc<DeviceWays>,
    peer: Arc<Peer>,
    config: Arc<NetConfig>,
}

impl SharedNcclLane {
    pub(super) fn new(ways: Arc<DeviceWays>, peer: Arc<Peer>, config: Arc<NetConfig>) -> Self {
        Self { ways, peer, config }
    }

    /// Makes the communicator, if there is none.
    pub(super) fn open(&self, deadline: Instant, cancelled: &AtomicBool) -> Result<(), LaneError> {
        self.with_lane(deadline, cancelled, |_| Ok(()))
    }

    fn with_lane<T>(
        &self,
        deadline: Instant,
        cancelled: &AtomicBool,
        work: impl FnOnce(&mut NcclLane) -> Result<T, LaneError>,
    ) -> Result<T, LaneError> {
        let way = self.ways.nccl().ok_or(LaneError::Closed)?;
        let mut lane = way.lock(deadline, cancelled)?;
        // An error of another thread may have ended it.
        if lane.as_ref().is_some_and(|lane| !lane.is_open()) {
            *lane = None;
        }
        let lane = match &mut *lane {
            Some(lane) => lane,
            none => none.insert(self.make(way, deadline, cancelled)?),
        };
        work(lane)
    }

    fn make(&self, way: &NcclWay, deadline: Instant, cancelled: &AtomicBool) -> Result<NcclLane, LaneError> {
        if let Some(reason) = way.failure() {
            return Err(LaneError::Unavailable(reason.to_owned()));
        }
        let since = Instant::now();
        let line = tcp_lane(&self.peer, &self.config, deadline, cancelled)?;
        let made = NcclLane::open(line, STAGING_BYTES, deadline, cancelled);
        match &made {
            Ok(_) => {
                let took = since.elapsed();
                tracing::info!(peer = %self.peer.address, ?took, "a communicator was made");
            }
            Err(LaneError::Unavailable(reason)) => {
                let _ = way.failure.set(reason.clone());
            }
            // NCCL may wait for a way that there is not. One transfer may have had little time.
            Err(LaneError::TimedOut { .. }) if way.late.fetch_add(1, Ordering::Relaxed) + 1 >= LATE_MAX => {
                let reason = format!("{LATE_MAX} times a communicator was not made in time");
                if !way.is_forced() {
                    tracing::warn!(peer = %self.peer.address, reason, "lane tcp instead of nccl, as long as this connection lasts");
                }
                let _ = way.failure.set(reason);
            }
            // The peer or the transfer, not NCCL.
            Err(_) => {}
        }
        made
    }
}

impl Lane for SharedNcclLane {
    fn name(&self) -> &'static str {
        "nccl"
    }

    fn is_open(&self) -> bool {
        self.ways.nccl().is_some_and(|way| way.failure().is_none())
    }

    fn copy(
        &mut self,
        span: &Span,
        lease: Lease,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), LaneError> {
        self.with_lane(deadline, cancelled, |lane| {
            lane.copy(span, lease, deadline, cancelled)
        })
    }

    fn is_held(
        &mut self,
        lease: Lease,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<bool, LaneError> {
        self.with_lane(deadline, cancelled, |lane| {
            lane.is_held(lease, deadline, cancelled)
        })
    }
}
