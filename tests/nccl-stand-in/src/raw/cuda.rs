//! The stand-in for CUDA that this process has loaded.

use std::ffi::{CString, c_char, c_void};
use std::path::Path;

use libloading::os::unix::Library;

use crate::communicator::Operation;

type Foreign = unsafe extern "C" fn(
    usize,
    *const [usize; 2],
    usize,
    usize,
    extern "C" fn(*mut c_void),
    *mut c_void,
) -> u32;

/// What another library does on a stream.
type Work = Box<dyn FnOnce() + Send>;

/// Functions of the loaded stand-in for CUDA.
pub(crate) struct Cuda {
    foreign: Foreign,
    check: unsafe extern "C" fn(usize, usize) -> u32,
    violated: unsafe extern "C" fn(*const c_char),
    has_context: unsafe extern "C" fn() -> u32,
}

impl Cuda {
    /// # Panics
    /// If the process has not loaded it.
    pub(crate) fn find() -> Self {
        let (path, flags) = (Path::new("libcuda.so.1"), libc::RTLD_NOW | libc::RTLD_NOLOAD);
        // SAFETY: nothing is loaded: the library is there, with its initialisers done, or the call fails.
        let library = unsafe { Library::open(Some(path), flags) };
        let library = library.unwrap_or_else(|error| panic!("load the stand-in for CUDA first: {error}"));
        // Never unloaded: its streams are threads.
        let library: &'static Library = Box::leak(Box::new(library));
        macro_rules! function {
            ($name:literal) => {{
                // SAFETY: the function is the stand-in's, and the field has its type.
                let found = unsafe { library.get($name) };
                *found.unwrap_or_else(|error| panic!("libcuda.so.1 is not kvlane's stand-in: {error}"))
            }};
        }
        Self {
            foreign: function!("kvlane_stand_in_foreign"),
            check: function!("kvlane_stand_in_check"),
            violated: function!("kvlane_stand_in_violated"),
            has_context: function!("kvlane_stand_in_has_context"),
        }
    }

    /// Puts a group's work on a stream; a code other than 0: it never runs.
    pub(crate) fn push(&self, stream: usize, operations: &[Operation], work: Work) -> u32 {
        let (sends, receives): (Vec<&Operation>, Vec<&Operation>) =
            operations.iter().partition(|operation| operation.is_send);
        let ranges: Vec<[usize; 2]> = sends
            .iter()
            .chain(&receives)
            .map(|operation| [operation.address, operation.len])
            .collect();
        let argument = Box::into_raw(Box::new(work));
        // SAFETY: the ranges are borrowed until the call has returned, and copied by it; `run` takes back the box, once.
        let code = unsafe {
            (self.foreign)(
                stream,
                ranges.as_ptr(),
                ranges.len(),
                sends.len(),
                run,
                argument.cast(),
            )
        };
        if code != 0 {
            // SAFETY: made above, and nobody else takes it back.
            drop(unsafe { Box::from_raw(argument) });
        }
        code
    }

    /// Whether a range is device memory now. That it is not is counted as misuse.
    pub(crate) fn check(&self, address: usize, len: usize) -> bool {
        // SAFETY: takes numbers.
        unsafe { (self.check)(address, len) == 0 }
    }

    /// Whether this thread has a current context.
    pub(crate) fn has_context(&self) -> bool {
        // SAFETY: takes nothing.
        unsafe { (self.has_context)() != 0 }
    }

    pub(crate) fn violated(&self, what: &str) {
        let what = CString::new(what).expect("a text without a zero");
        // SAFETY: a text that ends with a zero.
        unsafe { (self.violated)(what.as_ptr()) };
    }
}

/// What the stand-in for CUDA calls on the stream's thread.
extern "C" fn run(argument: *mut c_void) {
    // SAFETY: the box that `push` has handed over, which is called for once.
    let work = unsafe { Box::from_raw(argument.cast::<Work>()) };
    work();
}
