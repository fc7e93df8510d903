//! Folders as they should not be: damaged, truncated, foreign, linked, full, read-only, missing, of another version or
//! another layout. The risks: a panic, a SIGBUS, wrong bytes, or a file destroyed that was somebody's.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvlane_core::{MissReason, Outcome};
use kvlane_fs::format::{self, SEGMENT_HEADER_BYTES, SegmentHeader, structure_crc};
use kvlane_fs::{FsOptions, FsReader, LookupCursor, Medium, inspect};
use kvlane_tests::fixture;
use kvlane_tests::process::PeerProcess;
use kvlane_tests::worker::{Setup, Worker};

const PEER: &str = env!("CARGO_BIN_EXE_kvlane-test-peer");
const PATIENCE: Duration = Duration::from_secs(10);
const MEDIA: [Medium; 2] = [Medium::Memory, Medium::Disk];

fn folder(medium: Medium) -> tempfile::TempDir {
    let parent = match medium {
        Medium::Memory => PathBuf::from("/dev/shm"),
        _ => Path::new(env!("CARGO_TARGET_TMPDIR")).to_path_buf(),
    };
    tempfile::Builder::new()
        .prefix("kvlane-bad-")
        .tempdir_in(parent)
        .expect("a folder")
}

/// Small segments, so that many folders are quick: four of them, with seven slots each.
fn setup(medium: Medium) -> Setup {
    Setup {
        medium,
        block_bytes: 8 << 10,
        layers: 2,
        capacity_bytes: Some(1 << 20),
        segment_bytes: Some(80 << 10),
        ..Setup::default()
    }
}

/// A folder with the chain "old" of five blocks in one segment, whose writer is gone.
struct Old {
    folder: tempfile::TempDir,
    setup: Setup,
    segment: PathBuf,
    header: SegmentHeader,
    bytes: Vec<u8>,
}

const OLD_BLOCKS: usize = 5;

impl Old {
    fn new(medium: Medium) -> Self {
        let (folder, setup) = (folder(medium), setup(medium));
        let writer = Worker::open(folder.path(), &setup).expect("a writer can open the folder");
        assert_eq!(writer.store("old", OLD_BLOCKS, PATIENCE), Outcome::Done);
        drop(writer);
        let segment = segments(folder.path()).pop().expect("there is one");
        let bytes = fs::read(&segment).expect("it can be read");
        let header = format::parse_segment_header(&bytes).expect("it is whole");
        Old {
            folder,
            setup,
            segment,
            header,
            bytes,
        }
    }

    fn write(&self, bytes: &[u8]) {
        fs::write(&self.segment, bytes).expect("it can be written");
    }

    fn flip(&self, offset: usize) {
        let file = OpenOptions::new()
            .write(true)
            .open(&self.segment)
            .expect("it can be opened");
        file.write_all_at(&[self.bytes[offset] ^ 0x15], offset as u64)
            .expect("it can be written");
    }

    /// What a reader and a new writer make of the segment as it is now; answers how many old blocks there are. The
    /// folder is as before afterwards.
    fn look(&self, what: &str) -> usize {
        let before = fs::read(&self.segment).expect("it can be read");
        let reader = Worker::open(self.folder.path(), &self.setup.reader()).expect("the folder is all right");
        let missed = reader.load("old", OLD_BLOCKS, PATIENCE).missed.len();
        let ready = reader.lookup("old", OLD_BLOCKS).ready_blocks;
        assert!(
            ready <= OLD_BLOCKS - missed,
            "{what}: {ready} ready, {missed} missed"
        );
        let writer = Worker::open(self.folder.path(), &self.setup).expect("the folder is all right");
        assert_eq!(writer.store("new", 6, PATIENCE), Outcome::Done, "{what}");
        assert_eq!(
            reader.load("new", 6, PATIENCE).missed,
            Vec::<usize>::new(),
            "{what}"
        );
        drop((reader, writer));
        let is_new = |path: &PathBuf| *path != self.segment;
        segments(self.folder.path())
            .into_iter()
            .filter(is_new)
            .for_each(|path| fs::remove_file(path).expect("ours"));
        let marks = self.header.marks_offset() as usize..self.header.sequences_offset() as usize;
        let mut after = fs::read(&self.segment).expect("it is still there");
        if before.len() >= marks.end {
            after[marks.clone()].copy_from_slice(&before[marks]);
        }
        assert!(
            after == before,
            "{what}: the file was changed though there was room beside it"
        );
        OLD_BLOCKS - missed
    }
}

