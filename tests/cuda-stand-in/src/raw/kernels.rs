//! Kernels: a host twin of the one that kvlane has. What a launch copies is checked and known when it is launched; the list that
//! it reads must be the same still when the stream comes to it.

use std::ffi::{CStr, c_char, c_uint, c_void};
use std::ptr;

use super::{fill, give, words};
use crate::captures;
use crate::control::NOT_YET;
use crate::streams::{List, Part, Work};
use crate::world::*;

/// The one kernel, by the name that it has in its module, and the threads that it is launched with.
const COPY_PIECES: &CStr = c"kvlane_copy_pieces";
const THREADS_MAX: c_uint = 1024;
/// Handles: of the module, and of the kernel in it.
const MODULE: usize = 0x10;
const FUNCTION: usize = 0x11;
/// What a list's entry has: two addresses and a length.
const ENTRY_WORDS: usize = 3;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_void) -> u32 {
    let world = begin_outside_of_captures!("cuModuleLoadData");
    // SAFETY: the caller passes a text that ends with a zero, the only form of a module that is known here.
    let text = unsafe { CStr::from_ptr(image.cast()) }.to_string_lossy();
    let entry = format!(".entry {}(", COPY_PIECES.to_string_lossy());
    if !text.contains(".version") || !text.contains(&entry) {
        return world.violated("a module without the kernel that has a twin here", INVALID_VALUE);
    }
    give(module, ptr::without_provenance_mut(MODULE));
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: *mut c_void) -> u32 {
    match World::get().begin_on_device("cuModuleUnload") {
        Ok(_) if module.addr() == MODULE => SUCCESS,
        Ok(_) => World::get().violated("a module that is none was unloaded", INVALID_HANDLE),
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    module: *mut c_void,
    name: *const c_char,
) -> u32 {
    let world = begin_on_device!("cuModuleGetFunction");
    // SAFETY: the caller passes a text that ends with a zero.
    if module.addr() != MODULE || unsafe { CStr::from_ptr(name) } != COPY_PIECES {
        return world.violated("a kernel that is none", NOT_FOUND);
    }
    give(function, ptr::without_provenance_mut(FUNCTION));
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    _shared_bytes: c_uint,
    stream: *mut c_void,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> u32 {
    let world = begin_on_device!("cuLaunchKernel");
    let Some(stream) = world
        .stream(stream.addr())
        .filter(|_| function.addr() == FUNCTION)
    else {
        return world.violated(
            "a launch of no kernel, or on a stream that is none",
            INVALID_HANDLE,
        );
    };
    let is_flat = [grid_y, grid_z, block_y, block_z] == [1; 4];
    if !is_flat || grid_x == 0 || !(1..=THREADS_MAX).contains(&block_x) {
        return world.violated(
            "a launch of no threads, or of more than a block has",
            INVALID_VALUE,
        );
    }
    // SAFETY: the kernel has an address and a number for arguments, so the caller passes places of such.
    let (list, count) = unsafe { (*(*arguments).cast::<u64>(), *(*arguments.add(1)).cast::<u32>()) };
    let words_count = count as usize * ENTRY_WORDS;
    let memory = world.memory();
    if let Err(what) = memory.check(list as usize, words_count * size_of::<u64>(), true) {
        return world.violated(&format!("a list in {what}"), INVALID_VALUE);
    }
    let list = List {
        address: list as usize,
        words: words(list as usize, words_count),
    };
    let parts: Vec<Part> = list
        .words
        .chunks_exact(ENTRY_WORDS)
        .map(|entry| {
            let (from, to) = (entry[0] as usize, entry[1] as usize);
            Part {
                from,
                to,
                len: entry[2] as usize,
                from_pinned: memory.is_pinned(from),
                to_pinned: memory.is_pinned(to),
            }
        })
        .collect();
    for part in &parts {
        if let Err(what) = memory.check_part(part) {
            // A kernel finds it only when it runs.
            world.lose(&format!("a kernel's copy of {what}"));
            return SUCCESS;
        }
        if part.to_pinned {
            fill(part.to, NOT_YET, part.len);
        }
    }
    drop(memory);
    stream.push(Work::Twin(list, parts));
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut c_uint) -> u32 {
    // SAFETY: the caller passes a place of its own.
    let Some(old) = captures::exchange_mode(unsafe { mode.read() }) else {
        return INVALID_VALUE;
    };
    give(mode, old);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: *mut c_void, mode: c_uint) -> u32 {
    let world = begin_on_device!("cuStreamBeginCapture_v2");
    if world.stream(stream.addr()).is_none() || mode != captures::GLOBAL {
        return world.violated(
            "a capture of no stream, or of a kind that has no model here",
            INVALID_VALUE,
        );
    }
    captures::begin(world, stream.addr());
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamEndCapture(stream: *mut c_void, graph: *mut *mut c_void) -> u32 {
    let world = begin_on_device!("cuStreamEndCapture");
    give(graph, ptr::null_mut());
    match captures::end(world, stream.addr()) {
        Some(true) => SUCCESS,
        Some(false) => CAPTURE_INVALIDATED,
        None => world.violated("the end of a capture that is none", INVALID_VALUE),
    }
}
