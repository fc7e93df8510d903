//! The stand-in does what NCCL does, and notices what NCCL or a device would punish. The risk: tests on it pass whatever kvlane
//! does.

use std::ffi::{c_int, c_void};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvlane_nccl_stand_in::{LATE, NOT_YET};
use libloading::os::unix::Library;

const IN_PROGRESS: u32 = 7;
const REMOTE_ERROR: u32 = 6;
const UINT8: u32 = 1;
const BYTES: usize = 4096;
/// Misuse is counted for the whole process, so the tests take turns.
static TURN: Mutex<()> = Mutex::new(());

#[repr(C)]
#[derive(Clone, Copy)]
#[allow(dead_code, reason = "read by the library")]
struct Id([u8; 128]);

#[repr(C)]
#[allow(dead_code, reason = "read by the library")]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    rest: [c_int; 7],
}

type Handle = *mut c_void;

/// NCCL as C programs see it.
struct Nccl {
    unique_id: unsafe extern "C" fn(*mut Id) -> u32,
    init: unsafe extern "C" fn(*mut Handle, c_int, Id, c_int, *mut Config) -> u32,
    state: unsafe extern "C" fn(Handle, *mut u32) -> u32,
    abort: unsafe extern "C" fn(Handle) -> u32,
    destroy: unsafe extern "C" fn(Handle) -> u32,
    send: unsafe extern "C" fn(*const c_void, usize, u32, c_int, Handle, *mut c_void) -> u32,
    receive: unsafe extern "C" fn(*mut c_void, usize, u32, c_int, Handle, *mut c_void) -> u32,
    group_end: unsafe extern "C" fn() -> u32,
}

fn library(name: &str) -> &'static Library {
    let flags = libc::RTLD_NOW | libc::RTLD_NOLOAD;
    // SAFETY: nothing is loaded: the stand-ins are there.
    let library = unsafe { Library::open(Some(Path::new(name)), flags) };
    Box::leak(Box::new(library.expect("it is loaded")))
}

macro_rules! function {
    ($library:expr, $name:literal) => {{
        // SAFETY: the function is the stand-in's, and the field has its type.
        let found = unsafe { $library.get($name) };
        *found.expect("it is there")
    }};
}

/// Two ranks in this process.
struct Rig {
    nccl: Nccl,
    cuda: &'static kvlane_cuda_stand_in::Control,
    violations_before: usize,
    _turn: MutexGuard<'static, ()>,
}