fn segments(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder)
        .expect("the folder is there")
        .flatten()
        .map(|file| file.path());
    let mut segments: Vec<PathBuf> = files
        .filter(|path| path.extension().is_some_and(|it| it == "kvlane"))
        .collect();
    segments.sort();
    segments
}

fn segment_path(folder: &Path, id: u64) -> PathBuf {
    folder.join(format!("seg-{id:016x}.kvlane"))
}

#[test]
fn a_segment_with_any_byte_of_its_header_flipped_is_left_alone_and_nothing_else_is_lost() {
    for medium in MEDIA {
        let old = Old::new(medium);
        assert_eq!(old.look("as it was"), OLD_BLOCKS);
        for offset in 0..SEGMENT_HEADER_BYTES {
            old.flip(offset);
            assert_eq!(old.look(&format!("header byte {offset}")), 0);
            old.write(&old.bytes);
        }
        for offset in [SEGMENT_HEADER_BYTES, 2000, 4095] {
            old.flip(offset);
            assert_eq!(old.look(&format!("padding byte {offset}")), OLD_BLOCKS);
            old.write(&old.bytes);
        }
    }
}

#[test]
fn a_flipped_byte_behind_the_header_costs_at_most_the_block_that_it_belongs_to() {
    for medium in MEDIA {
        let old = Old::new(medium);
        let header = &old.header;
        let table = |name, from: u64, to: u64, step| (name, from as usize, to as usize, step);
        let record = header.record_offset(1);
        let tables = [
            table(
                "layer table",
                header.layers_offset(),
                header.layers_offset() + 16,
                3,
            ),
            table(
                "counters",
                header.counters_offset(),
                header.counters_offset() + 16,
                1,
            ),
            table("marks", header.mark_offset(0), header.mark_offset(3), 1),
            table(
                "sequences",
                header.sequence_offset(0),
                header.sequence_offset(2),
                1,
            ),
            table("record", record, record + 128 + 8, 2),
            table("payload", header.slot_offset(2), header.slot_offset(3), 1001),
        ];
        for (name, from, to, step) in tables {
            for offset in (from..to).step_by(step) {
                old.flip(offset);
                let found = old.look(&format!("{name}, byte {}", offset - from));
                assert!(
                    found >= OLD_BLOCKS - 1,
                    "{name}, byte {}: {found} blocks are left",
                    offset - from
                );
                old.write(&old.bytes);
            }
        }
        old.flip(header.slot_offset(2) as usize + 77);
        let reader = Worker::open(old.folder.path(), &old.setup.reader()).expect("the folder is all right");
        let loaded = reader.load("old", OLD_BLOCKS, PATIENCE);
        assert_eq!(
            (loaded.missed.len(), loaded.reason),
            (1, Some(MissReason::Corrupt))
        );
        let report = inspect::verify(old.folder.path(), &mut |_, _| {}).expect("it can be verified");
        assert_eq!((report.bad_blocks.len(), report.good_blocks), (1, 4));
    }
}

#[test]
fn a_truncated_or_extended_segment_is_a_miss() {
    for medium in MEDIA {
        let old = Old::new(medium);
        let header = &old.header;
        let places = [
            header.counters_offset(),
            header.marks_offset(),
            header.sequences_offset(),
            header.records_offset(),
        ];
        let mut lengths = vec![
            0,
            1,
            7,
            8,
            12,
            155,
            156,
            157,
            4095,
            4096,
            header.data_offset() - 1,
            header.data_offset(),
        ];
        lengths.extend(places.map(|place| place + 1));
        lengths.extend([
            header.slot_offset(1) + 5,
            header.file_bytes() - 4096,
            header.file_bytes() - 1,
        ]);
        for length in lengths {
            old.write(&old.bytes[..length as usize]);
            assert_eq!(old.look(&format!("{length} bytes")), 0);
        }
        let mut longer = old.bytes.clone();
        longer.extend([9; 5000]);
        old.write(&longer);
        assert_eq!(old.look("longer"), OLD_BLOCKS);
    }
}

