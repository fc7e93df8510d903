//! The libraries that GPU copies need. They are looked for, not loaded: loading runs their code.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::python;
use crate::facts::PythonFacts;

/// Where distributions, CUDA's own installer and NVIDIA's container runtime put libraries.
const USUAL_FOLDERS: [&str; 9] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/nvidia/lib64",
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/compat",
    "/usr/local/lib",
    "/lib64",
];
/// The driver's control device: there is a GPU driver in this machine, and this container may use it.
const DRIVER_DEVICE: &str = "/dev/nvidiactl";

/// What is there for GPU copies.
#[derive(Debug, Serialize)]
pub(super) struct GpuState {
    driver_device: bool,
    libraries: Vec<Library>,
}

#[derive(Debug, Serialize)]
struct Library {
    name: &'static str,
    /// Null if it was not found.
    path: Option<PathBuf>,
}

/// Looks for the libraries.
pub(super) fn check(facts: &PythonFacts, problems: &mut Vec<String>) -> GpuState {
    let state = GpuState::find(Path::new("/"), &folders(facts), Path::new(DRIVER_DEVICE).exists());
    problems.extend(state.problem());
    state
}

/// Folders in the loader's order, then PyTorch's, which it loads by full path.
fn folders(facts: &PythonFacts) -> Vec<PathBuf> {
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
    fn find(root: &Path, folders: &[PathBuf], driver_device: bool) -> Self {
        let find = |name: &'static str| Library {
            name,
            path: folders
                .iter()
                .map(|folder| folder.join(name))
                .find(|path| root.join(path.strip_prefix("/").unwrap_or(path)).is_file()),
        };
        Self {
            driver_device,
            libraries: ["libcuda.so.1", "libnccl.so.2"].map(find).into(),
        }
    }

    fn problem(&self) -> Option<String> {
        let cuda = &self.libraries[0];
        (self.driver_device && cuda.path.is_none()).then(|| {
            format!(
                "There is a GPU ({DRIVER_DEVICE}) but no {}: start the container with the driver's libraries \
                 (NVIDIA_DRIVER_CAPABILITIES=compute,utility) or add their folder to LD_LIBRARY_PATH.",
                cuda.name
            )
        })
    }

    /// For people: (what, value).
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let line = |library: &Library| match &library.path {
            Some(path) => format!("{} found at {}", library.name, path.display()),
            None => format!("{} not found", library.name),
        };
        let libraries: Vec<String> = self.libraries.iter().map(line).collect();
        vec![("gpu", libraries.join(", "))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_where_the_folders_say_and_a_gpu_without_a_driver_library_is_a_problem() {
        let root = tempfile::tempdir().unwrap();
        let folders = [PathBuf::from("/a"), PathBuf::from("/b")];
        std::fs::create_dir(root.path().join("b")).unwrap();

        let bare = GpuState::find(root.path(), &folders, false);
        assert_eq!(
            bare.lines()[0].1,
            "libcuda.so.1 not found, libnccl.so.2 not found"
        );
        assert_eq!(bare.problem(), None, "a machine without a GPU is in order");
        let broken = GpuState::find(root.path(), &folders, true);
        assert!(broken.problem().unwrap().contains("libcuda.so.1"));

        std::fs::write(root.path().join("b/libcuda.so.1"), b"").unwrap();
        let whole = GpuState::find(root.path(), &folders, true);
        assert_eq!(whole.problem(), None);
        assert_eq!(
            whole.lines()[0].1,
            "libcuda.so.1 found at /b/libcuda.so.1, libnccl.so.2 not found"
        );
    }
}
