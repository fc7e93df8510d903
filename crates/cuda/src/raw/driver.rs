//! The driver's library and its functions.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{CUcontext, CUdevice, CUdeviceptr, CUevent, CUipcMemHandle, CUstream};
use libloading::Library;

use super::table::table;
use crate::error::{CudaError, Result};

/// Names of the library: the driver package promises the first, and PyTorch loads it; development packages have the other.
const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

pub(super) const SUCCESS: u32 = 0;
pub(super) const OUT_OF_MEMORY: u32 = 2;
pub(super) const NOT_READY: u32 = 600;

table! {
    /// The functions that this crate needs. All of them exist since CUDA 4, or 11 where the name ends in `_v2`.
    Calls {
        cuInit(c_uint);
        cuDriverGetVersion(*mut c_int);
        cuGetErrorName(u32, *mut *const c_char);
        cuDeviceGetCount(*mut c_int);
        cuDeviceGet(*mut CUdevice, c_int);
        cuDeviceGetName(*mut c_char, c_int, CUdevice);
        cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
        cuDevicePrimaryCtxRelease_v2(CUdevice);
        cuCtxPushCurrent_v2(CUcontext);
        cuCtxPopCurrent_v2(*mut CUcontext);
        cuStreamCreate(*mut CUstream, c_uint);
        cuStreamDestroy_v2(CUstream);
        cuStreamWaitEvent(CUstream, CUevent, c_uint);
        cuEventCreate(*mut CUevent, c_uint);
        cuEventRecord(CUevent, CUstream);
        cuEventQuery(CUevent);
        cuEventDestroy_v2(CUevent);
        cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
        cuMemFreeHost(*mut c_void);
        cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
        cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
        cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, usize, CUstream);
        cuMemAlloc_v2(*mut CUdeviceptr, usize);
        cuMemFree_v2(CUdeviceptr);
        cuMemGetAddressRange_v2(*mut CUdeviceptr, *mut usize, CUdeviceptr);
        cuIpcGetMemHandle(*mut CUipcMemHandle, CUdeviceptr);
        cuIpcOpenMemHandle_v2(*mut CUdeviceptr, CUipcMemHandle, c_uint);
        cuIpcCloseMemHandle(CUdeviceptr);
    }
}

/// What all copies of a batch have in common: the driver's `CUmemcpyAttributes`.
#[repr(C)]
pub(super) struct BatchAttributes {
    source_access_order: u32,
    /// Kind and number of a place, twice; zeroes: no hint.
    location_hints: [u32; 4],
    flags: u32,
}

impl BatchAttributes {
    /// Sources are read when the stream comes to the batch.
    pub(super) const IN_STREAM_ORDER: Self = Self {
        source_access_order: 1,
        location_hints: [0; 4],
        flags: 0,
    };
}

/// `cuMemcpyBatchAsync` as CUDA 12.8 has it: targets, sources, lengths and their number; attributes, the first copy that
/// each is for and their number; place for the number of a copy that failed; stream.
pub(super) type BatchCopy = unsafe extern "C" fn(
    *const CUdeviceptr,
    *const CUdeviceptr,
    *const usize,
    usize,
    *const BatchAttributes,
    *const usize,
    usize,
    *mut usize,
    CUstream,
) -> u32;

/// The version of the driver's interface whose form [`BatchCopy`] has. Newer drivers have the function in this form too,
/// under another name, and give out the one that is asked for.
const BATCH_COPY_VERSION: c_int = 12_080;

/// A loaded CUDA driver.
pub(crate) struct Driver {
    pub(super) calls: Calls,
    /// Where the driver is new enough.
    pub(super) batch_copy: Option<BatchCopy>,
    library: String,
}