#[test]
fn damaged_segments_do_not_keep_a_writer_from_adopting_the_others() {
    for medium in MEDIA {
        let folder = folder(medium);
        // A full folder of four segments.
        let setup = Setup {
            capacity_bytes: Some(1 << 20),
            segment_bytes: Some(256 << 10),
            ..setup(medium)
        };
        let writer = Worker::open(folder.path(), &setup).expect("a writer can open the folder");
        for chain in 0..10 {
            writer.store(&format!("old-{chain}"), 11, PATIENCE);
        }
        drop(writer);
        let files = segments(folder.path());
        assert_eq!(files.len(), 4);
        let flip = |path: &Path, offset: u64| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .expect("it can be opened");
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset).expect("it can be read");
            file.write_all_at(&[byte[0] ^ 1], offset)
                .expect("it can be written");
        };
        flip(&files[0], 40);
        let header =
            format::parse_segment_header(&fs::read(&files[1]).expect("it can be read")).expect("it is whole");
        for slot in 0..header.slot_count {
            flip(&files[1], header.record_offset(slot) + 20);
        }
        let writer = Worker::open(folder.path(), &setup).expect("a writer can open the folder");
        for chain in 0..6 {
            let salt = format!("new-{chain}");
            assert_eq!(writer.store(&salt, 11, PATIENCE), Outcome::Done, "chain {chain}");
            assert_eq!(writer.load(&salt, 11, PATIENCE).missed, Vec::<usize>::new());
        }
        for chain in 0..10 {
            writer.load(&format!("old-{chain}"), 11, PATIENCE);
        }
        assert!(
            files[0].exists(),
            "what it does not understand, it does not remove"
        );
    }
}

#[test]
fn files_that_are_no_segments_are_left_alone() {
    for medium in MEDIA {
        let old = Old::new(medium);
        let path = old.folder.path();
        fs::write(segment_path(path, 1), b"").expect("a file");
        fs::write(segment_path(path, 2), vec![0; 100_000]).expect("a file");
        fs::write(segment_path(path, 3), b"\x89PNG\r\n\x1a\n").expect("a file");
        fs::create_dir(segment_path(path, 4)).expect("a folder");
        symlink(&old.segment, segment_path(path, 5)).expect("a link");
        symlink("/dev/zero", segment_path(path, 6)).expect("a link");
        symlink("nowhere", segment_path(path, 7)).expect("a link");
        let _socket = std::os::unix::net::UnixListener::bind(segment_path(path, 8)).expect("a socket");
        fs::copy(&old.segment, segment_path(path, 9)).expect("a copy");
        fs::write(path.join("seg-xyz.kvlane"), b"x").expect("a file");
        fs::write(path.join("seg-00000000000000011.kvlane"), b"x").expect("a file");
        fs::write(path.join("README"), b"mine").expect("a file");
        let fifo = segment_path(path, 10);
        let made = std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .expect("mkfifo is there");
        assert!(made.success());
        let names = || -> BTreeSet<String> {
            let files = fs::read_dir(path).expect("a folder").flatten();
            files
                .map(|file| file.file_name().to_string_lossy().into_owned())
                .collect()
        };
        let before = names();
        let reader = Worker::open(path, &old.setup.reader()).expect("the folder is all right");
        assert_eq!(
            reader.load("old", OLD_BLOCKS, PATIENCE).missed,
            Vec::<usize>::new()
        );
        let writer = Worker::open(path, &old.setup).expect("the folder is all right");
        for chain in 0..12 {
            let salt = format!("new-{chain}");
            assert_eq!(writer.store(&salt, 6, PATIENCE), Outcome::Done);
            assert_eq!(reader.load(&salt, 6, PATIENCE).missed, Vec::<usize>::new());
        }
        let removed: Vec<String> = before.difference(&names()).cloned().collect();
        assert_eq!(removed, Vec::<String>::new());
        assert_eq!(fs::read(path.join("README")).expect("it is there"), b"mine");
        inspect::list(path).expect("it can be listed");
        inspect::verify(path, &mut |_, _| {}).expect("it can be verified");
    }
}