impl Rig {
    fn new() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let cuda = kvlane_cuda_stand_in::load();
        kvlane_nccl_stand_in::load();
        let driver = library("libcuda.so.1");
        let retain: unsafe extern "C" fn(*mut Handle, c_int) -> u32 =
            function!(driver, "cuDevicePrimaryCtxRetain");
        let push: unsafe extern "C" fn(Handle) -> u32 = function!(driver, "cuCtxPushCurrent_v2");
        let mut context = std::ptr::null_mut();
        // SAFETY: the driver's functions; the first writes one handle. The context stays current on this thread.
        let codes = unsafe { [retain(&raw mut context, 0), push(context)] };
        assert_eq!(codes, [0, 0]);
        let library = library("libnccl.so.2");
        let nccl = Nccl {
            unique_id: function!(library, "ncclGetUniqueId"),
            init: function!(library, "ncclCommInitRankConfig"),
            state: function!(library, "ncclCommGetAsyncError"),
            abort: function!(library, "ncclCommAbort"),
            destroy: function!(library, "ncclCommDestroy"),
            send: function!(library, "ncclSend"),
            receive: function!(library, "ncclRecv"),
            group_end: function!(library, "ncclGroupEnd"),
        };
        Self {
            violations_before: cuda.violations().len(),
            nccl,
            cuda,
            _turn: turn,
        }
    }

    fn begin(&self, id: Id, rank: c_int, blocking: c_int) -> (Handle, u32) {
        let mut handle = std::ptr::null_mut();
        let mut config = Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21_800,
            blocking,
            rest: [c_int::MIN; 7],
        };
        // SAFETY: places for one handle and a configuration.
        let code = unsafe { (self.nccl.init)(&raw mut handle, 2, id, rank, &raw mut config) };
        (handle, code)
    }

    fn id(&self) -> Id {
        let mut id = Id([0; 128]);
        // SAFETY: writes one id.
        assert_eq!(unsafe { (self.nccl.unique_id)(&raw mut id) }, 0);
        id
    }

    /// A communicator, both ends of it.
    fn pair(&self) -> [Handle; 2] {
        let id = self.id();
        let ends = [0, 1].map(|rank| self.begin(id, rank, 0));
        ends.map(|(handle, code)| {
            assert!(code == IN_PROGRESS || code == 0);
            assert_eq!(self.settle(handle), 0);
            handle
        })
    }

    fn state(&self, handle: Handle) -> u32 {
        let mut state = 0;
        // SAFETY: writes one number.
        match unsafe { (self.nccl.state)(handle, &raw mut state) } {
            0 => state,
            code => code,
        }
    }

    fn settle(&self, handle: Handle) -> u32 {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match self.state(handle) {
                IN_PROGRESS => {
                    assert!(Instant::now() < until, "it stays in progress");
                    std::thread::sleep(Duration::from_micros(100));
                }
                state => return state,
            }
        }
    }

    fn send(&self, from: u64, handle: Handle, stream: u64, peer: c_int) -> u32 {
        let (from, stream) = (pointer(from), pointer(stream));
        // SAFETY: the stand-in checks all of it.
        unsafe { (self.nccl.send)(from, BYTES, UINT8, peer, handle, stream) }
    }

    fn receive(&self, to: u64, handle: Handle, stream: u64) -> u32 {
        let (to, stream) = (pointer(to), pointer(stream));
        // SAFETY: the stand-in checks all of it.
        unsafe { (self.nccl.receive)(to, BYTES, UINT8, 0, handle, stream) }
    }

    fn abort(&self, handle: Handle) -> u32 {
        // SAFETY: the stand-in checks it.
        unsafe { (self.nccl.abort)(handle) }
    }

    /// What was done wrong since this was asked last.
    fn violations(&mut self) -> Vec<String> {
        let all = self.cuda.violations();
        let new = all[self.violations_before..].to_vec();
        self.violations_before = all.len();
        new
    }

    #[track_caller]
    fn expect(&mut self, told: &str) {
        let violations = self.violations();
        assert!(
            violations.len() == 1 && violations[0].contains(told),
            "{told}: {violations:?}"
        );
    }
}

fn pointer(number: u64) -> Handle {
    std::ptr::without_provenance_mut(number as usize)
}

fn bytes_at(address: u64) -> Vec<u8> {
    let start: *const u8 = std::ptr::with_exposed_provenance(address as usize);
    // SAFETY: device memory of the stand-in, which is host memory and stays mapped; as many bytes were allocated.
    (0..BYTES)
        .map(|index| unsafe { start.add(index).read_volatile() })
        .collect()
}

