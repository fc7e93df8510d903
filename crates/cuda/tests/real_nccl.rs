//! The NCCL that PyTorch brings, as far as it works without a GPU. The risk: functions are asked for that it does not have, or
//! its version is read wrong, and only a machine with a GPU would tell.

use std::path::{Path, PathBuf};
use std::process::Command;

use kvlane_cuda::{CommunicatorId, NcclInfo};

/// Where environments of Python are looked for, in place of the workspace.
const VARIABLE: &str = "KVLANE_TEST_ENVIRONMENTS";

/// Not a test of its own: what the others run in a process with another search path.
#[test]
#[ignore = "run by the other tests in a process of its own"]
fn child() {
    match NcclInfo::find() {
        Ok(nccl) => {
            let id = CommunicatorId::new().expect("an id needs no GPU");
            let other = CommunicatorId::new().expect("an id needs no GPU");
            assert!(id != other);
            println!("answer: {} of {}", nccl.version, nccl.library);
        }
        Err(error) => println!("answer: {error}"),
    }
}

fn answer(library_path: &Path) -> String {
    let program = std::env::current_exe().expect("a test program has a path");
    let output = Command::new(program)
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .env("LD_LIBRARY_PATH", library_path)
        .output()
        .expect("a process can be started");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let line = text.lines().find_map(|line| line.split_once("answer: "));
    line.unwrap_or_else(|| panic!("no answer in {text}")).1.to_owned()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let listed = std::fs::read_dir(folder).into_iter().flatten();
    listed.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

/// Folders with an NCCL, and the version that its package says.
fn installed() -> Vec<(PathBuf, String)> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let root = std::env::var_os(VARIABLE).map_or(workspace, PathBuf::from);
    let mut found = Vec::new();
    for environment in entries(&root) {
        for python in entries(&environment.join("lib")) {
            let packages = python.join("site-packages");
            let folder = packages.join("nvidia/nccl/lib");
            let version = entries(&packages).into_iter().find_map(|package| {
                let name = package.file_name()?.to_str()?;
                let name = name.strip_prefix("nvidia_nccl_cu")?.strip_suffix(".dist-info")?;
                Some(name.split_once('-')?.1.to_owned())
            });
            if let Some(version) = version.filter(|_| folder.join("libnccl.so.2").exists()) {
                found.push((folder, version));
            }
        }
    }
    found
}

#[test]
fn the_library_of_each_environment_has_what_is_called_and_says_the_version_of_its_package() {
    let installed = installed();
    if installed.is_empty() {
        eprintln!("NOT RUN: real NCCL: no environment with PyTorch's package of it (make builds .venv)");
        return;
    }
    for (folder, version) in installed {
        assert_eq!(
            answer(&folder),
            format!("{version} of libnccl.so.2"),
            "{}",
            folder.display()
        );
    }
}

#[test]
fn without_nccl_there_is_an_error_that_says_where_it_was_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let told = answer(folder.path());
    if told.contains(" of libnccl.so.2") {
        eprintln!("NOT RUN: without NCCL: this machine has one in its search path");
        return;
    }
    assert!(
        told.starts_with("NCCL is not installed or not found; looked for"),
        "{told}"
    );
    // A file of that name that is no library.
    std::fs::write(folder.path().join("libnccl.so.2"), b"no library").unwrap();
    let told = answer(folder.path());
    assert!(told.contains("libnccl.so.2 ("), "{told}");
}
