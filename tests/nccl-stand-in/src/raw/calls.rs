//! NCCL's functions. Their pointers are valid: the callers are kvlane's module for NCCL and this crate's tests.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use crate::communicator::{Communicator, Operation};
use crate::link::{new_id, read_id};
use crate::world::*;

/// In NCCL's header.
const CONFIG_MAGIC: c_uint = 0xcafe_beef;
const INT8: u32 = 0;
const UINT8: u32 = 1;

/// The beginning of `ncclConfig_t`, in all of its versions.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

/// 128 bytes by value, as NCCL has them.
#[repr(C)]
struct UniqueId([u8; 128]);

/// Groups that are open on this thread, and their operations.
struct Group {
    depth: u32,
    operations: Vec<(Arc<Communicator>, Operation)>,
}

thread_local! {
    static GROUP: RefCell<Group> = const {
        RefCell::new(Group {
            depth: 0,
            operations: Vec::new(),
        })
    };
}

/// Writes a result where the caller wants it.
fn give<T>(place: *mut T, value: T) {
    // SAFETY: the callers pass places of their own, see above.
    unsafe { place.write(value) };
}

/// Ends a function with the error that it was told.
macro_rules! begin {
    ($call:literal) => {
        match World::get().begin($call) {
            Ok(()) => World::get(),
            Err(code) => return code,
        }
    };
}

