//! The driver's library and its functions.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUipcMemHandle, CUmodule, CUstream,
};
use libloading::Library;

use super::table::table;
use crate::error::{CudaError, Result};

/// Names of the library: the driver package promises the first, and PyTorch loads it; development packages have the other.
const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

pub(super) const SUCCESS: u32 = 0;
pub(super) const OUT_OF_MEMORY: u32 = 2;
pub(super) const NOT_READY: u32 = 600;

table! {
    /// The functions that this crate needs. All of them exist since CUDA 4, 5.5, 10.1 or, where the name ends in `_v2`, 11.
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
        cuStreamCreateWithPriority(*mut CUstream, c_uint, c_int);
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
        cuModuleLoadData(*mut CUmodule, *const c_void);
        cuModuleUnload(CUmodule);
        cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
        cuLaunchKernel(
            CUfunction,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            CUstream,
            *mut *mut c_void,
            *mut *mut c_void
        );
        cuThreadExchangeStreamCaptureMode(*mut c_uint);
    }
}

/// A loaded CUDA driver.
pub(crate) struct Driver {
    pub(super) calls: Calls,
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
                    // Never unloaded: the driver has threads, and the functions must stay.
                    std::mem::forget(library);
                    let calls = calls.map_err(|missing| CudaError::SymbolMissing {
                        library: name.to_owned(),
                        symbol: missing.symbol,
                        message: missing.message,
                    })?;
                    return Ok(Self {
                        calls,
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
