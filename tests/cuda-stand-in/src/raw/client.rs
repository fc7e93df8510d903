//! The way from a test to the library that it has loaded, which has a state of its own.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::time::Duration;

use libloading::Library;

/// Functions of a loaded stand-in.
pub(crate) struct Client {
    allocate: unsafe extern "C" fn(*mut u64, usize) -> u32,
    stream: unsafe extern "C" fn(*mut *mut c_void, c_uint) -> u32,
    push: unsafe extern "C" fn(*mut c_void) -> u32,
    pop: unsafe extern "C" fn(*mut *mut c_void) -> u32,
    context: *mut c_void,
    kernel: unsafe extern "C" fn(usize, u64, *const u8, usize, u64) -> u32,
    fail: unsafe extern "C" fn(*const c_char, u64, u32),
    calls: unsafe extern "C" fn(*const c_char) -> u64,
    delay: unsafe extern "C" fn(u64),
    violations: unsafe extern "C" fn(*mut u8, usize) -> usize,
}

// SAFETY: the context is a number for the stand-in, whose functions may be called from every thread.
unsafe impl Send for Client {}
// SAFETY: as above.
unsafe impl Sync for Client {}

impl Client {
    pub(crate) fn load(path: &Path) -> Self {
        // SAFETY: this crate's own library; it has no initialisers.
        let library = unsafe { Library::new(path) };
        let library = library.unwrap_or_else(|error| panic!("cannot load {}: {error}", path.display()));
        // Never unloaded: its streams are threads.
        let library: &'static Library = Box::leak(Box::new(library));
        macro_rules! function {
            ($name:literal) => {{
                // SAFETY: the function is this crate's, and the field has its type.
                let found = unsafe { library.get($name) };
                *found.unwrap_or_else(|error| panic!("the stand-in lacks a function: {error}"))
            }};
        }
        let init: unsafe extern "C" fn(c_uint) -> u32 = function!("cuInit");
        let retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> u32 =
            function!("cuDevicePrimaryCtxRetain");
        let mut context = std::ptr::null_mut();
        // SAFETY: the driver's functions; the second writes one handle.
        let codes = unsafe { [init(0), retain(&raw mut context, 0)] };
        assert_eq!(codes, [0, 0], "the stand-in does not start");
        Self {
            allocate: function!("cuMemAlloc_v2"),
            stream: function!("cuStreamCreate"),
            push: function!("cuCtxPushCurrent_v2"),
            pop: function!("cuCtxPopCurrent_v2"),
            context,
            kernel: function!("kvlane_stand_in_kernel"),
            fail: function!("kvlane_stand_in_fail"),
            calls: function!("kvlane_stand_in_calls"),
            delay: function!("kvlane_stand_in_delay"),
            violations: function!("kvlane_stand_in_violations"),
        }
    }

    pub(crate) fn allocate(&self, bytes: usize) -> u64 {
        let mut address = 0;
        // SAFETY: writes one number.
        self.in_context(|| unsafe { (self.allocate)(&raw mut address, bytes) });
        address
    }

    pub(crate) fn compute_stream(&self) -> u64 {
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one handle.
        self.in_context(|| unsafe { (self.stream)(&raw mut stream, 0) });
        stream.addr() as u64
    }

    pub(crate) fn kernel(&self, stream: u64, address: u64, bytes: &[u8], duration: Duration) -> u32 {
        let duration_us = duration.as_micros() as u64;
        // SAFETY: the bytes are borrowed until the call has returned, and copied by it.
        unsafe { (self.kernel)(stream as usize, address, bytes.as_ptr(), bytes.len(), duration_us) }
    }

    pub(crate) fn fail(&self, call: &str, after: u64, code: u32) {
        let call = CString::new(call).expect("a name without a zero");
        // SAFETY: a text that ends with a zero.
        unsafe { (self.fail)(call.as_ptr(), after, code) };
    }

    pub(crate) fn calls(&self, call: &str) -> u64 {
        let call = CString::new(call).expect("a name without a zero");
        // SAFETY: a text that ends with a zero.
        unsafe { (self.calls)(call.as_ptr()) }
    }

    pub(crate) fn set_delay(&self, most: Duration) {
        // SAFETY: takes a number.
        unsafe { (self.delay)(most.as_micros() as u64) };
    }

    pub(crate) fn violations(&self) -> String {
        let mut text = vec![0; 64 << 10];
        // SAFETY: writes at most as many bytes as it is told.
        let len = unsafe { (self.violations)(text.as_mut_ptr(), text.len()) };
        text.truncate(len);
        String::from_utf8_lossy(&text).into_owned()
    }

    fn in_context(&self, call: impl FnOnce() -> u32) {
        let mut context = std::ptr::null_mut();
        // SAFETY: the context is retained for ever; what is put on this thread is taken off again.
        let codes = unsafe { [(self.push)(self.context), call(), (self.pop)(&raw mut context)] };
        assert_eq!(codes, [0, 0, 0], "the stand-in refused a call");
    }
}