/// Waits until memory holds something.
#[track_caller]
fn wait_for(address: u64, is_so: impl Fn(&[u8]) -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !is_so(&bytes_at(address)) {
        assert!(Instant::now() < until, "the bytes do not come");
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn bytes_arrive_in_the_streams_order_and_right_use_is_no_misuse() {
    let mut rig = Rig::new();
    let [sender, receiver] = rig.pair();
    let (from, to) = (rig.cuda.allocate(BYTES), rig.cuda.allocate(BYTES));
    let streams = [rig.cuda.compute_stream(), rig.cuda.compute_stream()];
    rig.receive(to, receiver, streams[1]);
    wait_for(to, |bytes| bytes[0] == NOT_YET);
    // Behind a kernel that takes its time, on the stream of the send.
    rig.cuda
        .write(streams[0], from, &[7; BYTES], Duration::from_millis(50));
    rig.send(from, sender, streams[0], 1);
    wait_for(to, |bytes| bytes.iter().all(|&byte| byte == 7));
    assert_eq!([rig.settle(sender), rig.settle(receiver)], [0, 0]);
    assert_eq!([rig.abort(sender), rig.abort(receiver)], [0, 0]);
    assert_eq!(rig.violations(), Vec::<String>::new());
}

#[test]
fn the_end_of_the_peer_is_an_asynchronous_error_and_an_aborted_receive_still_writes() {
    let mut rig = Rig::new();
    let [sender, receiver] = rig.pair();
    let (to, stream) = (rig.cuda.allocate(BYTES), rig.cuda.compute_stream());
    rig.receive(to, receiver, stream);
    wait_for(to, |bytes| bytes[0] == NOT_YET);
    rig.abort(sender);
    let until = Instant::now() + Duration::from_secs(20);
    while rig.state(receiver) != REMOTE_ERROR {
        assert!(Instant::now() < until, "no error");
        std::thread::sleep(Duration::from_micros(200));
    }
    // The kernel is still there.
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bytes_at(to)[0], NOT_YET);
    rig.abort(receiver);
    wait_for(to, |bytes| bytes[0] == LATE && bytes[BYTES - 1] == NOT_YET);
    assert_eq!(rig.violations(), Vec::<String>::new());
}

#[test]
fn misuse_of_a_communicator_is_noticed() {
    let mut rig = Rig::new();
    let (memory, stream) = (rig.cuda.allocate(BYTES), rig.cuda.compute_stream());
    let [sender, receiver] = rig.pair();

    rig.send(memory, sender, stream, 0);
    rig.expect("no partner of rank 0");
    rig.send(1 << 40, sender, stream, 1);
    rig.expect("are no memory");
    let elsewhere = sender.addr();
    std::thread::scope(|scope| {
        let state = rig.nccl.state;
        scope.spawn(move || {
            let mut found = 0;
            // SAFETY: writes one number.
            unsafe { state(std::ptr::without_provenance_mut(elsewhere), &raw mut found) }
        });
    });
    rig.expect("by another thread");
    // SAFETY: takes nothing.
    unsafe { (rig.nccl.group_end)() };
    rig.expect("a group that was not started");

    rig.abort(sender);
    rig.send(memory, sender, stream, 1);
    rig.expect("was aborted or destroyed");
    // SAFETY: the stand-in checks it.
    unsafe { (rig.nccl.destroy)(receiver) };
    assert_eq!(rig.violations(), Vec::<String>::new());
    rig.abort(receiver);
    rig.expect("was aborted or destroyed");
}

#[test]
fn calls_before_a_communicator_is_made_are_noticed() {
    let mut rig = Rig::new();
    let (memory, stream) = (rig.cuda.allocate(BYTES), rig.cuda.compute_stream());
    // Without the other rank it is never made.
    let (alone, code) = rig.begin(rig.id(), 0, 0);
    assert_eq!(code, IN_PROGRESS);
    rig.send(memory, alone, stream, 1);
    rig.expect("while the call before is in progress");
    assert_eq!(rig.abort(alone), 0);
    assert_eq!(rig.violations(), Vec::<String>::new());
    // An id can be used once.
    let id = rig.id();
    let [(first, _), (other, _)] = [rig.begin(id, 0, 0), rig.begin(id, 1, 0)];
    assert_eq!([rig.settle(first), rig.settle(other)], [0, 0]);
    rig.abort(first);
    rig.abort(other);
    let (second, _) = rig.begin(id, 0, 0);
    rig.settle(second);
    rig.expect("its id was used before");
    rig.abort(second);
    let (none, code) = rig.begin(Id([0; 128]), 0, 0);
    assert!(none.is_null() && code != 0);
    rig.expect("an id that is none");
}

#[test]
fn an_abort_of_a_blocking_communicator_is_noticed() {
    let mut rig = Rig::new();
    let id = rig.id();
    let (other, _) = rig.begin(id, 1, 0);
    // Returns once both are there.
    let (blocking, code) = rig.begin(id, 0, 1);
    assert_eq!(code, 0);
    rig.abort(blocking);
    rig.expect("an abort of a blocking communicator");
    rig.abort(other);
    assert_eq!(rig.violations(), Vec::<String>::new());
}
