//! The way from a test to the library that it has loaded, which has a state of its own.

use std::ffi::{CString, c_char};
use std::path::Path;

use libloading::Library;

/// Functions of a loaded stand-in.
pub(crate) struct Client {
    fail: unsafe extern "C" fn(*const c_char, u64, u32),
    calls: unsafe extern "C" fn(*const c_char) -> u64,
    communicators: unsafe extern "C" fn() -> u64,
}

impl Client {
    pub(crate) fn load(path: &Path) -> Self {
        // SAFETY: this crate's own library; it has no initialisers.
        let library = unsafe { Library::new(path) };
        let library = library.unwrap_or_else(|error| panic!("cannot load {}: {error}", path.display()));
        // Never unloaded: it has threads.
        let library: &'static Library = Box::leak(Box::new(library));
        macro_rules! function {
            ($name:literal) => {{
                // SAFETY: the function is this crate's, and the field has its type.
                let found = unsafe { library.get($name) };
                *found.unwrap_or_else(|error| panic!("the stand-in lacks a function: {error}"))
            }};
        }
        Self {
            fail: function!("kvlane_nccl_stand_in_fail"),
            calls: function!("kvlane_nccl_stand_in_calls"),
            communicators: function!("kvlane_nccl_stand_in_communicators"),
        }
    }

    pub(crate) fn fail(&self, what: &str, after: u64, code: u32) {
        let what = CString::new(what).expect("a name without a zero");
        // SAFETY: a text that ends with a zero.
        unsafe { (self.fail)(what.as_ptr(), after, code) };
    }

    pub(crate) fn calls(&self, call: &str) -> u64 {
        let call = CString::new(call).expect("a name without a zero");
        // SAFETY: a text that ends with a zero.
        unsafe { (self.calls)(call.as_ptr()) }
    }

    pub(crate) fn communicators(&self) -> u64 {
        // SAFETY: takes nothing.
        unsafe { (self.communicators)() }
    }
}
