//! The thread that reads the control connections of one value, and the lock that it shares with the engine's calls.

use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mio::net::TcpListener;
use mio::{Events, Interest, Poll, Token, Waker};
use parking_lot::{Mutex, MutexGuard};

use super::address::PeerAddress;
use super::connections::{Core, DATA_TOKEN};
use super::dial;
use super::machine::{Machine, NetConfig};
use crate::error::{Error, Result};
use crate::proto::ConnectionId;

/// A thread that runs so much later than it should has been standing still.
const STALL_MIN: Duration = Duration::from_millis(500);
const LISTENER: Token = Token(usize::MAX);
const WAKER: Token = Token(usize::MAX - 1);

/// Connections, their thread, and the machine behind them.
pub(super) struct Net<M: Machine> {
    shared: Arc<Shared<M>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    address: Option<SocketAddr>,
}

/// What the threads share.
pub(super) struct Shared<M: Machine> {
    core: Mutex<Core<M>>,
    waker: Waker,
}

impl<M: Machine> Net<M> {
    /// Starts the thread; with `listen`, peers can connect.
    pub(super) fn start(config: NetConfig, listen: Option<SocketAddr>, machine: M) -> Result<Self> {
        let io = |context| move |source| Error::Io { context, source };
        let poll = Poll::new().map_err(io("waiting for connections"))?;
        let registry = poll
            .registry()
            .try_clone()
            .map_err(io("waiting for connections"))?;
        let waker = Waker::new(&registry, WAKER).map_err(io("waiting for connections"))?;
        let mut listener = None;
        let mut address = None;
        if let Some(wanted) = listen {
            let failed = |source| Error::Listen {
                address: wanted,
                source,
            };
            let bound = dial::listen(wanted).map_err(failed)?;
            address = Some(bound.local_addr().map_err(failed)?);
            let mut bound = TcpListener::from_std(bound);
            registry
                .register(&mut bound, LISTENER, Interest::READABLE)
                .map_err(failed)?;
            listener = Some(bound);
        }
        let core = Core::new(machine, config, registry);
        let shared = Arc::new(Shared {
            core: Mutex::new(core),
            waker,
        });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("kvlane-p2p".to_owned())
            .spawn(move || run_to_the_end(&own, poll, listener))
            .map_err(io("starting a thread"))?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
            address,
        })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// What other threads of the value hold on to.
    pub(super) fn shared(&self) -> &Arc<Shared<M>> {
        &self.shared
    }

    /// Ends the thread and all connections.
    pub(super) fn close(&self) {
        self.shared.with(|core, now| core.close(now));
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            let _ = self.shared.waker.wake();
            let _ = thread.join();
        }
    }
}

impl<M: Machine> Drop for Net<M> {
    fn drop(&mut self) {
        self.close();
    }
}

impl<M: Machine> Shared<M> {
    /// Works on the machine and the connections, then sends what there is to send.
    pub(super) fn with<T>(self: &Arc<Self>, work: impl FnOnce(&mut Core<M>, Instant) -> T) -> T {
        let mut core = self.lock();
        let had_unflushed = core.has_unflushed();
        core.leaves_messages = true;
        let result = core.work(work);
        core.leaves_messages = false;
        let next = core.next_deadline();
        let is_sooner = match (next, core.sleeps_until) {
            (Some(next), Some(until)) => next < until,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if is_sooner || (core.has_unflushed() && !had_unflushed) {
            let _ = self.waker.wake();
        }
        result
    }

    /// The connection to a peer, made if there is none. `None`: it cannot be reached, or was tried in vain just now.
    pub(super) fn connection(
        self: &Arc<Self>,
        core: &mut Core<M>,
        now: Instant,
        address: &PeerAddress,
    ) -> Option<ConnectionId> {
        let (shared, target) = (Arc::clone(self), address.clone());
        core.connection(now, address, |id, deadline| {
            std::thread::Builder::new()
                .name("kvlane-p2p-dial".to_owned())
                .spawn(move || {
                    let made = target.connect(deadline);
                    shared.with(|core, now| core.dialled(now, id, made));
                })
                .map(drop)
        })
    }

    /// One thing that the thread does. Whoever waits for the lock has it next: the engine must not wait for a peer that
    /// always has more to say. Not `with`: the thread need not wake itself.
    fn turn(&self, work: impl FnOnce(&mut Core<M>, Instant)) {
        let mut core = self.lock();
        core.leaves_messages = false; // also behind a call that panicked
        core.work(work);
        MutexGuard::unlock_fair(core);
    }

    fn lock(&self) -> MutexGuard<'_, Core<M>> {
        self.core.lock()
    }
}

