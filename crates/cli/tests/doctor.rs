//! Guards: a doctor that calls a machine healthy on which nothing can work, or that needs vLLM to say anything.

#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use support::{Store, json, kvlane, text};

/// The problems about the folder: those about this machine's GPU and memory are not this test's.
fn problems(path: &Path) -> Vec<String> {
    let output = kvlane(&["doctor", "--json"], Some(path), &[]);
    let report = json(&output);
    let all = report["problems"].as_array().unwrap().clone();
    assert_eq!(output.status.code(), Some(i32::from(!all.is_empty())), "{report}");
    let problems = all.iter().map(|problem| problem.as_str().unwrap().to_owned());
    problems.filter(|problem| !problem.contains("GPU")).collect()
}

#[test]
fn a_sound_store_is_described_and_has_no_problem() {
    let store = Store::new();
    let report = json(&kvlane(&["doctor", "--json"], Some(store.shared.path()), &[]));
    assert_eq!(report["kvlane_version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(
        report["python"],
        serde_json::Value::Null,
        "the cargo binary has no Python"
    );
    assert_eq!(report["folder"]["path"], store.folder().to_str().unwrap());
    assert_eq!(report["folder"]["store"]["capacity_bytes"], 16 << 20);
    assert_eq!(report["folder"]["store"]["live_writers"], 1);
    let place = &report["folder"]["place"];
    assert_eq!(
        (&place["writable"], &place["unfit"]),
        (&true.into(), &serde_json::Value::Null)
    );
    assert!(["memory", "disk", "network"].contains(&place["medium"].as_str().unwrap()));
    assert!(
        report["memory"]
            .as_object()
            .unwrap()
            .contains_key("headroom_bytes")
    );
    let libraries = report["gpu"]["libraries"].as_array().unwrap();
    let names: Vec<&str> = libraries
        .iter()
        .map(|library| library["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["libcuda.so.1", "libnccl.so.2"]);
    assert_eq!(report["environment"], serde_json::json!({}));
    assert_eq!(problems(store.shared.path()), Vec::<String>::new());

    let shown = text(&kvlane(&["doctor"], Some(store.shared.path()), &[]).stdout);
    assert!(
        shown.contains("libcuda.so.1") && shown.contains(", because "),
        "{shown}"
    );
}

#[test]
fn a_folder_without_a_store_yet_is_no_problem_and_stays_empty() {
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(problems(empty.path()), Vec::<String>::new());
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0);
    let shown = text(&kvlane(&["doctor"], Some(empty.path()), &[]).stdout);
    assert!(shown.contains("none yet"), "{shown}");
    let shown = text(&kvlane(&["doctor"], None, &[]).stdout);
    assert!(shown.contains("not checked"), "{shown}");
}

#[test]
fn a_missing_folder_is_a_problem_with_a_remedy() {
    let empty = tempfile::tempdir().unwrap();
    let problems = problems(&empty.path().join("missing"));
    assert_eq!(problems.len(), 1);
    assert!(
        problems[0].contains("correct shared_storage_path"),
        "{problems:?}"
    );
}

#[test]
fn a_folder_that_others_may_write_is_a_problem() {
    let store = Store::new();
    std::fs::set_permissions(store.folder(), PermissionsExt::from_mode(0o777)).unwrap();
    let problems = problems(store.shared.path());
    assert_eq!(problems.len(), 1);
    assert!(problems[0].contains("chmod 700"), "{problems:?}");
}

#[test]
fn a_capacity_beyond_the_volume_is_a_problem() {
    let shared = tempfile::tempdir().unwrap();
    let folder = shared.path().join("kvlane");
    std::fs::create_dir(&folder).unwrap();
    std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o700)).unwrap();
    write_control(&folder, &kvlane_fs::format::encode_control(1 << 60));
    let found = problems(shared.path());
    assert!(found[0].contains("smaller capacity_bytes"), "{found:?}");

    let mut foreign = kvlane_fs::format::encode_control(1 << 60);
    foreign[0] ^= 1;
    write_control(&folder, &foreign);
    let found = problems(shared.path());
    assert!(
        found.len() == 1 && found[0].starts_with("The store cannot be used"),
        "{found:?}"
    );
}

#[test]
fn a_store_that_cannot_be_used_is_not_taken_for_none_yet() {
    let shared = tempfile::tempdir().unwrap();
    let folder = shared.path().join("kvlane");
    std::fs::create_dir(&folder).unwrap();
    std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o700)).unwrap();
    let control = folder.join("control");
    let pipe = || {
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &control, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    };
    let zeroes = || write_control(&folder, &[0; 8192]);
    let dangling = || std::os::unix::fs::symlink("nowhere", &control).unwrap();
    for (what, make) in [
        ("a pipe", &pipe as &dyn Fn()),
        ("zeroes", &zeroes),
        ("a link to nothing", &dangling),
    ] {
        make();
        let found = problems(shared.path());
        assert!(
            found.len() == 1 && found[0].starts_with("The store cannot be used"),
            "{what}: {found:?}"
        );
        let shown = text(&kvlane(&["doctor"], Some(shared.path()), &[]).stdout);
        assert!(
            shown.contains("\nstore     not usable\n") && !shown.contains("none yet"),
            "{what}: {shown}"
        );
        let report = json(&kvlane(&["doctor", "--json"], Some(shared.path()), &[]));
        assert!(report["folder"]["store_refused"].is_string(), "{what}: {report}");
        std::fs::remove_file(&control).unwrap();
    }
}

#[test]
fn rubbish_in_a_store_is_a_problem() {
    let store = Store::new();
    std::fs::write(store.folder().join("seg-00000000000000ff.kvlane"), b"short").unwrap();
    let problems = problems(store.shared.path());
    assert_eq!(problems.len(), 1);
    assert!(
        problems[0].starts_with("1 files in the store are not usable"),
        "{problems:?}"
    );
}

fn write_control(folder: &Path, bytes: &[u8]) {
    std::fs::write(folder.join("control"), bytes).unwrap();
}