/// The communicator of a handle, entered; ends a function if there is none.
macro_rules! enter {
    ($world:expr, $call:literal, $handle:expr => $communicator:ident) => {
        let Some($communicator) = $world.communicator($handle.addr()) else {
            let what = concat!($call, " of a communicator that is none, was aborted or destroyed");
            return $world.violated(what, INVALID_ARGUMENT);
        };
        let _inside = $communicator.enter($call);
    };
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetVersion(version: *mut c_int) -> u32 {
    let world = begin!("ncclGetVersion");
    give(version, world.settings.version as c_int);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(code: u32) -> *const c_char {
    let text: &CStr = match code {
        SUCCESS => c"no error",
        UNHANDLED_CUDA_ERROR => c"unhandled cuda error",
        SYSTEM_ERROR => c"unhandled system error",
        INVALID_ARGUMENT => c"invalid argument",
        INVALID_USAGE => c"invalid usage",
        REMOTE_ERROR => c"remote process exited or there was a network error",
        IN_PROGRESS => c"NCCL operation in progress",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetLastError(_communicator: *mut c_void) -> *const c_char {
    c"kvlane NCCL stand-in".as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> u32 {
    begin!("ncclGetUniqueId");
    match new_id() {
        Ok(made) => {
            give(id, UniqueId(made));
            SUCCESS
        }
        Err(_) => SYSTEM_ERROR,
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommInitRankConfig(
    handle: *mut *mut c_void,
    ranks: c_int,
    id: UniqueId,
    rank: c_int,
    config: *const Config,
) -> u32 {
    let world = begin!("ncclCommInitRankConfig");
    give(handle, std::ptr::null_mut());
    if !world.cuda.has_context() {
        return world.violated(
            "ncclCommInitRankConfig without a current context",
            UNHANDLED_CUDA_ERROR,
        );
    }
    let Some(id) = read_id(&id.0).filter(|_| ranks == 2 && (0..ranks).contains(&rank)) else {
        return world.violated(
            "a communicator of an id that is none, or of other ranks than two",
            INVALID_ARGUMENT,
        );
    };
    let is_blocking = if config.is_null() {
        true
    } else {
        // SAFETY: the caller passes a configuration, which begins like this.
        let config = unsafe { &*config };
        if config.magic != CONFIG_MAGIC || config.size < size_of::<Config>() || config.version < 21_400 {
            return world.violated("a configuration that is none", INVALID_ARGUMENT);
        }
        config.blocking != 0
    };
    let communicator = Communicator::new(rank, is_blocking);
    give(handle, std::ptr::without_provenance_mut(communicator.number));
    lock(&world.communicators).insert(communicator.number, Arc::clone(&communicator));
    communicator.make(id);
    communicator.state()
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommGetAsyncError(handle: *mut c_void, state: *mut u32) -> u32 {
    let world = begin!("ncclCommGetAsyncError");
    enter!(world, "ncclCommGetAsyncError", handle => communicator);
    give(state, communicator.state());
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommAbort(handle: *mut c_void) -> u32 {
    let world = begin!("ncclCommAbort");
    enter!(world, "ncclCommAbort", handle => communicator);
    lock(&world.communicators).remove(&handle.addr());
    communicator.abort();
    if communicator.is_blocking {
        return world.violated("an abort of a blocking communicator", INVALID_USAGE);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommFinalize(handle: *mut c_void) -> u32 {
    let world = begin!("ncclCommFinalize");
    enter!(world, "ncclCommFinalize", handle => communicator);
    check_settled(world, "ncclCommFinalize", &communicator)
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommDestroy(handle: *mut c_void) -> u32 {
    let world = begin!("ncclCommDestroy");
    enter!(world, "ncclCommDestroy", handle => communicator);
    lock(&world.communicators).remove(&handle.addr());
    let code = check_settled(world, "ncclCommDestroy", &communicator);
    communicator.abort();
    code
}

/// Refuses a call while the one before goes on.
fn check_settled(world: &World, call: &str, communicator: &Communicator) -> u32 {
    match communicator.state() {
        IN_PROGRESS => world.violated(
            &format!("{call} while the call before is in progress"),
            INVALID_USAGE,
        ),
        code => code,
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclSend(
    address: *const c_void,
    count: usize,
    kind: u32,
    peer: c_int,
    handle: *mut c_void,
    stream: *mut c_void,
) -> u32 {
    let world = begin!("ncclSend");
    enter!(world, "ncclSend", handle => communicator);
    let operation = Operation {
        is_send: true,
        address: address.addr(),
        len: count,
        stream: stream.addr(),
    };
    add(world, "ncclSend", &communicator, operation, (kind, peer))
}

#[unsafe(no_mangle)]
extern "C" fn ncclRecv(
    address: *mut c_void,
    count: usize,
    kind: u32,
    peer: c_int,
    handle: *mut c_void,
    stream: *mut c_void,
) -> u32 {
    let world = begin!("ncclRecv");
    enter!(world, "ncclRecv", handle => communicator);
    let operation = Operation {
        is_send: false,
        address: address.addr(),
        len: count,
        stream: stream.addr(),
    };
    add(world, "ncclRecv", &communicator, operation, (kind, peer))
}

/// Puts a send or receive into the open group; without one it is a group of its own.
fn add(
    world: &World,
    call: &str,
    communicator: &Arc<Communicator>,
    operation: Operation,
    (kind, peer): (u32, c_int),
) -> u32 {
    let code = check_settled(world, call, communicator);
    if code != SUCCESS {
        return code;
    }
    if peer != 1 - communicator.rank {
        return world.violated(
            &format!(
                "{call} with rank {peer}, which is no partner of rank {}",
                communicator.rank
            ),
            INVALID_ARGUMENT,
        );
    }
    if !matches!(kind, INT8 | UINT8) || operation.len == 0 {
        return world.violated(&format!("{call} of no bytes"), INVALID_ARGUMENT);
    }
    if !world.cuda.check(operation.address, operation.len) {
        return INVALID_ARGUMENT;
    }
    let is_alone = GROUP.with_borrow_mut(|group| {
        if group.depth > 0 {
            group.operations.push((Arc::clone(communicator), operation));
        }
        group.depth == 0
    });
    if is_alone {
        communicator.launch(vec![operation]);
        return communicator.state();
    }
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupStart() -> u32 {
    begin!("ncclGroupStart");
    GROUP.with_borrow_mut(|group| group.depth += 1);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupEnd() -> u32 {
    // Closed even where it fails.
    let closed = GROUP.with_borrow_mut(|group| {
        let depth = group.depth.checked_sub(1)?;
        group.depth = depth;
        Some(if depth == 0 {
            std::mem::take(&mut group.operations)
        } else {
            Vec::new()
        })
    });
    let world = begin!("ncclGroupEnd");
    let Some(mut operations) = closed else {
        return world.violated("the end of a group that was not started", INVALID_USAGE);
    };
    let mut state = SUCCESS;
    while let Some((communicator, first)) = operations.first().cloned() {
        let (own, others): (Vec<_>, Vec<_>) = operations
            .into_iter()
            .partition(|(other, _)| Arc::ptr_eq(other, &communicator));
        operations = others;
        let own: Vec<Operation> = own.into_iter().map(|(_, operation)| operation).collect();
        if own.iter().any(|operation| operation.stream != first.stream) {
            return world.violated("a group of one communicator on two streams", INVALID_USAGE);
        }
        communicator.launch(own);
        if state == SUCCESS {
            state = communicator.state();
        }
    }
    state
}

#[unsafe(no_mangle)]
unsafe extern "C" fn kvlane_nccl_stand_in_fail(what: *const c_char, after: u64, code: u32) {
    // SAFETY: the caller, `Client`, passes a text that ends with a zero.
    let what = unsafe { CStr::from_ptr(what) }.to_string_lossy();
    World::get().fail(&what, after, code);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn kvlane_nccl_stand_in_calls(call: *const c_char) -> u64 {
    // SAFETY: as above.
    let call = unsafe { CStr::from_ptr(call) }.to_string_lossy();
    World::get().call_count(&call)
}

#[unsafe(no_mangle)]
extern "C" fn kvlane_nccl_stand_in_communicators() -> u64 {
    lock(&World::get().communicators).len() as u64
}
