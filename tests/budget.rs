//! One budget for all writers of a folder. The risks: together they take more than the capacity, one of them keeps
//! everything, space of writers that are gone is lost.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvlane_core::Outcome;
use kvlane_fs::{Medium, inspect};
use kvlane_tests::fixture::eventually;
use kvlane_tests::process::PeerProcess;
use kvlane_tests::worker::{Setup, Worker};

const PEER: &str = env!("CARGO_BIN_EXE_kvlane-test-peer");
const PATIENCE: Duration = Duration::from_secs(10);
/// What docs/segment-format.md allows beside the segments: the control file of two pages.
const CONTROL_BYTES: u64 = 8192;

const MEDIA: [Medium; 2] = [Medium::Memory, Medium::Disk];

fn folder(medium: Medium) -> tempfile::TempDir {
    let parent = match medium {
        Medium::Memory => PathBuf::from("/dev/shm"),
        _ => Path::new(env!("CARGO_TARGET_TMPDIR")).to_path_buf(),
    };
    tempfile::Builder::new()
        .prefix("kvlane-budget-")
        .tempdir_in(parent)
        .expect("a folder")
}

/// Lengths of all files: blocks behind the length are never allocated here.
fn used_bytes(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).expect("the folder is there").flatten();
    files
        .filter_map(|file| file.metadata().ok())
        .map(|meta| meta.len())
        .sum()
}

/// Bytes of the segments of each living writer, by their own account.
fn shares(folder: &Path) -> Vec<u64> {
    let info = inspect::list(folder).expect("the folder can be listed");
    info.writers.iter().map(|writer| writer.used_bytes).collect()
}

fn segments(folder: &Path) -> Vec<inspect::SegmentInfo> {
    inspect::list(folder).expect("the folder can be listed").segments
}

/// Stores until it works: a writer that has just come has to wait until others have given back.
fn store_patiently(writer: &Worker, salt: &str, count: usize) {
    eventually("a store", || writer.store(salt, count, PATIENCE) == Outcome::Done);
}