#[test]
fn files_of_somebody_else_are_refused() {
    if !rustix::process::geteuid().is_root() {
        kvlane_tests::process::not_run("files of another owner", "only root can give files away");
        return;
    }
    let give_away = |path: &Path| std::os::unix::fs::chown(path, Some(54_321), None).expect("root can");
    let old = Old::new(Medium::Memory);
    give_away(&old.segment);
    assert_eq!(old.look("of another owner"), 0);
    give_away(&old.folder.path().join("control"));
    let error = Worker::open(old.folder.path(), &old.setup)
        .err()
        .expect("refused")
        .to_string();
    assert!(error.contains("belongs to user 54321"), "{error}");
    let theirs = folder(Medium::Memory);
    give_away(theirs.path());
    let error = Worker::open(theirs.path(), &old.setup)
        .err()
        .expect("refused")
        .to_string();
    assert!(error.contains("belongs to user 54321"), "{error}");
    // And a reader does not get what it must not trust either.
    let error = FsReader::open(theirs.path(), vec![fixture::namespace()], &FsOptions::default());
    assert!(error.is_err());
}

#[test]
fn a_linked_control_file_is_refused() {
    let old = Old::new(Medium::Memory);
    let control = old.folder.path().join("control");
    fs::rename(&control, old.folder.path().join("elsewhere")).expect("it can be moved");
    symlink("elsewhere", &control).expect("a link");
    let error = Worker::open(old.folder.path(), &old.setup)
        .err()
        .expect("refused")
        .to_string();
    assert!(error.contains("symbolic link"), "{error}");
}

