//! A communicator of two processes, and the one thread that NCCL sees.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

use crate::device_cache::{Patience, Pause};
use crate::error::{CudaError, Result};
use crate::nccl::CommunicatorId;
use crate::raw::{CommunicatorEnd, DeviceBuffer, DeviceMemory, Pieces, SendPlan};
use crate::spans::RunPart;

/// Most communicators of one cache, those included that could not be ended: each has staging, and memory of NCCL's own.
const COMMUNICATORS_MAX: usize = 32;

/// How often a waiting caller looks whether it should stop.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Groups take a tenth of a millisecond or more; for that long a look at once is better than a sleep.
const SPIN: Duration = Duration::from_micros(200);

/// How long the device may take to stop what was aborted, before its memory is given up.
const QUIET_MAX: Duration = Duration::from_secs(5);

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// Has made the id.
    Sender = 0,
    /// Was told the id.
    Receiver = 1,
}

/// One end of a communicator. A thread of its own makes every call of NCCL.
///
/// After an error it is of no use: a new one is needed. The thread ends it then, and when this value is dropped, without
/// anybody waiting for that.
pub struct Communicator {
    orders: Sender<Order>,
    replies: Receiver<Result<()>>,
    stop: Arc<AtomicBool>,
    staging: Arc<DeviceBuffer>,
    memory: Arc<DeviceMemory>,
    groups: Vec<u32>,
    /// Bytes at the front of the staging that were received, and of those were scattered.
    received_bytes: usize,
    scattered_bytes: usize,
    is_ended: bool,
}

enum Order {
    Send(SendPlan),
    Receive(Vec<usize>),
}

/// What the thread begins with.
struct Setup {
    memory: Arc<DeviceMemory>,
    id: CommunicatorId,
    rank: Rank,
    staging_bytes: usize,
    stop: Arc<AtomicBool>,
    /// Counts the communicator until the thread has ended it.
    place: CommunicatorPlace,
}

/// Room for one of the communicators that a cache may have.
///
/// Taken before the peer is asked for its part: NCCL may wait for ever for an end that does not come.
#[derive(Debug)]
pub struct CommunicatorPlace(Arc<AtomicUsize>);

impl CommunicatorPlace {
    pub(crate) fn take(open: &Arc<AtomicUsize>) -> Result<Self> {
        let place = Self(Arc::clone(open));
        let before = open.fetch_add(1, Ordering::Relaxed);
        if before >= COMMUNICATORS_MAX {
            return Err(CudaError::TooManyCommunicators {
                open: before,
                most: COMMUNICATORS_MAX,
            });
        }
        Ok(place)
    }
}

impl Drop for CommunicatorPlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Communicator {
    /// Makes a communicator with a peer that does the same. Waits for it.
    pub(crate) fn join(
        memory: &Arc<DeviceMemory>,
        place: CommunicatorPlace,
        (id, rank): (&CommunicatorId, Rank),
        staging_bytes: usize,
        patience: &Patience<'_>,
    ) -> Result<Self> {
        patience.check("a communicator")?;
        let stop = Arc::new(AtomicBool::new(false));
        let setup = Setup {
            memory: Arc::clone(memory),
            id: *id,
            rank,
            staging_bytes: staging_bytes.max(1),
            stop: Arc::clone(&stop),
            place,
        };
        let (orders, taken) = channel();
        // The thread answers each order before it takes the next, and nobody orders before the answer is there.
        let (answer, replies) = sync_channel(1);
        let (ready, staging) = sync_channel(1);
        std::thread::Builder::new()
            .name("kvlane-nccl".to_owned())
            .spawn(move || own(setup, &ready, &taken, &answer))
            .map_err(|error| CudaError::NoThread(error.to_string()))?;
        let staging = wait(&staging, &stop, patience, "a communicator")?;
        Ok(Self {
            orders,
            replies,
            stop,
            staging,
            groups: memory.allocation_groups(),
            memory: Arc::clone(memory),
            received_bytes: 0,
            scattered_bytes: 0,
            is_ended: false,
        })
    }

    /// Most bytes of one group.
    pub fn staging_bytes(&self) -> usize {
        self.staging.len_bytes()
    }

    /// How parts of runs are sent: from where they lie if they are long, else gathered.
    ///
    /// # Panics
    /// If the cache has no such part.
    pub fn plan(&self, parts: &[RunPart]) -> SendPlan {
        SendPlan::new(&self.memory, &self.groups, parts)
    }

    /// Sends. The peer receives as many bytes, in sends of the same lengths. Waits until the bytes have been read.
    ///
    /// An error ends the communicator, [`Patience`]'s included; bytes may be read from the cache for some time after it.
    ///
    /// # Panics
    /// If the plan is of another cache, or has more bytes than the staging.
    pub fn send(&mut self, plan: SendPlan, patience: &Patience<'_>) -> Result<()> {
        assert!(
            plan.staged_bytes() <= self.staging_bytes(),
            "a plan of {} bytes for {}",
            plan.staged_bytes(),
            self.staging_bytes()
        );
        self.carry_out(Order::Send(plan), patience)
    }