#[test]
fn four_busy_writers_never_exceed_the_capacity_and_each_gets_its_share() {
    for medium in MEDIA {
        let folder = folder(medium);
        let capacity = 16 << 20;
        let setup = Setup {
            medium,
            capacity_bytes: Some(capacity),
            ..Setup::default()
        };
        // The first one has everything before the others come.
        let mut writers = Vec::new();
        for number in 0..4 {
            let (mut writer, opened) = PeerProcess::open(PEER, folder.path(), &setup);
            assert_eq!(opened, "open");
            writer.tell(&format!("stream writer{number} 4 1000000 500"));
            writers.push(writer);
            if number == 0 {
                eventually("one writer has all", || {
                    used_bytes(folder.path()) > capacity - (2 << 20)
                });
            }
        }
        let end = Instant::now() + Duration::from_secs(30);
        let share = capacity / 4;
        let mut settled = None;
        while settled.is_none_or(|at: Instant| at.elapsed() < Duration::from_millis(500)) {
            assert!(
                Instant::now() < end,
                "after 30 s the shares are {:?}",
                shares(folder.path())
            );
            let used = used_bytes(folder.path());
            assert!(used <= capacity + CONTROL_BYTES, "{used} bytes in use");
            let fair = |bytes: &u64| (share - (1 << 20)..=share + (1 << 20)).contains(bytes);
            let shares = shares(folder.path());
            if shares.len() == 4 && shares.iter().all(fair) {
                settled = settled.or_else(|| Some(Instant::now()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        for writer in &mut writers {
            let stored = writer.rest();
            assert!(stored.iter().any(|line| line.starts_with("done")), "{stored:?}");
            let wrong = stored
                .iter()
                .find(|line| !line.starts_with("done") && !line.starts_with("missed Dropped"));
            assert_eq!(wrong, None);
        }
    }
}

#[test]
fn a_later_writer_is_not_starved_by_an_idle_one() {
    for medium in MEDIA {
        let setup = Setup {
            medium,
            capacity_bytes: Some(8 << 20),
            ..Setup::default()
        };
        let folder = folder(setup.medium);
        let (mut idle, opened) = PeerProcess::open(PEER, folder.path(), &setup);
        assert_eq!(opened, "open");
        assert_eq!(idle.ask("store old-0 30"), "done");
        assert_eq!(idle.ask("store old-1 60"), "done");
        assert_eq!(idle.ask("store old-2 30"), "done");
        assert!(used_bytes(folder.path()) > 7 << 20);
        let late = Worker::open(folder.path(), &setup).expect("a second writer can open the folder");
        store_patiently(&late, "late-0", 10);
        eventually("half of the folder", || {
            let mut chain = 1;
            while late.store(&format!("late-{chain}"), 10, PATIENCE) == Outcome::Done && chain < 5 {
                chain += 1;
            }
            let shares = shares(folder.path());
            shares.len() == 2 && shares.iter().all(|share| (3 << 20..=5 << 20).contains(share))
        });
        assert!(late.load("late-0", 10, PATIENCE).missed.is_empty() || late.stats().evicted_blocks > 0);
        assert!(used_bytes(folder.path()) <= (8 << 20) + CONTROL_BYTES);
        // The idle one still works with what it has, and what it has is right.
        assert_eq!(idle.ask("store new 10"), "done");
        assert_eq!(idle.ask("load new 10"), "done");
    }
}

#[test]
fn space_of_another_models_dead_writer_is_used_when_it_is_needed() {
    for medium in MEDIA {
        let setup = Setup {
            medium,
            ..Setup::default()
        };
        let other = Setup {
            block_bytes: 24 << 10,
            layers: 3,
            ..setup.clone()
        };
        let folder = folder(medium);
        let (mut dead, opened) = PeerProcess::open(PEER, folder.path(), &other);
        assert_eq!(opened, "open");
        for chain in 0..3 {
            assert_eq!(dead.ask(&format!("store other-{chain} 50")), "done");
        }
        dead.kill();
        assert!(segments(folder.path()).len() >= 4 && used_bytes(folder.path()) > 3 << 20);
        let writer = Worker::open(folder.path(), &setup).expect("another model can use the folder");
        // Needed little by little: what is not in the way stays.
        assert_eq!(writer.store("first", 4, PATIENCE), Outcome::Done);
        let left = |wanted: u32| {
            segments(folder.path())
                .iter()
                .filter(|found| found.layers == wanted)
                .count()
        };
        assert!((1..=3).contains(&left(3)), "{} are left", left(3));
        assert_eq!(writer.store("second", 50, PATIENCE), Outcome::Done);
        assert_eq!(left(3), 0);
        assert_eq!(writer.load("first", 4, PATIENCE).missed, Vec::<usize>::new());
        assert_eq!(writer.load("second", 50, PATIENCE).missed, Vec::<usize>::new());
        assert!(used_bytes(folder.path()) <= (4 << 20) + CONTROL_BYTES);
    }
}

#[test]
fn a_restarted_writer_takes_over_its_segments_and_their_blocks_are_found() {
    for medium in MEDIA {
        let setup = Setup {
            medium,
            ..Setup::default()
        };
        let folder = folder(medium);
        let (mut before, opened) = PeerProcess::open(PEER, folder.path(), &setup);
        assert_eq!(opened, "open");
        for chain in 0..5 {
            assert_eq!(before.ask(&format!("store before-{chain} 10")), "done");
        }
        before.kill();
        let reader = Worker::open(folder.path(), &setup.reader()).expect("a reader can open the folder");
        let all_found =
            || (0..5).all(|chain| reader.lookup(&format!("before-{chain}"), 10).ready_blocks == 10);
        assert!(all_found(), "blocks of a dead writer are served");
        let after = Worker::open(folder.path(), &setup).expect("a writer can open the folder");
        assert_eq!(after.store("before-0", 10, PATIENCE), Outcome::Done);
        assert_eq!(after.stats().present_blocks, 10, "it is there already");
        // There is room for the rest of four segments of 15 slots, and nothing has to go for it.
        assert_eq!(after.store("after", 10, PATIENCE), Outcome::Done);
        let stats = after.stats();
        assert!(stats.adopted_segments >= 1, "{stats:?}");
        assert_eq!(stats.evicted_blocks, 0);
        assert!(all_found());
        for chain in 0..5 {
            assert_eq!(
                reader.load(&format!("before-{chain}"), 10, PATIENCE).missed,
                Vec::<usize>::new()
            );
        }
    }
}

#[test]
fn more_writers_than_segments_of_the_usual_size_all_get_something() {
    let setup = Setup {
        medium: Medium::Memory,
        ..Setup::default()
    };
    let folder = folder(setup.medium);
    let writers: Vec<Worker> = (0..8)
        .map(|_| Worker::open(folder.path(), &setup).expect("eight writers can open the folder"))
        .collect();
    for round in 0..2 {
        for (number, writer) in writers.iter().enumerate() {
            store_patiently(writer, &format!("writer{number}-{round}"), 2);
        }
    }
    eventually("a segment for each", || {
        let shares = shares(folder.path());
        shares.len() == 8 && shares.iter().all(|&share| share > 0)
    });
    assert!(used_bytes(folder.path()) <= (4 << 20) + CONTROL_BYTES);
}
