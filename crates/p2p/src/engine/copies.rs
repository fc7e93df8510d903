//! The threads that copy spans of blocks, each with lanes of its own.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::device_ways;
use super::dial;
use super::machine::NetConfig;
use super::peers::{Peer, Way};
use crate::error::{Error, Result};
use crate::lanes::{Lane, LaneError, Lease, ShmLane, Span, TakeLine, TcpLane};
use crate::proto::{ConnectionId, Copied};

/// Most spans that wait for a thread.
const WAITING_MAX: usize = 4096;
/// Lanes that a thread keeps; more peers than that make it open them anew.
const LANES_MAX: usize = 256;
/// How long a lane to a peer that is gone may be kept: it holds what it has mapped of the peer's memory, which an engine
/// that starts there anew may need.
const GONE_MAX: Duration = Duration::from_secs(1);
/// Most data connections for takes that wait to be made.
const LINES_MAX: usize = 64;
/// A data connection that cannot be made in this time is no use to a transfer. A pull whose copies are not wanted any more
/// ends so much later at most, and that only if the peer's machine has gone away since it was last heard.
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
    jobs: Sender<Job>,
    lines: Sender<(ConnectionId, Arc<Peer>)>,
}

enum Job {
    Copy(CopyJob),
    /// To be dropped by a thread that nobody waits for: the driver may take its time to unmap memory.
    Drop(#[allow(dead_code, reason = "only dropped")] Arc<Peer>),
}

/// The threads' end.
pub(super) struct CopyQueue {
    jobs: Receiver<Job>,
    lines: Receiver<(ConnectionId, Arc<Peer>)>,
}

impl CopyPool {
    /// A pool whose threads are not started yet.
    pub(super) fn new() -> (Self, CopyQueue) {
        let (jobs, waiting_jobs) = bounded(WAITING_MAX);
        let (lines, waiting_lines) = bounded(LINES_MAX);
        (
            Self { jobs, lines },
            CopyQueue {
                jobs: waiting_jobs,
                lines: waiting_lines,
            },
        )
    }

    /// False: too many wait.
    pub(super) fn push(&self, job: CopyJob) -> bool {
        self.jobs.try_send(Job::Copy(job)).is_ok()
    }

    /// Makes a data connection for takes, if not too many are to be made.
    pub(super) fn open_line(&self, connection: ConnectionId, peer: &Arc<Peer>) {
        let _ = self.lines.try_send((connection, Arc::clone(peer)));
    }