/// The thread. Without it no lease would ever end, so however it ends, all of them end with it.
fn run_to_the_end<M: Machine>(shared: &Arc<Shared<M>>, poll: Poll, listener: Option<TcpListener>) {
    let run = AssertUnwindSafe(|| run(shared, poll, listener));
    if catch_unwind(run).is_err() {
        tracing::error!("internal error: peers are not heard any more, and nothing is handed over");
        // What is behind the lock may be half done: if that cannot be closed either, it stays as it is.
        let _ = catch_unwind(AssertUnwindSafe(|| shared.lock().work(Core::close)));
    }
}

/// Waits for sockets and deadlines.
fn run<M: Machine>(shared: &Arc<Shared<M>>, mut poll: Poll, listener: Option<TcpListener>) {
    let mut events = Events::with_capacity(256);
    let mut expected = Instant::now();
    loop {
        let (timeout, has_unread) = {
            let mut core = shared.lock();
            let stall = Instant::now().saturating_duration_since(expected);
            if stall >= STALL_MIN {
                core.forgive(stall);
            }
            if core.is_closing {
                return;
            }
            core.sleeps_until = core.next_deadline();
            let now = Instant::now();
            let timeout = core
                .sleeps_until
                .map(|until| until.saturating_duration_since(now));
            (timeout, core.has_unread())
        };
        let timeout = match timeout {
            _ if has_unread => Some(Duration::ZERO),
            // The system rounds down to milliseconds: without the rest a loop would spin until the deadline.
            timeout => timeout.map(|timeout| timeout + Duration::from_millis(1)),
        };
        let asleep = Instant::now();
        if let Err(error) = poll.poll(&mut events, timeout)
            && error.kind() != io::ErrorKind::Interrupted
        {
            tracing::error!(%error, "waiting for connections failed; peers are not heard any more");
            shared.lock().work(|core, now| core.close(now));
            return;
        }
        let awake = Instant::now();
        let unread = {
            let mut core = shared.lock();
            let due = timeout.map_or(awake, |timeout| asleep + timeout);
            let stall = awake.saturating_duration_since(due);
            if stall >= STALL_MIN {
                core.forgive(stall);
            }
            // What follows takes a moment.
            expected = awake;
            if core.has_unflushed() {
                core.work(Core::flush_left);
            }
            core.take_unread()
        };
        for id in unread {
            shared.turn(|core, now| core.progress(now, id));
        }
        for event in &events {
            match event.token() {
                WAKER => {}
                LISTENER => {
                    if let Some(listener) = &listener {
                        shared.turn(|core, now| core.accept(now, listener));
                    }
                }
                Token(data) if data & DATA_TOKEN != 0 => {
                    let id = ConnectionId((data & !DATA_TOKEN) as u64);
                    shared.turn(|core, _| core.machine.data_readable(id));
                }
                Token(id) => {
                    let id = ConnectionId(id as u64);
                    shared.turn(|core, now| {
                        // One that has had its turn has the next one anyway.
                        if !core.is_unread(id) {
                            core.progress(now, id);
                        }
                    });
                }
            }
        }
        shared.turn(Core::tick);
    }
}

#[cfg(test)]
mod tests;
