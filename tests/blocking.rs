//! Nothing blocks an engine: neither a writer that is stopped, nor one that stands still while it has the budget's lock,
//! nor a file system that does not accept writes. The risk: an engine's step waits for somebody who does not come.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use kvlane_core::{MissReason, Outcome};
use kvlane_fs::Medium;
use kvlane_fs::raw::OfdLock;
use kvlane_tests::fixture::eventually;
use kvlane_tests::process::{PeerProcess, not_run};
use kvlane_tests::timing::{attempts, within};
use kvlane_tests::worker::{Setup, Worker};

const PEER: &str = env!("CARGO_BIN_EXE_kvlane-test-peer");
const PATIENCE: Duration = Duration::from_secs(10);
/// A call that does not wait takes microseconds. More than this in each attempt is no matter of a busy machine.
const AT_ONCE: Duration = Duration::from_secs(1);

fn folder() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("kvlane-blocking-")
        .tempdir_in("/dev/shm")
        .expect("a folder")
}

fn memory() -> Setup {
    Setup {
        medium: Medium::Memory,
        ..Setup::default()
    }
}

#[test]
fn readers_do_not_wait_for_a_stopped_writer_beyond_its_promise() {
    within(AT_ONCE, || {
        let folder = folder();
        let (mut writer, opened) = PeerProcess::open(PEER, folder.path(), &memory());
        assert_eq!(opened, "open");
        assert_eq!(writer.ask("store whole 5"), "done");
        let reader = Worker::open(folder.path(), &memory().reader()).expect("a reader can open the folder");
        // On a busy machine the first promise may be over before anybody looks.
        let (promised, promise_ends) = [700, 5000]
            .into_iter()
            .find_map(|lasts_ms| {
                let salt = format!("promised-{lasts_ms}");
                assert_eq!(writer.ask(&format!("reserve {salt} 6 {lasts_ms}")), "reserved");
                let ends = Instant::now() + Duration::from_millis(lasts_ms);
                while reader.lookup(&salt, 6).pending_blocks < 6 {
                    if Instant::now() >= ends {
                        return None;
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                Some((salt, ends))
            })
            .expect("the promise is seen");
        assert_eq!(writer.ask("begin begun 4 60000"), "begun");
        writer.stop();
        let stopped = Instant::now();
        assert_eq!(
            reader.load("whole", 5, PATIENCE).missed,
            Vec::<usize>::new(),
            "what is there can be had"
        );
        let until = (stopped + Duration::from_millis(1500)).max(promise_ends + Duration::from_millis(300));
        while Instant::now() < until {
            reader.lookup(&promised, 6);
            assert_eq!(reader.load(&promised, 6, PATIENCE).missed.len(), 6);
            assert_eq!(reader.load("begun", 4, PATIENCE).missed.len(), 4);
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(
            reader.lookup(&promised, 6).pending_blocks,
            0,
            "a promise outlived its deadline"
        );
        // Another writer is not held up either.
        let other = Worker::open(folder.path(), &memory()).expect("a second writer can open the folder");
        eventually("a store", || other.store("other", 4, PATIENCE) == Outcome::Done);
        assert_eq!(reader.load("other", 4, PATIENCE).missed, Vec::<usize>::new());
        let slowest = reader.slowest().max(other.slowest());
        writer.resume();
        assert_eq!(writer.ask("store later 4"), "done");
        slowest
    });
}

#[test]
fn a_writer_that_stands_still_with_the_budgets_lock_stops_nobody() {
    attempts(|| {
        let folder = folder();
        let worker = Worker::open(folder.path(), &memory()).expect("a writer can open the folder");
        assert_eq!(worker.store("first", 4, PATIENCE), Outcome::Done);
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open(folder.path().join("control"))
            .expect("it is there");
        eventually("the lock", || {
            OfdLock::byte(0).try_lock(&control).expect("locks work here")
        });
        // More than its one segment has: what needs another one is dropped or recycled, and ends.
        let mut longest = Duration::ZERO;
        for chain in 0..4 {
            let started = Instant::now();
            let outcome = worker.store(&format!("chain-{chain}"), 10, PATIENCE);
            longest = longest.max(started.elapsed());
            assert!(
                matches!(
                    outcome,
                    Outcome::Done
                        | Outcome::Miss {
                            reason: MissReason::Dropped,
                            ..
                        }
                ),
                "{outcome:?}"
            );
        }
        let late = Worker::open(folder.path(), &memory()).expect("opening needs no budget");
        assert!(matches!(
            late.store("late", 4, PATIENCE),
            Outcome::Miss {
                reason: MissReason::Dropped,
                ..
            }
        ));
        let slowest = worker.slowest().max(late.slowest());
        OfdLock::byte(0).unlock(&control).expect("it is ours");
        eventually("a store", || late.store("late", 4, PATIENCE) == Outcome::Done);
        assert_eq!(late.load("late", 4, PATIENCE).missed, Vec::<usize>::new());
        if longest < Duration::from_secs(3) && slowest < AT_ONCE {
            Ok(())
        } else {
            Err(format!("a store took {longest:?}, a call {slowest:?}"))
        }
    });
}

/// A file system that is frozen until this is dropped.
struct Frozen(PathBuf);

impl Frozen {
    fn new(mount: &Path) -> Result<Self, String> {
        run(Command::new("fsfreeze").arg("-f").arg(mount)).map(|()| Frozen(mount.to_owned()))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("fsfreeze").arg("-u").arg(&self.0)) {
            eprintln!("{} stays frozen: {error}", self.0.display());
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Err(format!("{command:?}: {error}")),
    }
}

/// A process whose folder is on an ext4 of its own, in a file; with the way to that folder from here.
fn on_ext4(folder: &Path, setup: &Setup) -> Result<(PeerProcess, PathBuf), String> {
    let (image, mount) = (folder.join("image"), folder.join("mount"));
    std::fs::create_dir(&mount).map_err(|error| error.to_string())?;
    let file = std::fs::File::create(&image).map_err(|error| error.to_string())?;
    file.set_len(64 << 20).map_err(|error| error.to_string())?;
    run(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
    let prelude = format!(
        "mount -o loop {} {} && echo mounted &&",
        image.display(),
        mount.display()
    );
    let mut process = PeerProcess::start_in_namespace(&prelude, PEER, &mount, setup);
    if process.line_within(PATIENCE).as_deref() != Some("mounted") {
        return Err(format!("cannot mount an image: {}", process.warnings()));
    }
    let opened = process.line();
    assert_eq!(opened, "open");
    let seen_from_here = PathBuf::from(format!("/proc/{}/root{}", process.id(), mount.display()));
    Ok((process, seen_from_here))
}

/// The longest call since the last question.
fn slowest(process: &mut PeerProcess) -> Duration {
    Duration::from_millis(process.ask("slowest").parse().expect("a number"))
}

/// What took too long, or why this cannot be tried.
fn frozen_file_system(setup: &Setup) -> Result<Vec<String>, String> {
    let mut late = Vec::new();
    let mut check = |what: &str, took: Duration, limit: Duration| {
        if took >= limit {
            late.push(format!("{what}: {took:?}, allowed: {limit:?}"));
        }
    };
    let folder = tempfile::Builder::new()
        .prefix("kvlane-frozen-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .map_err(|error| error.to_string())?;
    let (mut process, mount) = on_ext4(folder.path(), setup)?;
    for chain in ["before", "other"] {
        assert_eq!(process.ask(&format!("store {chain} 8")), "done");
    }
    // A load of everything, so that it is resident.
    assert_eq!(process.ask("load before 8"), "done");
    slowest(&mut process);
    let frozen = Frozen::new(&mount)?;
    let started = Instant::now();
    for round in 0..3 {
        assert_eq!(
            process.ask(&format!("store frozen-{round} 8 400")),
            "missed TimedOut 8"
        );
        assert_eq!(
            process.ask(&format!("reserve promised-{round} 8 60000")),
            "reserved"
        );
        assert_eq!(
            process.ask("load before 8"),
            "done",
            "what is resident can be had"
        );
        assert_eq!(process.ask("load other 8"), "done", "what is resident can be had");
        assert_eq!(process.ask("ready before 8"), "ready 8 0");
        assert_eq!(process.ask("load absent 8"), "missed Absent 8");
    }
    if setup.medium == Medium::Disk {
        // There it would hold a lock that, before Linux 6.7, is that of the whole address space.
        let threads = process.threads();
        assert!(
            !threads.contains("page_mkwrite"),
            "a thread stands still in a page fault:\n{threads}"
        );
    }
    check("a call that must not wait", slowest(&mut process), AT_ONCE);
    check(
        "what is done while it is frozen",
        started.elapsed(),
        Duration::from_secs(15),
    );
    let reset = process.ask("reset");
    assert!(reset.starts_with("refused"), "{reset}: nobody else can be told");
    check("a reset", slowest(&mut process), Duration::from_secs(3));
    // Whoever asked for a reset must not be served from before it.
    assert_eq!(process.ask("ready before 8"), "ready 0 0");
    drop(frozen);
    eventually("a store after the thaw", || {
        process.ask("store after 8 5000") == "done"
    });
    assert_eq!(process.ask("load after 8"), "done");
    assert_eq!(
        process.ask("ready before 8"),
        "ready 0 0",
        "the reset was made up for"
    );
    let frozen = Frozen::new(&mount)?;
    assert_eq!(process.ask("store again 4 100"), "missed TimedOut 4");
    assert_eq!(process.ask("close"), "closed");
    check("closing", slowest(&mut process), Duration::from_secs(5));
    drop(frozen);
    process.tell("quit");
    assert!(process.ended_well(), "nothing hangs after the thaw");
    Ok(late)
}

#[test]
fn an_engine_goes_on_while_the_file_system_is_frozen_and_stores_again_after_it() {
    let disk = Setup {
        medium: Medium::Disk,
        capacity_bytes: Some(8 << 20),
        ..Setup::default()
    };
    let mapped = Setup {
        medium: Medium::Memory,
        ..disk.clone()
    };
    for setup in [disk, mapped] {
        let (mut obstacle, mut was_late) = (None, false);
        attempts(|| match frozen_file_system(&setup) {
            Ok(late) if late.is_empty() => Ok(()),
            Ok(late) => {
                was_late = true;
                Err(late.join("; "))
            }
            // What was measured once can be measured here.
            Err(error) if was_late => Err(error.to_string()),
            Err(error) => {
                obstacle = Some(error);
                Ok(())
            }
        });
        if let Some(error) = obstacle {
            not_run("a frozen ext4", &error);
            return;
        }
    }
}