    /// Lets go of a peer whose connection has ended.
    pub(super) fn drop_peer(&self, peer: Arc<Peer>) {
        // With a full queue it is dropped here.
        let _ = self.jobs.try_send(Job::Drop(peer));
    }
}

impl CopyQueue {
    /// Starts the threads. `done` takes each result, `opened` each line for takes.
    pub(super) fn start(
        self,
        threads: usize,
        config: &Arc<NetConfig>,
        done: impl Fn(CopyDone) + Clone + Send + 'static,
        opened: impl Fn(ConnectionId, TakeLine) + Send + 'static,
    ) -> Result<()> {
        let (lines, line_config) = (self.lines, Arc::clone(config));
        std::thread::Builder::new()
            .name("kvlane-p2p-line".to_owned())
            .spawn(move || make_lines(&lines, &line_config, opened))
            .map_err(|source| Error::Io {
                context: "starting a thread",
                source,
            })?;
        for _ in 0..threads {
            let (jobs, config, done) = (self.jobs.clone(), Arc::clone(config), done.clone());
            std::thread::Builder::new()
                .name("kvlane-p2p-copy".to_owned())
                .spawn(move || run(&jobs, &config, done))
                .map_err(|source| Error::Io {
                    context: "starting a thread",
                    source,
                })?;
        }
        Ok(())
    }
}

/// Makes data connections for takes, one after the other: a peer that does not answer holds up only others' lines.
fn make_lines(
    lines: &Receiver<(ConnectionId, Arc<Peer>)>,
    config: &NetConfig,
    opened: impl Fn(ConnectionId, TakeLine),
) {
    while let Ok((connection, peer)) = lines.recv() {
        let made = AssertUnwindSafe(|| {
            if let Some(line) = open_line(&peer, config) {
                opened(connection, line);
            }
        });
        if catch_unwind(made).is_err() {
            tracing::error!(peer = %peer.address, "internal error: making a data connection panicked");
        }
    }
}

fn run(jobs: &Receiver<Job>, config: &Arc<NetConfig>, done: impl Fn(CopyDone)) {
    let mut lanes = Lanes::default();
    loop {
        let job = if lanes.open.is_empty() {
            jobs.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            jobs.recv_timeout(GONE_MAX)
        };
        lanes.forget_gone();
        match job {
            Ok(Job::Copy(job)) => done(lanes.copy_or_fail(&job, config)),
            Ok(Job::Drop(peer)) => drop(peer),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Copies a span out of the peer's memory, on the calling thread. For few bytes a thread change would cost more.
pub(super) fn copy_here(job: &CopyJob, lane: &mut ShmLane) -> CopyDone {
    let started = Instant::now();
    let result = lane.copy(&job.span, job.lease, job.deadline, &job.is_stopped);
    done(job, lane.name(), &result, started)
}

/// The lanes of one thread.
#[derive(Default)]
struct Lanes {
    open: HashMap<ConnectionId, (Arc<Peer>, Box<dyn Lane>)>,
}

impl Lanes {
    fn forget_gone(&mut self) {
        self.open
            .retain(|_, (peer, lane)| !peer.is_gone.load(Ordering::Relaxed) && lane.is_open());
    }

    /// Whatever happens, there is a result: without one the pull would never end.
    fn copy_or_fail(&mut self, job: &CopyJob, config: &Arc<NetConfig>) -> CopyDone {
        let started = Instant::now();
        catch_unwind(AssertUnwindSafe(|| self.copy(job, config))).unwrap_or_else(|_| {
            tracing::error!(peer = %job.peer.address, "internal error: copying a span panicked");
            self.open.remove(&job.connection);
            done(job, job.peer.way.name(), &Err(LaneError::Closed), started)
        })
    }

    fn copy(&mut self, job: &CopyJob, config: &Arc<NetConfig>) -> CopyDone {
        let started = Instant::now();
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
        Way::Tcp => Ok(Box::new(tcp_lane(
            &job.peer,
            config,
            job.deadline,
            &job.is_stopped,
        )?)),
        Way::Device(ways) => device_ways::open_lane(ways, job, config),
    }
}

/// A lane over a new data connection.
pub(super) fn tcp_lane(
    peer: &Peer,
    config: &NetConfig,
    deadline: Instant,
    is_stopped: &AtomicBool,
) -> Result<TcpLane, LaneError> {
    let connect_deadline = deadline.min(Instant::now() + DATA_CONNECT_MAX);
    let socket = dial::data_connection(config, &peer.address, peer.start_id, connect_deadline, is_stopped);
    let socket = socket.map_err(|source| match source {
        _ if is_stopped.load(Ordering::Relaxed) => LaneError::Cancelled { done_bytes: 0 },
        _ if Instant::now() >= deadline => LaneError::TimedOut { done_bytes: 0 },
        source => LaneError::PeerGone {
            what: "no data connection",
            source: Some(source),
        },
    })?;
    TcpLane::new(socket, Arc::clone(&peer.pairing))
}

/// A data connection for takes. Without one, small pulls take one more exchange of messages.
fn open_line(peer: &Peer, config: &NetConfig) -> Option<TakeLine> {
    if peer.is_gone.load(Ordering::Relaxed) {
        return None;
    }
    let deadline = Instant::now() + DATA_CONNECT_MAX;
    let socket = dial::data_connection(config, &peer.address, peer.start_id, deadline, &peer.is_gone).ok()?;
    TakeLine::new(socket, Arc::clone(&peer.pairing)).ok()?
}

fn done(job: &CopyJob, lane: &'static str, result: &Result<(), LaneError>, started: Instant) -> CopyDone {
    let copied = match result {
        Ok(()) => Copied::Held,
        Err(LaneError::Lapsed { .. }) => Copied::Lapsed,
        Err(LaneError::TimedOut { .. }) => Copied::Late,
        Err(LaneError::Cancelled { .. }) => Copied::Failed,
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
