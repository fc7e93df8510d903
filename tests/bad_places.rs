//! Places with less room or fewer rights than a store wants: a full tmpfs, a container's memory limit, a read-only mount.
//! The risks: a SIGBUS where pages cannot be had, an out-of-memory kill, an engine that does not start or hangs.
//!
//! Mounts are made in a mount namespace of their own, so nothing is left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kvlane_core::Outcome;
use kvlane_fs::{Medium, inspect};
use kvlane_tests::fixture::eventually;
use kvlane_tests::process::{PeerProcess, not_run};
use kvlane_tests::worker::{Setup, Worker};

const PEER: &str = env!("CARGO_BIN_EXE_kvlane-test-peer");
const PATIENCE: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;

fn folder() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("kvlane-place-")
        .tempdir_in("/dev/shm")
        .expect("a folder")
}

/// Starts a peer in a namespace; `None`, after saying so, where this machine does not allow that.
fn in_namespace(what: &str, prelude: &str, folder: &Path, setup: &Setup) -> Option<(PeerProcess, String)> {
    let prelude = format!("{prelude} && echo mounted &&");
    let mut process = PeerProcess::start_in_namespace(&prelude, PEER, folder, setup);
    if process.line_within(PATIENCE).as_deref() != Some("mounted") {
        not_run(what, &process.warnings());
        return None;
    }
    let opened = process.line();
    Some((process, opened))
}

/// A tmpfs of 8 MiB at `folder`, with `more` done to it.
fn small_tmpfs(folder: &Path, more: &str) -> String {
    format!(
        "mount -t tmpfs -o size=8m none {0} && cd {0} && {more}",
        folder.display()
    )
}

/// Stores more than fits, all of which must end well, and finds the newest.
fn store_a_lot(process: &mut PeerProcess, chains: usize) {
    process.tell(&format!("stream many 6 {chains} 0"));
    let mut done = 0;
    loop {
        let line = process.line();
        if line == "streamed" {
            break;
        }
        assert!(
            line.starts_with("done ") || line.starts_with("missed Dropped"),
            "{line}"
        );
        done += usize::from(line.starts_with("done "));
    }
    assert!(done > 0, "nothing could be stored");
    assert_eq!(process.ask("store newest 6"), "done");
    assert_eq!(process.ask("load newest 6"), "done");
}

#[test]
fn a_tmpfs_smaller_than_the_capacity_is_used_as_far_as_it_goes() {
    let folder = folder();
    for capacity_bytes in [None, Some(64 * MIB)] {
        let setup = Setup {
            capacity_bytes,
            segment_bytes: Some(MIB),
            ..Setup::default()
        };
        let what = "a tmpfs of 8 MiB";
        let Some((mut process, opened)) =
            in_namespace(what, &small_tmpfs(folder.path(), "true"), folder.path(), &setup)
        else {
            return;
        };
        assert_eq!(opened, "open");
        store_a_lot(&mut process, 60);
        if capacity_bytes.is_some() {
            eventually("the message", || {
                process.warnings().contains("the file system is full")
            });
        }
        process.tell("quit");
        assert!(process.ended_well());
    }
}

#[test]
fn a_later_writer_on_a_tmpfs_smaller_than_the_capacity_gets_its_share_from_an_idle_one() {
    let folder = folder();
    let setup = Setup {
        capacity_bytes: Some(64 * MIB),
        segment_bytes: Some(MIB),
        ..Setup::default()
    };
    let what = "a tmpfs of 8 MiB";
    let Some((mut idle, opened)) =
        in_namespace(what, &small_tmpfs(folder.path(), "true"), folder.path(), &setup)
    else {
        return;
    };
    assert_eq!(opened, "open");
    store_a_lot(&mut idle, 60);
    // Into the mount, which only the other process sees.
    let below = folder.path().strip_prefix("/").expect("it is absolute");
    let seen = Path::new(&format!("/proc/{}/root", idle.id())).join(below);
    let late = Worker::open(&seen, &setup).expect("a second writer can open the folder");
    eventually("a block of the later writer", || {
        late.store("late", 6, PATIENCE) == Outcome::Done
    });
    assert_eq!(late.load("late", 6, PATIENCE).missed, Vec::<usize>::new());
    eventually("half of what there is", || {
        late.store("more", 60, PATIENCE);
        let info = inspect::list(&seen).expect("the folder can be listed");
        let shares: Vec<u64> = info.writers.iter().map(|writer| writer.used_bytes).collect();
        shares.len() == 2 && shares.iter().all(|share| (3 * MIB..=5 * MIB).contains(share))
    });
    // The idle one still works with what it has.
    assert_eq!(idle.ask("store new 6"), "done");
    assert_eq!(idle.ask("load new 6"), "done");
    idle.tell("quit");
    assert!(idle.ended_well());
}