impl Driver {
    /// The driver of this machine, loaded once and kept.
    ///
    /// # Errors
    /// No library is found, or it lacks a function. The next call looks again.
    pub(crate) fn installed() -> Result<&'static Driver> {
        static INSTALLED: OnceLock<Driver> = OnceLock::new();
        if let Some(driver) = INSTALLED.get() {
            return Ok(driver);
        }
        let driver = Self::load(&NAMES)?;
        Ok(INSTALLED.get_or_init(|| driver))
    }

    /// The library's name.
    pub(crate) fn library(&self) -> &str {
        &self.library
    }

    #[cfg(feature = "stand-in")]
    pub(super) fn stand_in(calls: Calls) -> Self {
        Self {
            calls,
            batch_copy: None,
            library: "stand-in".to_owned(),
        }
    }

    fn load(names: &[&str]) -> Result<Self> {
        let mut tried = Vec::new();
        for &name in names {
            // SAFETY: what these names stand for is the CUDA driver, made to be loaded like this; its initialisers run in
            // every CUDA program. Whoever can put another library in its place owns the process anyway.
            match unsafe { Library::new(name) } {
                Ok(library) => {
                    // SAFETY: as above; the driver's interface is stable under these names.
                    let calls = unsafe { Calls::resolve(&library) };
                    // SAFETY: as above.
                    let batch_copy = unsafe { find_batch_copy(&library) };
                    // Never unloaded: the driver has threads, and the functions must stay.
                    std::mem::forget(library);
                    let calls = calls.map_err(|missing| CudaError::SymbolMissing {
                        library: name.to_owned(),
                        symbol: missing.symbol,
                        message: missing.message,
                    })?;
                    return Ok(Self {
                        calls,
                        batch_copy,
                        library: name.to_owned(),
                    });
                }
                Err(error) => tried.push((name.to_owned(), error.to_string())),
            }
        }
        Err(CudaError::LibraryMissing { tried })
    }

    pub(crate) fn init(&self) -> Result<()> {
        // SAFETY: may be called at any time from any thread; the argument must be zero.
        let code = unsafe { (self.calls.cuInit)(0) };
        self.check(code, "cuInit", "starting the driver")
    }

    pub(crate) fn version(&self) -> Result<(u32, u32)> {
        let mut version = 0;
        // SAFETY: writes one number.
        let code = unsafe { (self.calls.cuDriverGetVersion)(&raw mut version) };
        self.check(code, "cuDriverGetVersion", "asking for its version")?;
        let version = u32::try_from(version).unwrap_or(0);
        Ok((version / 1000, version % 1000 / 10))
    }

    pub(crate) fn device_count(&self) -> Result<u32> {
        let mut count = 0;
        // SAFETY: writes one number.
        let code = unsafe { (self.calls.cuDeviceGetCount)(&raw mut count) };
        self.check(code, "cuDeviceGetCount", "counting devices")?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    pub(crate) fn device_name(&self, ordinal: u32) -> Result<String> {
        let device = self.device(ordinal)?;
        let mut name = [0; 256];
        // SAFETY: writes at most as many bytes as it is told, the last of them zero.
        let code = unsafe { (self.calls.cuDeviceGetName)(name.as_mut_ptr(), name.len() as c_int, device) };
        self.check(code, "cuDeviceGetName", "asking for a device's name")?;
        let bytes: Vec<u8> = name
            .iter()
            .take_while(|&&byte| byte != 0)
            .map(|&byte| byte as u8)
            .collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub(super) fn device(&self, ordinal: u32) -> Result<CUdevice> {
        let count = self.device_count()?;
        if ordinal >= count {
            return Err(CudaError::NoSuchDevice { ordinal, count });
        }
        let mut device = 0;
        // SAFETY: writes one number.
        let code = unsafe { (self.calls.cuDeviceGet)(&raw mut device, ordinal as c_int) };
        self.check(code, "cuDeviceGet", "opening a device")?;
        Ok(device)
    }

    pub(super) fn check(&self, code: u32, call: &'static str, context: &'static str) -> Result<()> {
        match code {
            SUCCESS => Ok(()),
            _ => Err(self.error(code, call, context)),
        }
    }

    pub(super) fn error(&self, code: u32, call: &'static str, context: &'static str) -> CudaError {
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: writes a pointer to a static text, or null for a code that it does not know.
        let known = unsafe { (self.calls.cuGetErrorName)(code, &raw mut text) } == SUCCESS;
        let name = if known && !text.is_null() {
            // SAFETY: not null, and a static text that ends with a zero.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        } else {
            "an unknown code".to_owned()
        };
        CudaError::Driver {
            call,
            code,
            name,
            context,
        }
    }
}

/// # Safety
/// `library` is the CUDA driver.
unsafe fn find_batch_copy(library: &Library) -> Option<BatchCopy> {
    type Find = unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64, *mut u32) -> u32;
    // SAFETY: the driver has the function in this form since 12.0; an older one lacks the name.
    let find = unsafe { library.get::<Find>("cuGetProcAddress_v2") }.ok()?;
    let mut found = std::ptr::null_mut();
    let mut status = 0;
    // SAFETY: a text that ends with a zero, and places for one pointer and one number. It may be called before `cuInit`.
    let code = unsafe {
        find(
            c"cuMemcpyBatchAsync".as_ptr(),
            &raw mut found,
            BATCH_COPY_VERSION,
            0,
            &raw mut status,
        )
    };
    if code != SUCCESS || status != 0 || found.is_null() {
        return None;
    }
    // SAFETY: not null, and the function of that name in the form of the version that was asked for.
    Some(unsafe { std::mem::transmute::<*mut c_void, BatchCopy>(found) })
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Driver").field(&self.library).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_names_what_was_looked_for() {
        let error = Driver::load(&["libkvlane-none.so.1", "libkvlane-none.so"]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, CudaError::LibraryMissing { tried } if tried.len() == 2));
        assert!(text.contains("libkvlane-none.so.1 ("), "{text}");
    }

    #[test]
    fn a_library_that_is_no_driver_is_an_error_that_names_the_function() {
        // Every program has the C library.
        let error = Driver::load(&["libkvlane-none.so", "libc.so.6"]).unwrap_err();
        let CudaError::SymbolMissing { library, symbol, .. } = error else {
            panic!("{error:?}")
        };
        assert_eq!((library.as_str(), symbol), ("libc.so.6", "cuInit"));
    }
}