    /// Receives sends of these lengths into the staging. Waits until all bytes are there.
    ///
    /// An error ends the communicator, [`Patience`]'s included. Nothing but the staging is ever written.
    ///
    /// # Panics
    /// If they are more bytes than the staging has.
    pub fn receive(&mut self, lens: &[usize], patience: &Patience<'_>) -> Result<()> {
        let total = lens.iter().fold(0usize, |sum, &len| sum.saturating_add(len));
        assert!(
            total <= self.staging_bytes(),
            "{total} bytes for {}",
            self.staging_bytes()
        );
        (self.received_bytes, self.scattered_bytes) = (0, 0);
        self.carry_out(Order::Receive(lens.to_vec()), patience)?;
        self.received_bytes = total;
        Ok(())
    }

    /// Copies of the received bytes that come next, into parts of runs.
    ///
    /// # Panics
    /// If the cache has no such part or is another one, or fewer bytes were received.
    pub(crate) fn take_received(&mut self, memory: &Arc<DeviceMemory>, parts: &[RunPart]) -> Pieces {
        assert!(
            Arc::ptr_eq(memory, &self.memory),
            "a communicator of another cache"
        );
        let (pieces, end) = self
            .staging
            .pieces(memory, &self.groups, self.scattered_bytes, parts);
        assert!(
            end <= self.received_bytes,
            "{end} bytes of {}",
            self.received_bytes
        );
        self.scattered_bytes = end;
        pieces
    }

    fn carry_out(&mut self, order: Order, patience: &Patience<'_>) -> Result<()> {
        if self.is_ended {
            return Err(CudaError::CommunicatorEnded);
        }
        // Nothing was started yet, so this does not end it.
        patience.check("the start of a group")?;
        self.is_ended = true;
        self.orders
            .send(order)
            .map_err(|_| CudaError::CommunicatorEnded)?;
        wait(&self.replies, &self.stop, patience, "a peer's part of a group")?;
        self.is_ended = false;
        Ok(())
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Communicator")
            .field("staging_bytes", &self.staging_bytes())
            .field("is_ended", &self.is_ended)
            .finish_non_exhaustive()
    }
}

/// Waits for the thread. When the caller's patience ends, the thread is told and not waited for: a call of NCCL may not
/// return, and nothing that it still does reaches the cache.
fn wait<T>(
    replies: &Receiver<Result<T>>,
    stop: &AtomicBool,
    patience: &Patience<'_>,
    what: &'static str,
) -> Result<T> {
    loop {
        let left = patience.deadline.saturating_duration_since(Instant::now());
        match replies.recv_timeout(left.min(LOOK_EVERY)) {
            Ok(reply) => return reply,
            Err(RecvTimeoutError::Disconnected) => return Err(CudaError::CommunicatorEnded),
            Err(RecvTimeoutError::Timeout) => {
                if let Err(error) = patience.check(what) {
                    stop.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    }
}

/// The thread of a communicator.
fn own(
    setup: Setup,
    ready: &SyncSender<Result<Arc<DeviceBuffer>>>,
    orders: &Receiver<Order>,
    answer: &SyncSender<Result<()>>,
) {
    let Setup {
        memory,
        id,
        rank,
        staging_bytes,
        stop,
        place,
    } = setup;
    let mut end = match CommunicatorEnd::begin(&memory, &id, rank, staging_bytes) {
        Ok(end) => end,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    drop(memory);
    let made = until(&stop, || end.is_made());
    let is_made = made.is_ok();
    // Nobody listens: whoever wanted it has given up.
    let is_wanted = ready.send(made.map(|()| Arc::clone(end.staging()))).is_ok();
    let mut place = Some(place);
    if !is_made && rank == Rank::Sender {
        // NCCL's thread that waits for both ends of the id may wait for ever: it counts as one that could not be closed.
        std::mem::forget(place.take());
    }
    if is_made && is_wanted {
        // Ends when the communicator is dropped.
        while let Ok(order) = orders.recv() {
            let started = match &order {
                Order::Send(plan) => end.start_send(plan),
                Order::Receive(lens) => end.start_receive(lens),
            };
            let result = started.and_then(|()| until(&stop, || end.is_over()));
            let has_failed = result.is_err();
            if answer.send(result).is_err() || has_failed {
                break;
            }
        }
    }
    finish(end, place);
}

/// Looks at something until it is so, or nobody wants it any more.
fn until(stop: &AtomicBool, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let since = Instant::now();
    let mut pause = Pause::default();
    while !is_so()? {
        if stop.load(Ordering::Relaxed) {
            return Err(CudaError::Cancelled { what: "a group" });
        }
        if since.elapsed() < SPIN {
            std::thread::yield_now();
        } else {
            pause.sleep();
        }
    }
    Ok(())
}

/// Ends a communicator. What the device does not stop using is never given back, nor is its place.
fn finish(mut end: CommunicatorEnd, place: Option<CommunicatorPlace>) {
    end.abort();
    let since = Instant::now();
    let mut pause = Pause::default();
    while !end.is_quiet() && since.elapsed() < QUIET_MAX {
        pause.sleep();
    }
    if !end.give_back() {
        tracing::error!(
            "the GPU does not stop what a communicator was doing; its staging memory is given up"
        );
        std::mem::forget(place);
    }
}
