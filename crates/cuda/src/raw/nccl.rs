//! NCCL's library and its functions.
//!
//! The types are those of cudarc's bindings for NCCL 2.22, whose configuration is the shortest that is in use; newer libraries
//! take it. cudarc's functions are not used: its loader never looks for `libnccl.so.2`, the only name that PyTorch ships, and a
//! function that is missing panics.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclUniqueId};
use libloading::Library;
use libloading::os::unix::Library as UnixLibrary;

use super::table::table;
use crate::error::{CudaError, Result};
use crate::nccl::{CommunicatorId, NcclVersion};

/// The name that PyTorch's package has, and links to.
const NAME: &str = "libnccl.so.2";

/// Where it lies in a folder of Python packages.
const IN_PACKAGES: &str = "nvidia/nccl/lib/libnccl.so.2";

/// The first whose communicators have the configuration that this crate passes.
const OLDEST: NcclVersion = NcclVersion::from_code(21_800);

pub(super) const SUCCESS: u32 = 0;
pub(super) const IN_PROGRESS: u32 = 7;

table! {
    /// The functions that this crate needs.
    NcclCalls {
        ncclGetVersion(*mut c_int);
        ncclGetUniqueId(*mut ncclUniqueId);
        ncclCommInitRankConfig(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t);
        ncclCommGetAsyncError(ncclComm_t, *mut u32);
        ncclCommAbort(ncclComm_t);
        ncclSend(*const c_void, usize, u32, c_int, ncclComm_t, CUstream);
        ncclRecv(*mut c_void, usize, u32, c_int, ncclComm_t, CUstream);
        ncclGroupStart();
        ncclGroupEnd();
    }
}

/// Functions that give a text.
#[derive(Clone, Copy)]
struct Texts {
    of_code: Option<unsafe extern "C" fn(u32) -> *const c_char>,
    last: Option<unsafe extern "C" fn(ncclComm_t) -> *const c_char>,
}

/// A loaded NCCL.
pub(crate) struct Nccl {
    pub(super) calls: NcclCalls,
    texts: Texts,
    library: String,
    version: NcclVersion,
}

impl Nccl {
    /// The NCCL of this process, loaded once and kept.
    ///
    /// # Errors
    /// No library is found, or it lacks a function or is too old. The next call looks again.
    pub(crate) fn installed() -> Result<&'static Nccl> {
        static INSTALLED: OnceLock<Nccl> = OnceLock::new();
        if let Some(nccl) = INSTALLED.get() {
            return Ok(nccl);
        }
        let nccl = Self::find(NAME, &beside_packages())?;
        Ok(INSTALLED.get_or_init(|| nccl))
    }

    /// The library's name or path.
    pub(crate) fn library(&self) -> &str {
        &self.library
    }

    pub(crate) fn version(&self) -> NcclVersion {
        self.version
    }

    pub(crate) fn unique_id(&self) -> Result<CommunicatorId> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: writes one id.
        let code = unsafe { (self.calls.ncclGetUniqueId)(&raw mut id) };
        self.check(code, "ncclGetUniqueId", "preparing a communicator")?;
        Ok(CommunicatorId(id.internal.map(|byte| byte as u8)))
    }

    /// The process's own first: two of them in one process would be two sets of threads and sockets, and PyTorch's is the one
    /// that fits its CUDA.
    fn find(name: &str, places: &[PathBuf]) -> Result<Self> {
        let mut tried = Vec::new();
        let loaded = (
            format!("{name} of this process"),
            Path::new(name),
            libc::RTLD_NOW | libc::RTLD_NOLOAD,
        );
        let beside = places
            .iter()
            .map(|path| (path.display().to_string(), path.as_path(), libc::RTLD_NOW));
        let anywhere = (name.to_owned(), Path::new(name), libc::RTLD_NOW);
        for (told, path, flags) in std::iter::once(loaded).chain(beside).chain([anywhere]) {
            // SAFETY: what these names stand for is NCCL, made to be loaded like this; its initialisers run in every program
            // that uses PyTorch on GPUs. Whoever can put another library in its place owns the process anyway.
            match unsafe { UnixLibrary::open(Some(path), flags) } {
                Ok(library) => return Self::take(library.into(), told),
                Err(error) => tried.push((told, error.to_string())),
            }
        }
        Err(CudaError::NcclMissing { tried })
    }

    fn take(library: Library, name: String) -> Result<Self> {
        // SAFETY: the library is NCCL, whose interface is stable under these names.
        let calls = unsafe { NcclCalls::resolve(&library) };
        // SAFETY: as above; both are there since 2.13, and only make errors easier to read.
        let texts = unsafe {
            Texts {
                of_code: library.get("ncclGetErrorString").ok().map(|found| *found),
                last: library.get("ncclGetLastError").ok().map(|found| *found),
            }
        };
        // Never unloaded: it has threads, and the functions must stay.
        std::mem::forget(library);
        let calls = calls.map_err(|missing| CudaError::NcclSymbolMissing {
            library: name.clone(),
            symbol: missing.symbol,
            message: missing.message,
        })?;
        let mut nccl = Self {
            calls,
            texts,
            library: name,
            version: OLDEST,
        };
        let mut version = 0;
        // SAFETY: writes one number.
        let code = unsafe { (nccl.calls.ncclGetVersion)(&raw mut version) };
        nccl.check(code, "ncclGetVersion", "asking for its version")?;
        nccl.version = NcclVersion::from_code(u32::try_from(version).unwrap_or(0));
        if nccl.version < OLDEST {
            return Err(CudaError::NcclTooOld {
                found: nccl.version,
                oldest: OLDEST,
            });
        }
        Ok(nccl)
    }

    pub(super) fn check(&self, code: u32, call: &'static str, context: &'static str) -> Result<()> {
        match code {
            SUCCESS => Ok(()),
            _ => Err(self.error(code, call, context)),
        }
    }

    /// As [`check`](Self::check), for calls of which a non-blocking communicator says that they go on.
    pub(super) fn check_started(&self, code: u32, call: &'static str, context: &'static str) -> Result<()> {
        match code {
            IN_PROGRESS => Ok(()),
            code => self.check(code, call, context),
        }
    }

    pub(super) fn error(&self, code: u32, call: &'static str, context: &'static str) -> CudaError {
        let read = |text: *const c_char| {
            (!text.is_null()).then(|| {
                // SAFETY: not null, and a text of the library that ends with a zero and stays where it is.
                unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
            })
        };
        // SAFETY: takes a number and gives a static text.
        let name = self.texts.of_code.map(|of_code| unsafe { of_code(code) });
        // SAFETY: the argument is not used; gives a static buffer.
        let last = self.texts.last.map(|last| unsafe { last(std::ptr::null_mut()) });
        let detail = last.and_then(read).filter(|text| !text.is_empty());
        CudaError::Nccl {
            call,
            code,
            name: name
                .and_then(read)
                .unwrap_or_else(|| "an unknown code".to_owned()),
            detail: detail.map_or_else(String::new, |text| format!(", '{}'", text.trim())),
            context,
        }
    }
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Nccl")
            .field("library", &self.library)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// Where NCCL would be if it was installed beside something that this process has loaded: PyTorch, or kvlane itself.
