//! The threads that copy spans of blocks, each with lanes of its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::device_ways;
use super::dial;
use super::machine::NetConfig;
use super::peers::{Peer, Way};
use crate::error::{Error, Result};
use crate::lanes::{Lane, LaneError, Lease, ShmLane, Span, TcpLane};
use crate::proto::{ConnectionId, Copied};

/// Most spans that wait for a thread.
const WAITING_MAX: usize = 4096;
/// Lanes that a thread keeps; more peers than that make it open them anew.
const LANES_MAX: usize = 256;
/// A data connection that cannot be made in this time is no use to a transfer.
const DATA_CONNECT_MAX: Duration = Duration::from_secs(5);

/// One span to copy.
pub(super) struct CopyJob {
    pub(super) transfer: u64,
    pub(super) connection: ConnectionId,
    pub(super) peer: Arc<Peer>,
    pub(super) lease: Lease,
    pub(super) span: Span,
    pub(super) deadline: Instant,
    pub(super) is_stopped: Arc<AtomicBool>,
}

/// What became of a span.
pub(super) struct CopyDone {
    pub(super) transfer: u64,
    pub(super) copied: Copied,
    pub(super) bytes: u64,
    pub(super) elapsed: Duration,
    /// The lane's name.
    pub(super) lane: &'static str,
}

/// Hands spans to the threads. They end when it is dropped, each after the span that it is at.
#[derive(Clone)]
pub(super) struct CopyPool {
    jobs: Sender<CopyJob>,
}

/// The threads' end.
pub(super) struct CopyQueue {
    jobs: Receiver<CopyJob>,
}

impl CopyPool {
    /// A pool whose threads are not started yet.
    pub(super) fn new() -> (Self, CopyQueue) {
        let (sender, receiver) = bounded(WAITING_MAX);
        (Self { jobs: sender }, CopyQueue { jobs: receiver })
    }

    /// False: too many wait.
    pub(super) fn push(&self, job: CopyJob) -> bool {
        self.jobs.try_send(job).is_ok()
    }
}

impl CopyQueue {
    /// Starts the threads. `done` takes each result.
    pub(super) fn start(
        self,
        threads: usize,
        config: &Arc<NetConfig>,
        done: impl Fn(CopyDone) + Clone + Send + 'static,
    ) -> Result<()> {
        for _ in 0..threads {
            let (jobs, config, done) = (self.jobs.clone(), Arc::clone(config), done.clone());
            std::thread::Builder::new()
                .name("kvlane-p2p-copy".to_owned())
                .spawn(move || {
                    let mut lanes = Lanes::default();
                    for job in jobs {
                        done(lanes.copy(&job, &config));
                    }
                })
                .map_err(|source| Error::Io {
                    context: "starting a thread",
                    source,
                })?;
        }
        Ok(())
    }
}

/// Copies a span out of the peer's memory, on the calling thread. For few bytes a thread change would cost more.
pub(super) fn copy_here(job: &CopyJob) -> Option<CopyDone> {
    let Way::Shm(memory) = job.peer.way else {
        return None;
    };
    let lane = ShmLane::open(memory, Arc::clone(&job.peer.pairing));
    let started = Instant::now();
    let result = lane.and_then(|mut lane| lane.copy(&job.span, job.lease, job.deadline, &job.is_stopped));
    Some(done(job, "shm", &result, started))
}

/// The lanes of one thread.
#[derive(Default)]
struct Lanes {
    open: HashMap<ConnectionId, (Arc<Peer>, Box<dyn Lane>)>,
}

impl Lanes {
    fn copy(&mut self, job: &CopyJob, config: &Arc<NetConfig>) -> CopyDone {
        let started = Instant::now();
        self.open
            .retain(|_, (peer, lane)| !peer.is_gone.load(Ordering::Relaxed) && lane.is_open());
        let result = self.try_copy(job, config);
        let used = self.open.get(&job.connection);
        let name = used.map_or(job.peer.way.name(), |(_, lane)| lane.name());
        if !used.is_some_and(|(_, lane)| lane.is_open()) {
            self.open.remove(&job.connection);
        }
        done(job, name, &result, started)
    }

    fn try_copy(&mut self, job: &CopyJob, config: &Arc<NetConfig>) -> Result<(), LaneError> {
        if job.is_stopped.load(Ordering::Relaxed) {
            return Err(LaneError::Cancelled { done_bytes: 0 });
        }
        if !self.open.contains_key(&job.connection) {
            if self.open.len() >= LANES_MAX {
                self.open.clear();
            }
            let lane = open_lane(job, config)?;
            self.open.insert(job.connection, (Arc::clone(&job.peer), lane));
        }
        let (_, lane) = self.open.get_mut(&job.connection).ok_or(LaneError::Closed)?;
        lane.copy(&job.span, job.lease, job.deadline, &job.is_stopped)
    }
}

fn open_lane(job: &CopyJob, config: &Arc<NetConfig>) -> Result<Box<dyn Lane>, LaneError> {
    match &job.peer.way {
        Way::Shm(memory) => Ok(Box::new(ShmLane::open(*memory, Arc::clone(&job.peer.pairing))?)),
        Way::Tcp => Ok(Box::new(tcp_lane(&job.peer, config, job.deadline)?)),
        Way::Device(ways) => device_ways::open_lane(ways, job, config),
    }
}

/// A lane over a new data connection.
pub(super) fn tcp_lane(peer: &Peer, config: &NetConfig, deadline: Instant) -> Result<TcpLane, LaneError> {
    let deadline = deadline.min(Instant::now() + DATA_CONNECT_MAX);
    let socket = dial::data_connection(config, &peer.address, peer.start_id, deadline);
    let socket = socket.map_err(|source| LaneError::PeerGone {
        what: "no data connection",
        source: Some(source),
    })?;
    TcpLane::new(socket, Arc::clone(&peer.pairing))
}

fn done(job: &CopyJob, lane: &'static str, result: &Result<(), LaneError>, started: Instant) -> CopyDone {
    let copied = match result {
        Ok(()) => Copied::Held,
        Err(LaneError::Lapsed { .. }) => Copied::Lapsed,
        Err(LaneError::Cancelled { .. } | LaneError::TimedOut { .. }) => Copied::Failed,
        Err(error) => {
            tracing::warn!(peer = %job.peer.address, lane, %error, "blocks did not arrive");
            Copied::Failed
        }
    };
    let layers = job.span.layers.clone();
    CopyDone {
        transfer: job.transfer,
        copied,
        bytes: job.peer.pairing.payload_bytes(&layers, job.span.local.len()),
        elapsed: started.elapsed(),
        lane,
    }
}