#[test]
fn a_segment_larger_than_the_file_system_is_a_clear_message_and_a_miss() {
    let folder = folder();
    let setup = Setup {
        capacity_bytes: Some(64 * MIB),
        segment_bytes: None,
        ..Setup::default()
    };
    let Some((mut process, opened)) = in_namespace(
        "a tmpfs of 8 MiB",
        &small_tmpfs(folder.path(), "true"),
        folder.path(),
        &setup,
    ) else {
        return;
    };
    assert_eq!(opened, "open");
    assert_eq!(process.ask("store chain 4"), "missed Dropped 4");
    eventually("the message", || {
        process.warnings().contains("the file system is full")
    });
    process.tell("quit");
    assert!(process.ended_well());
}

#[test]
fn a_full_tmpfs_is_a_clear_error_at_the_start_and_a_miss_later() {
    let folder = folder();
    let setup = Setup {
        capacity_bytes: Some(4 * MIB),
        ..Setup::default()
    };
    // Not even the control file fits.
    let full = small_tmpfs(folder.path(), "{ cat /dev/zero > filler 2>/dev/null || true; }");
    let Some((_process, opened)) = in_namespace("a full tmpfs", &full, folder.path(), &setup) else {
        return;
    };
    assert!(
        opened.starts_with("refused cannot create") && opened.contains("No space left"),
        "{opened}"
    );
    // The control file fits, and nothing else.
    let full = small_tmpfs(
        folder.path(),
        "{ cat /dev/zero > filler 2>/dev/null || true; } && truncate -s -65536 filler",
    );
    let Some((mut process, opened)) = in_namespace("a full tmpfs", &full, folder.path(), &setup) else {
        return;
    };
    assert_eq!(opened, "open");
    assert_eq!(process.ask("store chain 4"), "missed Dropped 4");
    assert_eq!(process.ask("ready chain 4"), "ready 0 0");
    // What it logs is read by another thread than its answers.
    eventually("the message", || {
        process.warnings().contains("the file system is full")
    });
    process.tell("quit");
    assert!(process.ended_well());
}

#[test]
fn a_reader_that_stood_still_in_a_copy_survives_that_its_segment_is_gone_and_the_tmpfs_full() {
    let folder = folder();
    let setup = Setup {
        capacity_bytes: Some(6 * MIB),
        segment_bytes: Some(MIB),
        medium: Medium::Memory,
        ..Setup::default()
    };
    let what = "a tmpfs of 8 MiB";
    let Some((mut owner, opened)) =
        in_namespace(what, &small_tmpfs(folder.path(), "true"), folder.path(), &setup)
    else {
        return;
    };
    assert_eq!(opened, "open");
    let seen = PathBuf::from(format!("/proc/{}/root{}", owner.id(), folder.path().display()));
    for round in 0..10 {
        for chain in 0..3 {
            owner.ask(&format!("store chain-{round}-{chain} 30"));
        }
        let (mut reader, opened) = PeerProcess::open(PEER, &seen, &setup.reader());
        assert_eq!(opened, "open");
        for number in 0..60 {
            reader.tell(&format!("load chain-{round}-{} 30", number % 3));
        }
        std::thread::sleep(Duration::from_micros(2_000 + 1_700 * round));
        reader.stop();
        // The owner gives half of its segments back, and somebody else fills what is free then.
        let (mut late, opened) = PeerProcess::open(PEER, &seen, &setup);
        assert_eq!(opened, "open");
        for number in 0..20 {
            late.ask(&format!("store late-{round}-{number} 5"));
            std::thread::sleep(Duration::from_millis(20));
        }
        let filler = seen.join("filler");
        let filled = fs::write(&filler, vec![1; 8 * MIB as usize]);
        assert!(filled.is_err(), "there is no room for so much");
        reader.resume();
        for _ in 0..60 {
            let line = reader.line();
            assert!(
                line == "done" || line.starts_with("missed Absent") || line.starts_with("missed Recycled"),
                "{line}"
            );
        }
        reader.tell("quit");
        assert!(reader.ended_well());
        fs::remove_file(&filler).expect("it is ours");
        assert_ne!(owner.ask("stats"), "evicted 0 adopted 0 returned 0 corrupt 0");
        late.kill();
    }
    owner.tell("quit");
    assert!(owner.ended_well());
}

