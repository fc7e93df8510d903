//! Takes: small pulls over a data connection that the thread which begins them writes to itself, and whoever has a moment
//! reads from: the engine when it asks what has ended, else the thread of all connections.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::key::{Prompt, TransferKey};
use crate::lanes::{Lease, TakeLine, Taken};
use crate::proto::ConnectionId;

/// More bytes take so long that one more exchange of messages is not seen, and they are read under a lock.
pub(super) const TAKE_BYTES_MAX: u64 = 64 << 10;
/// A take is over in a fraction of a millisecond. After so long the holder is asked in the other way, which may end sooner.
const TAKE_MAX: Duration = Duration::from_millis(500);
/// A line to a peer is not asked for more often. Longer than making one may take, so only one is being made.
const LINE_PAUSE: Duration = Duration::from_secs(6);

/// One line to each peer that has one.
#[derive(Default)]
pub(super) struct Takes {
    lines: HashMap<ConnectionId, Line>,
    /// When a line to a peer was last asked for.
    asked: HashMap<ConnectionId, Instant>,
    /// Takes that run, for who only wants to know whether there are any.
    running: Arc<AtomicUsize>,
}

struct Line {
    line: TakeLine,
    running: Option<Running>,
}

struct Running {
    transfer: u64,
    started: Instant,
    bytes: u64,
}

/// A take that has ended.
pub(super) struct TakeDone {
    pub(super) transfer: u64,
    /// Held behind the last byte. None: the blocks have to be got in another way.
    pub(super) lease: Option<Lease>,
    pub(super) bytes: u64,
    pub(super) elapsed: Duration,
}

impl Takes {
    /// How many run.
    pub(super) fn running(&self) -> &Arc<AtomicUsize> {
        &self.running
    }

    /// A line to the peer of a connection. One is enough: a take may run on it.
    pub(super) fn add(&mut self, connection: ConnectionId, line: TakeLine) {
        self.lines
            .entry(connection)
            .or_insert(Line { line, running: None });
    }

    /// Whether a take can begin. None: a line to this peer must be made first, and is not being made.
    pub(super) fn is_free(&mut self, now: Instant, connection: ConnectionId) -> Option<bool> {
        if let Some(line) = self.lines.get(&connection) {
            return Some(line.running.is_none());
        }
        let was_asked = self
            .asked
            .get(&connection)
            .is_some_and(|asked| now < *asked + LINE_PAUSE);
        if was_asked {
            return Some(false);
        }
        self.asked.insert(connection, now);
        None
    }

    /// When [`stop_late`](Self::stop_late) must be called, at the latest.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let running = self.lines.values().filter_map(|line| line.running.as_ref());
        running.map(|running| running.started + TAKE_MAX).min()
    }

    /// Ends the takes that last too long, and their lines.
    pub(super) fn stop_late(&mut self, now: Instant) -> Vec<TakeDone> {
        let is_late = |line: &Line| {
            line.running
                .as_ref()
                .is_some_and(|running| running.started + TAKE_MAX <= now)
        };
        self.lines_that(is_late)
            .into_iter()
            .filter_map(|connection| self.drop_line(connection))
            .collect()
    }

    /// A peer is no more.
    pub(super) fn closed(&mut self, connection: ConnectionId) -> Option<TakeDone> {
        self.asked.remove(&connection);
        self.drop_line(connection)
    }

    /// False: nothing was asked for.
    pub(super) fn begin(
        &mut self,
        connection: ConnectionId,
        transfer: u64,
        (key, prompt): (&TransferKey, &Prompt),
        (first_block, targets): (u32, &[u32]),
        bytes: u64,
    ) -> bool {
        let Some(line) = self.lines.get_mut(&connection) else {
            return false;
        };
        match line.line.begin(key, prompt, first_block, targets) {
            Ok(true) => {
                line.running = Some(Running {
                    transfer,
                    started: Instant::now(),
                    bytes,
                });
                self.running.fetch_add(1, Ordering::Relaxed);
                true
            }
            Ok(false) => false,
            Err(error) => {
                tracing::info!(%error, "a data connection ended");
                self.lines.remove(&connection);
                false
            }
        }
    }

    /// Reads what has come over one line.
    pub(super) fn progress(&mut self, connection: ConnectionId) -> Option<TakeDone> {
        let line = self.lines.get_mut(&connection)?;
        match line.line.progress() {
            Ok(None) => None,
            Ok(Some(taken)) => {
                let lease = match taken {
                    Taken::Found(lease) => Some(lease),
                    Taken::Absent => None,
                };
                let running = line.running.take();
                self.done(running, lease)
            }
            Err(error) => {
                tracing::info!(%error, "a data connection ended");
                self.drop_line(connection)
            }
        }
    }

    /// Reads what has come over the lines on which takes run.
    pub(super) fn progress_all(&mut self) -> Vec<TakeDone> {
        self.lines_that(|line| line.running.is_some())
            .into_iter()
            .filter_map(|connection| self.progress(connection))
            .collect()
    }

    /// Ends a take at once: nothing writes its blocks any more. The line is closed with it.
    pub(super) fn stop(&mut self, transfer: u64) -> Option<TakeDone> {
        let is_it = |line: &Line| {
            line.running
                .as_ref()
                .is_some_and(|running| running.transfer == transfer)
        };
        let (&connection, _) = self.lines.iter().find(|(_, line)| is_it(line))?;
        self.drop_line(connection)
    }

    fn lines_that(&self, are_meant: impl Fn(&Line) -> bool) -> Vec<ConnectionId> {
        let lines = self.lines.iter().filter(|(_, line)| are_meant(line));
        lines.map(|(&connection, _)| connection).collect()
    }

    /// Closes a line, and ends what runs on it.
    fn drop_line(&mut self, connection: ConnectionId) -> Option<TakeDone> {
        let running = self.lines.remove(&connection)?.running;
        self.done(running, None)
    }

    /// Closes all lines.
    pub(super) fn drop_all(&mut self) -> Vec<TakeDone> {
        self.lines_that(|_| true)
            .into_iter()
            .filter_map(|connection| self.drop_line(connection))
            .collect()
    }

    fn done(&self, running: Option<Running>, lease: Option<Lease>) -> Option<TakeDone> {
        let running = running?;
        self.running.fetch_sub(1, Ordering::Relaxed);
        Some(TakeDone {
            transfer: running.transfer,
            lease,
            bytes: running.bytes,
            elapsed: running.started.elapsed(),
        })
    }
}