fn beside_packages() -> Vec<PathBuf> {
    // Not readable: then only the loader's own search is left.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut places = in_packages(&maps);
    places.retain(|place| place.exists());
    places
}

/// The places that a list of mapped files leads to, each once.
fn in_packages(maps: &str) -> Vec<PathBuf> {
    let mut places = Vec::new();
    let files = maps
        .lines()
        .filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])));
    for file in files {
        let is_packages =
            |folder: &&Path| folder.ends_with("site-packages") || folder.ends_with("dist-packages");
        if let Some(packages) = file.ancestors().find(is_packages) {
            let place = packages.join(IN_PACKAGES);
            if !places.contains(&place) {
                places.push(place);
            }
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_pytorch_is_found_among_the_mapped_files() {
        let maps = "\
7f00-7f01 r-xp 00000000 08:01 1  /usr/lib/x86_64-linux-gnu/libc.so.6
7f02-7f03 r-xp 00000000 08:01 2  /opt/a venv/lib/python3.12/site-packages/torch/lib/libtorch.so
7f04-7f05 rw-p 00000000 00:00 0
7f06-7f07 r-xp 00000000 08:01 3  /opt/a venv/lib/python3.12/site-packages/kvlane/_native.abi3.so
7f08-7f09 r-xp 00000000 08:01 4  /usr/lib/python3/dist-packages/x.so (deleted)
";
        let expected = [
            "/opt/a venv/lib/python3.12/site-packages/nvidia/nccl/lib/libnccl.so.2",
            "/usr/lib/python3/dist-packages/nvidia/nccl/lib/libnccl.so.2",
        ];
        assert_eq!(in_packages(maps), expected.map(PathBuf::from));
    }

    #[test]
    fn a_missing_library_is_an_error_that_names_what_was_looked_for() {
        let places = [PathBuf::from("/nowhere/libkvlane-none.so.2")];
        let error = Nccl::find("libkvlane-none.so.2", &places).unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(&error, CudaError::NcclMissing { tried } if tried.len() == 3),
            "{text}"
        );
        assert!(text.contains("/nowhere/libkvlane-none.so.2 ("), "{text}");
    }

    #[test]
    fn a_library_that_is_no_nccl_is_an_error_that_names_the_function() {
        // Every program has the C library.
        let error = Nccl::find("libc.so.6", &[]).unwrap_err();
        let CudaError::NcclSymbolMissing { library, symbol, .. } = error else {
            panic!("{error:?}")
        };
        assert_eq!(
            (library.as_str(), symbol),
            ("libc.so.6 of this process", "ncclGetVersion")
        );
    }
}
