//! The libraries that GPU copies need: the driver is asked, NCCL is only looked for.

use std::path::{Path, PathBuf};

use kvlane_cuda::{CudaError, DriverInfo};
use serde::Serialize;

use super::python;
use crate::facts::PythonFacts;

/// Where distributions, CUDA's own installer and NVIDIA's images put libraries.
const USUAL_FOLDERS: [&str; 7] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/nvidia/lib64",
    "/usr/local/cuda/lib64",
    "/usr/local/lib",
];
/// The driver's control device: this machine has a GPU, and this container may use it.
const CONTROL_DEVICE: &str = "/dev/nvidiactl";

/// What is there for GPU copies.
#[derive(Debug, Serialize)]
pub(super) struct GpuState {
    control_device: bool,
    /// Names of the devices that this process may use.
    devices: Vec<String>,
    /// Newest CUDA version that the driver supports.
    cuda_version: Option<String>,
    libraries: [Library; 2],
}

#[derive(Debug, Serialize)]
struct Library {
    name: &'static str,
    found: bool,
    /// Where, or why not.
    detail: String,
}

/// Asks the driver for its devices and looks for NCCL.
pub(super) fn check(facts: &PythonFacts, problems: &mut Vec<String>) -> GpuState {
    let driver = kvlane_cuda::probe();
    let has_control_device = Path::new(CONTROL_DEVICE).exists();
    problems.extend(driver_problem(&driver, has_control_device));
    GpuState::new(driver, has_control_device, &library_folders(facts))
}

fn driver_problem(driver: &Result<DriverInfo, CudaError>, has_control_device: bool) -> Option<String> {
    match driver {
        // Without a GPU, a missing driver is in order, and so is one that finds no device.
        _ if !has_control_device => None,
        Ok(_) => None,
        Err(CudaError::LibraryMissing { .. }) => Some(format!(
            "There is a GPU ({CONTROL_DEVICE}) but no libcuda.so.1: start the container with the driver's libraries \
             (NVIDIA_DRIVER_CAPABILITIES=compute,utility), or add their folder to LD_LIBRARY_PATH."
        )),
        Err(error) => Some(format!(
            "There is a GPU ({CONTROL_DEVICE}) but its driver cannot be used ({error}): see whether nvidia-smi works \
             here, and mend the driver first."
        )),
    }
}

/// Folders in the loader's order, then where the packages of PyTorch are, which it loads by their full path.
fn library_folders(facts: &PythonFacts) -> Vec<PathBuf> {
    let by_user = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let by_user = std::env::split_paths(&by_user).filter(|folder| folder.is_absolute());
    let packages = facts
        .get()
        .and_then(|facts| python::text(facts, "vllm_path"))
        .and_then(|path| Path::new(&path).parent().map(Path::to_owned));
    by_user
        .chain(USUAL_FOLDERS.map(PathBuf::from))
        .chain(packages.map(|packages| packages.join("nvidia/nccl/lib")))
        .collect()
}

impl GpuState {
    fn new(driver: Result<DriverInfo, CudaError>, control_device: bool, folders: &[PathBuf]) -> Self {
        let nccl = folders
            .iter()
            .map(|folder| folder.join("libnccl.so.2"))
            .find(|path| path.is_file());
        let (found, detail) = match &driver {
            Ok(info) => (true, format!("loaded as {}", info.library)),
            Err(error @ CudaError::LibraryMissing { .. }) => (false, error.to_string()),
            Err(error) => (true, error.to_string()),
        };
        let (devices, cuda_version) = match driver {
            Ok(info) => {
                let (major, minor) = info.version;
                (info.devices, Some(format!("{major}.{minor}")))
            }
            Err(_) => (Vec::new(), None),
        };
        Self {
            control_device,
            devices,
            cuda_version,
            libraries: [
                Library {
                    name: "libcuda.so.1",
                    found,
                    detail,
                },
                Library {
                    name: "libnccl.so.2",
                    found: nccl.is_some(),
                    detail: match nccl {
                        Some(path) => format!("found at {}", path.display()),
                        None => "not found in the usual folders".to_owned(),
                    },
                },
            ],
        }
    }

    /// For people: (what, value).
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let [cuda, nccl] = &self.libraries;
        let driver = match (&self.cuda_version, cuda.found) {
            (Some(version), _) if self.devices.is_empty() => format!("CUDA {version}, no device"),
            (Some(version), _) => format!("CUDA {version}, {}", self.devices.join(", ")),
            (None, true) => format!("{} found but not usable: {}", cuda.name, cuda.detail),
            (None, false) => format!("{} not found, so no GPU copies", cuda.name),
        };
        vec![
            ("gpu", driver),
            ("nccl", format!("{} {}", nccl.name, nccl.detail)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing() -> Result<DriverInfo, CudaError> {
        Err(CudaError::LibraryMissing { tried: Vec::new() })
    }

    fn refused() -> Result<DriverInfo, CudaError> {
        Err(CudaError::Driver {
            call: "cuInit",
            code: 100,
            name: "CUDA_ERROR_NO_DEVICE".to_owned(),
            context: "starting the driver",
        })
    }

    #[test]
    fn a_machine_without_a_gpu_is_in_order_with_and_without_a_driver() {
        assert_eq!(driver_problem(&missing(), false), None);
        assert_eq!(driver_problem(&refused(), false), None);
    }

    #[test]
    fn a_gpu_without_a_driver_that_works_is_a_problem() {
        assert!(
            driver_problem(&missing(), true)
                .unwrap()
                .contains("no libcuda.so.1")
        );
        assert!(
            driver_problem(&refused(), true)
                .unwrap()
                .contains("CUDA_ERROR_NO_DEVICE")
        );
    }

    #[test]
    fn libraries_are_told_found_or_not_found() {
        let root = tempfile::tempdir().unwrap();
        let folders = [root.path().join("a"), root.path().join("b")];
        let bare = GpuState::new(missing(), false, &folders);
        assert!(bare.libraries.iter().all(|library| !library.found));
        assert_eq!(bare.lines()[0].1, "libcuda.so.1 not found, so no GPU copies");

        std::fs::create_dir(&folders[1]).unwrap();
        std::fs::write(folders[1].join("libnccl.so.2"), b"").unwrap();
        let half = GpuState::new(refused(), false, &folders);
        assert!(half.libraries.iter().all(|library| library.found));
        assert!(half.lines()[0].1.contains("not usable"), "{:?}", half.lines());
        assert!(
            half.lines()[1].1.ends_with("b/libnccl.so.2"),
            "{:?}",
            half.lines()
        );
    }
}
