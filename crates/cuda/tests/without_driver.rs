//! What happens where no usable CUDA driver is. The risk: a loader that panics inside of the engine.

use std::path::Path;
use std::process::Command;

use kvlane_cuda::{CudaError, probe};

/// Not a test of its own: what the others run in a process with another search path.
#[test]
#[ignore = "run by the other tests in a process of its own"]
fn child() {
    match probe() {
        Ok(info) => println!("answer: {info:?}"),
        Err(CudaError::LibraryMissing { tried }) => println!("answer: missing {}", tried.len()),
        Err(CudaError::SymbolMissing { library, symbol, .. }) => println!("answer: {library} lacks {symbol}"),
        Err(other) => println!("answer: {other}"),
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

#[test]
fn without_a_driver_probing_is_an_error_and_no_panic() {
    if let Ok(info) = probe() {
        eprintln!("NOT RUN: this machine has the driver {info:?}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(answer(folder.path()), "missing 2");
}

#[test]
fn an_empty_library_of_that_name_is_an_error_and_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("empty.c");
    std::fs::write(&source, "int kvlane_nothing;\n").unwrap();
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(folder.path().join("libcuda.so.1"))
        .arg(&source)
        .status();
    if !compiled.is_ok_and(|status| status.success()) {
        eprintln!("NOT RUN: no C compiler to make an empty library");
        return;
    }
    assert_eq!(answer(folder.path()), "libcuda.so.1 lacks cuInit");
}

#[test]
fn a_file_that_is_no_library_is_an_error_and_no_panic() {
    if probe().is_ok() {
        eprintln!("NOT RUN: this machine has a driver, which the loader would find next");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("libcuda.so.1"), "not a library").unwrap();
    assert_eq!(answer(folder.path()), "missing 2");
}