const WITHOUT_EXTENTS: &str = "an ext4 without extents";

/// A file system of 32 MiB that cannot allocate in advance, as ext2 and ext3 were: what mounts it, and where.
fn ext4_without_extents(folder: &Path) -> Option<(String, PathBuf)> {
    let (image, mount) = (folder.join("image"), folder.join("mount"));
    fs::create_dir(&mount).expect("a folder");
    let file = fs::File::create(&image).expect("a file");
    file.set_len(32 * MIB).expect("it can be sparse");
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-O", "^extents,^64bit"])
        .arg(&image)
        .status();
    if !made.as_ref().is_ok_and(std::process::ExitStatus::success) {
        not_run(WITHOUT_EXTENTS, &format!("mkfs.ext4: {made:?}"));
        return None;
    }
    let prelude = format!("mount -o loop {} {}", image.display(), mount.display());
    Some((prelude, mount))
}

#[test]
fn a_file_system_that_cannot_allocate_is_used_by_system_calls_and_refused_for_mappings() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let Some((prelude, mount)) = ext4_without_extents(folder.path()) else {
        return;
    };
    let setup = Setup::default();
    let Some((mut process, opened)) = in_namespace(WITHOUT_EXTENTS, &prelude, &mount, &setup) else {
        return;
    };
    assert_eq!(opened, "open");
    store_a_lot(&mut process, 60);
    process.tell("quit");
    assert!(process.ended_well());
    let mapped = Setup {
        medium: Medium::Memory,
        ..setup
    };
    let below = mount.join("mapped");
    let Some((mut process, opened)) = in_namespace(WITHOUT_EXTENTS, &prelude, &below, &mapped) else {
        return;
    };
    assert_eq!(opened, "open");
    assert_eq!(process.ask("store chain 4"), "missed Dropped 4");
    eventually("the message", || process.warnings().contains("cannot allocate"));
    process.tell("quit");
    assert!(process.ended_well());
}

#[test]
fn where_a_full_file_system_cannot_allocate_blocks_go_where_others_have_been() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let Some((prelude, mount)) = ext4_without_extents(folder.path()) else {
        return;
    };
    let setup = Setup {
        capacity_bytes: Some(16 * MIB),
        segment_bytes: Some(4 * MIB),
        ..Setup::default()
    };
    let Some((mut process, opened)) = in_namespace(WITHOUT_EXTENTS, &prelude, &mount, &setup) else {
        return;
    };
    assert_eq!(opened, "open");
    for chain in 0..8 {
        assert_eq!(process.ask(&format!("store first-{chain} 6")), "done");
    }
    // Into the mount, which only the process sees.
    let below = mount.strip_prefix("/").expect("it is absolute");
    let filler = Path::new(&format!("/proc/{}/root", process.id()))
        .join(below)
        .join("filler");
    let mut file = fs::File::create(filler).expect("a file");
    while std::io::Write::write(&mut file, &[1; 4096]).is_ok() {}
    let stored: Vec<String> = (0..30)
        .map(|chain| process.ask(&format!("store later-{chain} 6")))
        .collect();
    let done = stored.iter().filter(|answer| *answer == "done").count();
    assert!(done >= 28, "the first ones find out, and no others: {stored:?}");
    assert_eq!(process.ask("load later-29 6"), "done");
    process.tell("quit");
    assert!(process.ended_well());
    let said = process.warnings().matches("cannot store a block").count();
    assert_eq!(said, 1, "once for its cause");
}