#[test]
fn a_segment_of_another_version_is_neither_read_nor_changed() {
    for medium in MEDIA {
        let old = Old::new(medium);
        for version in [0_u32, 2, u32::MAX] {
            let mut bytes = old.bytes.clone();
            bytes[8..12].copy_from_slice(&version.to_le_bytes());
            let body = SEGMENT_HEADER_BYTES - 4;
            let crc = structure_crc(&[&bytes[..body]]);
            bytes[body..SEGMENT_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
            old.write(&bytes);
            assert_eq!(old.look(&format!("version {version}")), 0);
        }
        let info = inspect::list(old.folder.path()).expect("it can be listed");
        let reason = info.segments[0].rejected.clone().expect("it is rejected");
        assert!(
            reason.contains("format version 4294967295, this build reads 1"),
            "{reason}"
        );
    }
}

#[test]
fn a_damaged_truncated_or_foreign_control_file_is_a_clear_error() {
    let old = Old::new(Medium::Memory);
    let control = old.folder.path().join("control");
    let good = fs::read(&control).expect("it can be read");
    let refused = |bytes: &[u8]| {
        fs::write(&control, bytes).expect("it can be written");
        let before = fs::metadata(&control).expect("it is there").mtime_nsec();
        let error = Worker::open(old.folder.path(), &old.setup)
            .err()
            .expect("refused")
            .to_string();
        assert_eq!(fs::metadata(&control).expect("it is there").mtime_nsec(), before);
        assert!(error.contains("control is not usable"), "{error}");
        error
    };
    for offset in 0..28 {
        let mut bytes = good.clone();
        bytes[offset] ^= 0x15;
        refused(&bytes);
    }
    for length in [0, 1, 27, 28, 4096, 8191] {
        refused(&good[..length]);
    }
    let mut newer = good.clone();
    newer[8..12].copy_from_slice(&2_u32.to_le_bytes());
    assert!(refused(&newer).contains("format version 2, this build reads 1"));
    assert!(refused(&[7; 8192]).contains("magic"));
    // Counters and the table of writers may say anything.
    for offset in (64..104).chain(4096..4096 + 24) {
        let mut bytes = good.clone();
        bytes[offset] ^= 0xff;
        fs::write(&control, &bytes).expect("it can be written");
        old.look(&format!("control byte {offset}"));
    }
    let other = Setup {
        capacity_bytes: Some(3 << 20),
        ..old.setup.clone()
    };
    fs::write(&control, &good).expect("it can be written");
    let error = Worker::open(old.folder.path(), &other)
        .err()
        .expect("refused")
        .to_string();
    assert!(
        error.contains("capacity_bytes is 3145728") && error.contains("1048576"),
        "{error}"
    );
    assert_eq!(old.look("restored"), OLD_BLOCKS);
}

#[test]
fn a_missing_folder_is_made_or_is_an_empty_store() {
    let parent = folder(Medium::Memory);
    let path = parent.path().join("not/there");
    let reader =
        FsReader::open(&path, vec![fixture::namespace()], &FsOptions::default()).expect("it may come later");
    let chain = fixture::keys("chain", 3);
    let ready = || reader.lookup(&chain, &mut LookupCursor::default()).ready_blocks;
    assert_eq!(ready(), 0);
    assert!(!path.exists());
    let writer = Worker::open(&path, &setup(Medium::Memory)).expect("a writer makes it");
    assert_eq!(fs::metadata(&path).expect("it is there").mode() & 0o777, 0o700);
    assert_eq!(writer.store("chain", 3, PATIENCE), Outcome::Done);
    fixture::eventually("the reader finds it", || ready() == 3);
    let file = parent.path().join("file");
    fs::write(&file, b"x").expect("a file");
    for path in [&file, &file.join("below")] {
        let error = Worker::open(path, &setup(Medium::Memory))
            .err()
            .expect("refused")
            .to_string();
        assert!(
            error.contains("Not a directory") || error.contains("File exists"),
            "{error}"
        );
    }
}

#[test]
fn a_folder_that_disappears_costs_only_misses() {
    for medium in MEDIA {
        let old = Old::new(medium);
        let writer = Worker::open(old.folder.path(), &old.setup).expect("the folder is all right");
        let reader = Worker::open(old.folder.path(), &old.setup.reader()).expect("the folder is all right");
        assert_eq!(writer.store("new", 6, PATIENCE), Outcome::Done);
        fs::remove_dir_all(old.folder.path()).expect("it can be removed");
        for chain in 0..20 {
            let salt = format!("later-{chain}");
            writer.store(&salt, 6, PATIENCE);
            writer.load(&salt, 6, PATIENCE);
            reader.load(&salt, 6, PATIENCE);
        }
        fs::create_dir(old.folder.path()).expect("it can be made again");
    }
}

#[test]
fn processes_with_different_layouts_share_a_folder_without_mixing_blocks() {
    for medium in MEDIA {
        let folder = folder(medium);
        let base = Setup {
            capacity_bytes: Some(4 << 20),
            segment_bytes: Some(256 << 10),
            ..setup(medium)
        };
        // The same names, even the same size of a block, but not the same layers; the namespace would differ too.
        let layouts = [(8 << 10, 2), (8 << 10, 4), (4 << 10, 2), (24 << 10, 3)];
        let setups = layouts.map(|(block_bytes, layers)| Setup {
            block_bytes,
            layers,
            ..base.clone()
        });
        let mut processes = setups.each_ref().map(|setup| {
            let (process, opened) = PeerProcess::open(PEER, folder.path(), setup);
            assert_eq!(opened, "open");
            process
        });
        for number in 0..processes.len() {
            let salt = format!("chain-{number}");
            let store = format!("store {salt} 6");
            fixture::eventually("a store", || processes[number].ask(&store) == "done");
            for (other, process) in processes.iter_mut().enumerate() {
                // Each compares every byte that it loads, and ends if one is wrong.
                let found = process.ask(&format!("load {salt} 6"));
                // The keys are the same; that they are of other blocks may show only when one is looked at.
                let is_right = match other == number {
                    true => found == "done",
                    false => found.starts_with("missed ") && found.ends_with(" 6"),
                };
                assert!(is_right, "{other} loads what {number} stored: {found}");
            }
        }
    }
}
