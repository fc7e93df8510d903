//! Communicators of two ranks, and what they do later than they were asked to.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::ThreadId;
use std::time::Duration;

use crate::control::{LATE, NOT_YET};
use crate::link::{Link, Stopped, Token};
use crate::raw;
use crate::world::{IN_PROGRESS, INVALID_USAGE, Random, SUCCESS, World, lock};

/// Bytes that an aborted receive still writes.
const LATE_BYTES: usize = 64;

/// One send or receive of a group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operation {
    pub(crate) is_send: bool,
    pub(crate) address: usize,
    pub(crate) len: usize,
    pub(crate) stream: usize,
}

/// One rank of a communicator.
pub(crate) struct Communicator {
    pub(crate) number: usize,
    pub(crate) rank: i32,
    pub(crate) is_blocking: bool,
    /// What `ncclCommGetAsyncError` says.
    state: AtomicU32,
    is_aborted: AtomicBool,
    link: OnceLock<Link>,
    /// Held while a group is put on a stream, so that an abort can wait for that.
    launching: Mutex<()>,
    owner: ThreadId,
    inside: AtomicUsize,
}

/// A call of NCCL with a communicator.
pub(crate) struct Inside<'a>(&'a Communicator);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Communicator {
    /// A rank that is not made yet.
    pub(crate) fn new(rank: i32, is_blocking: bool) -> Arc<Self> {
        Arc::new(Self {
            number: World::get().number(),
            rank,
            is_blocking,
            state: AtomicU32::new(IN_PROGRESS),
            is_aborted: AtomicBool::new(false),
            link: OnceLock::new(),
            launching: Mutex::default(),
            owner: std::thread::current().id(),
            inside: AtomicUsize::new(0),
        })
    }

    /// Notices threads that use it at the same time or take turns: kvlane's rule is one thread, and an abort is sound only then.
    pub(crate) fn enter(&self, call: &str) -> Inside<'_> {
        let world = World::get();
        if self.inside.fetch_add(1, Ordering::SeqCst) > 0 {
            world.violated(&format!("{call} while another call is inside"), INVALID_USAGE);
        }
        if std::thread::current().id() != self.owner {
            let what = format!("{call} by another thread than the one that made the communicator");
            world.violated(&what, INVALID_USAGE);
        }
        Inside(self)
    }

    pub(crate) fn state(&self) -> u32 {
        self.state.load(Ordering::SeqCst)
    }

    /// Meets the other rank: later, or now if it is blocking.
    pub(crate) fn make(self: &Arc<Self>, id: (u16, Token)) {
        let own = Arc::clone(self);
        let make = move || {
            let mut random = Random::new(own.number);
            random.dawdle(1);
            if let Some(code) = World::get().injected("init") {
                own.state.store(code, Ordering::SeqCst);
                return;
            }
            match Link::meet(own.rank, id, || own.is_aborted()) {
                Ok(link) => {
                    let _ = own.link.set(link);
                    own.state.store(SUCCESS, Ordering::SeqCst);
                    if own.is_aborted() {
                        own.close();
                    }
                }
                Err(Stopped::Failed(code)) => own.state.store(code, Ordering::SeqCst),
                Err(Stopped::Aborted) => {}
            }
        };
        if self.is_blocking {
            make();
        } else {
            later("init", make);
        }
    }

    /// Puts a group on its stream: later, or now if it is blocking. Its operations were checked.
    pub(crate) fn launch(self: &Arc<Self>, operations: Vec<Operation>) {
        self.state.store(IN_PROGRESS, Ordering::SeqCst);
        let own = Arc::clone(self);
        let launch = move || {
            let mut random = Random::new(own.number);
            random.dawdle(2);
            let launching = lock(&own.launching);
            if own.is_aborted() {
                return;
            }
            let (stream, comm) = (operations[0].stream, Arc::clone(&own));
            let work = operations.clone();
            let code = World::get()
                .cuda
                .push(stream, &operations, Box::new(move || comm.run(&work, random)));
            drop(launching);
            let state = if code == 0 { SUCCESS } else { code };
            // What has gone wrong on the stream meanwhile stays.
            let _ = own
                .state
                .compare_exchange(IN_PROGRESS, state, Ordering::SeqCst, Ordering::SeqCst);
        };
        if self.is_blocking {
            launch();
        } else {
            later("launch", launch);
        }
    }

    /// From now on nothing is put on a stream; what is there ends some time later.
    pub(crate) fn abort(&self) {
        self.is_aborted.store(true, Ordering::SeqCst);
        drop(lock(&self.launching));
        self.close();
    }

    /// The kernel, on the stream's thread.
    fn run(&self, operations: &[Operation], mut random: Random) {
        let receives = operations.iter().filter(|operation| !operation.is_send);
        for receive in receives.clone() {
            // Checked when it was asked for; what has become of it since shows with the first byte.
            raw::fill(receive.address, NOT_YET, receive.len);
        }
        let result = self.carry_out(operations, &mut random);
        let Err(stopped) = result else { return };
        if let Stopped::Failed(code) = stopped {
            self.state.store(code, Ordering::SeqCst);
        }
        // It stays on the device until somebody aborts it.
        while !self.is_aborted() {
            std::thread::sleep(Duration::from_micros(200));
        }
        random.dawdle(1);
        for receive in receives {
            let late = [LATE; LATE_BYTES];
            let _ = raw::write_memory(receive.address, &late[..receive.len.min(LATE_BYTES)]);
        }
    }

    fn carry_out(&self, operations: &[Operation], random: &mut Random) -> Result<(), Stopped> {
        let world = World::get();
        if world.injected("hang").is_some() {
            while !self.is_aborted() {
                std::thread::sleep(Duration::from_micros(200));
            }
            return Err(Stopped::Aborted);
        }
        if let Some(code) = world.injected("group") {
            return Err(Stopped::Failed(code));
        }
        let link = self.link.get().ok_or(Stopped::Failed(INVALID_USAGE))?;
        let is_aborted = || self.is_aborted();
        for operation in operations {
            let (address, len) = (operation.address, operation.len);
            if operation.is_send {
                link.send(address, len, random, is_aborted)?;
            } else {
                link.receive(address, len, random, is_aborted)?;
            }
        }
        Ok(())
    }

    fn is_aborted(&self) -> bool {
        self.is_aborted.load(Ordering::SeqCst)
    }

    fn close(&self) {
        if let Some(link) = self.link.get() {
            link.close();
        }
    }
}

fn later(what: &str, work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new()
        .name(format!("stand-in-{what}"))
        .spawn(work)
        .expect("a thread can be started");
}