#[test]
fn a_file_system_that_cannot_hold_segments_is_a_clear_error() {
    let folder = folder();
    let prelude = format!("mount -t ramfs none {}", folder.path().display());
    let Some((_process, opened)) = in_namespace("a ramfs", &prelude, folder.path(), &Setup::default()) else {
        return;
    };
    assert!(
        opened.starts_with("refused the file system of the folder is ramfs")
            && opened.contains("allowed: tmpfs"),
        "{opened}"
    );
}

#[test]
fn what_is_on_a_read_only_mount_can_be_loaded_but_not_stored() {
    let (folder, mount) = (folder(), folder());
    let setup = Setup {
        medium: Medium::Memory,
        ..Setup::default()
    };
    let (from, to) = (folder.path().display(), mount.path().display());
    let read_only = format!("mount --bind {from} {to} && mount -o remount,bind,ro {to}");
    let what = "a read-only mount";
    let Some((_process, opened)) = in_namespace(what, &read_only, mount.path(), &setup.reader()) else {
        return;
    };
    assert!(
        opened.starts_with("refused") && opened.contains("has no store yet"),
        "{opened}"
    );
    let writer = Worker::open(folder.path(), &setup).expect("it is writable here");
    assert_eq!(writer.store("before", 5, PATIENCE), Outcome::Done);
    let Some((_process, opened)) = in_namespace(what, &read_only, mount.path(), &setup) else {
        return;
    };
    assert!(
        opened.starts_with("refused") && opened.contains("not writable"),
        "{opened}"
    );
    let Some((mut reader, opened)) = in_namespace(what, &read_only, mount.path(), &setup.reader()) else {
        return;
    };
    assert_eq!(opened, "open");
    assert_eq!(reader.ask("load before 5"), "done");
    assert_eq!(writer.store("later", 6, PATIENCE), Outcome::Done);
    assert_eq!(reader.ask("ready later 6"), "ready 6 0");
    assert_eq!(reader.ask("load later 6"), "done");
    let reset = reader.ask("reset");
    assert!(reset.starts_with("refused"), "{reset}");
    // Whoever asked for a reset must not be served from before it, even where nobody else can be told.
    assert_eq!(reader.ask("ready before 5"), "ready 0 0");
    assert_eq!(reader.ask("load later 6"), "missed Absent 6");
    // The next reset of a server that can write is the one that it waits for.
    assert_eq!(writer.store("before", 5, PATIENCE), Outcome::Done);
    assert_eq!(reader.ask("ready before 5"), "ready 0 0");
    writer.reset().expect("it can write");
    assert_eq!(reader.ask("ready before 5"), "ready 0 0");
    assert_eq!(writer.store("before", 5, PATIENCE), Outcome::Done);
    assert_eq!(reader.ask("ready before 5"), "ready 5 0");
    assert_eq!(reader.ask("load before 5"), "done");
    let missing = mount.path().join("below");
    let Some((_process, opened)) = in_namespace(what, &read_only, &missing, &setup) else {
        return;
    };
    assert!(
        opened.starts_with("refused cannot create") && opened.contains("Read-only"),
        "{opened}"
    );
}

/// A cgroup with a memory limit, removed when dropped. Processes in it are ended before.
struct Limited {
    path: PathBuf,
    version_two: bool,
}

impl Limited {
    fn new(limit_bytes: u64) -> Result<Self, String> {
        let text = |error: std::io::Error| error.to_string();
        let memberships = fs::read_to_string("/proc/self/cgroup").map_err(text)?;
        let mut v1 = None;
        let mut v2 = None;
        for line in memberships.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            match (fields.next(), fields.next()) {
                (Some(""), Some(path)) => v2 = Some(format!("/sys/fs/cgroup{path}")),
                (Some(names), Some(path)) if names.split(',').any(|name| name == "memory") => {
                    v1 = Some(format!("/sys/fs/cgroup/memory{path}"));
                }
                _ => {}
            }
        }
        let version_two = v1.is_none();
        let parent = PathBuf::from(v1.or(v2).ok_or("there are no cgroups")?);
        let path = parent.join(format!("kvlane-test-{}", std::process::id()));
        fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let limited = Limited { path, version_two };
        let name = if version_two {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        if version_two && !limited.path.join(name).exists() {
            fs::write(parent.join("cgroup.subtree_control"), "+memory").map_err(text)?;
        }
        fs::write(limited.path.join(name), limit_bytes.to_string()).map_err(text)?;
        Ok(limited)
    }

    /// Processes that the kernel killed here.
    fn kills(&self) -> u64 {
        let name = if self.version_two {
            "memory.events"
        } else {
            "memory.oom_control"
        };
        let events = fs::read_to_string(self.path.join(name)).expect("it can be read");
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills
            .expect("the kernel counts them")
            .trim()
            .parse()
            .expect("a number")
    }

    fn start(&self, folder: &Path, setup: &Setup) -> Option<(PeerProcess, String)> {
        let mut command = Command::new("sh");
        let enter = format!(
            "echo $$ > {}/cgroup.procs && echo inside && exec \"$0\" \"$@\"",
            self.path.display()
        );
        command.args(["-c", &enter, PEER]);
        let mut process = PeerProcess::start(command, folder, setup);
        if process.line_within(PATIENCE).as_deref() != Some("inside") {
            not_run("a limited cgroup", &process.warnings());
            return None;
        }
        let opened = process.line();
        Some((process, opened))
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        for _ in 0..200 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("{} is left behind", self.path.display());
    }
}

#[test]
fn a_memory_limit_below_the_capacity_is_respected_instead_of_being_killed() {
    // A tmpfs counts against it whatever way the bytes take.
    for medium in [Medium::Memory, Medium::Disk] {
        respects_a_memory_limit(medium);
    }
}

fn respects_a_memory_limit(medium: Medium) {
    let limited = match Limited::new(176 * MIB) {
        Ok(limited) => limited,
        Err(error) => return not_run("a limited cgroup", &error),
    };
    let folder = folder();
    let setup = Setup {
        medium,
        capacity_bytes: Some(1024 * MIB),
        segment_bytes: Some(16 * MIB),
        block_bytes: 256 << 10,
        ..Setup::default()
    };
    let Some((mut process, opened)) = limited.start(folder.path(), &setup) else {
        return;
    };
    assert_eq!(opened, "open");
    // 300 MiB: more than the limit, less than the capacity.
    store_a_lot(&mut process, 200);
    eventually("the messages", || {
        let warnings = process.warnings();
        warnings.contains("bytes of memory left") && warnings.contains("counts against its memory limit")
    });
    assert_eq!(limited.kills(), 0);
    let used: u64 = fs::read_dir(folder.path())
        .expect("a folder")
        .flatten()
        .filter_map(|file| file.metadata().ok())
        .map(|meta| meta.len())
        .sum();
    assert!((16 * MIB..176 * MIB).contains(&used), "{used} bytes in use");
    process.kill();
    // The memory of the dead one's segments is taken, but they can be adopted.
    let Some((mut process, opened)) = limited.start(folder.path(), &setup) else {
        return;
    };
    assert_eq!(opened, "open");
    assert_eq!(process.ask("load newest 6"), "done");
    assert_eq!(process.ask("store restarted 6"), "done");
    store_a_lot(&mut process, 30);
    assert_eq!(limited.kills(), 0);
    process.tell("quit");
    assert!(process.ended_well());
}
