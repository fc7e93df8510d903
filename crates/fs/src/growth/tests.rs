use std::sync::Arc;

use super::*;
use crate::control::WriterPlace;
use crate::fixture::{Folder, commit, geometry, key, segment_of, set_sequence, shared};

struct Process {
    shared: Arc<Shared>,
    place: WriterPlace,
    segments: Vec<OwnedSegment>,
    generosity: Generosity,
}

const TARGET: u64 = 1 << 20;

impl Process {
    fn start(folder: &Folder, start_id: u64) -> Self {
        let shared = shared(folder.open_again(), start_id);
        let place = shared.directory.control.register_writer(start_id).unwrap();
        Process {
            shared,
            place,
            segments: Vec::new(),
            generosity: Generosity::default(),
        }
    }

    fn bytes(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.header().file_bytes())
            .sum()
    }

    fn grow(&mut self) -> &'static str {
        match grow(&self.shared, self.place, TARGET, self.bytes()) {
            Growth::Grown(segment) => {
                self.segments.push(*segment);
                "grown"
            }
            Growth::Asked => "asked",
            Growth::Full => "full",
            Growth::Refused { reason, .. } => panic!("{reason}"),
        }
    }

    fn fill(&mut self) {
        while self.grow() == "grown" {}
    }

    fn should_give_back(&mut self) -> bool {
        self.should_give_back_at(Instant::now())
    }

    fn should_give_back_at(&mut self, now: Instant) -> bool {
        let (directory, bytes) = (&self.shared.directory, self.bytes());
        self.generosity
            .should_give_back(directory, self.place, bytes, now)
    }

    fn give_back(&mut self) {
        self.segments.remove(0).retire(&self.shared.directory);
        self.shared
            .directory
            .control
            .set_bytes_used(self.place, self.bytes());
    }
}

#[test]
fn one_writer_takes_all_of_the_capacity_and_nothing_beyond() {
    let folder = Folder::new(4 << 20);
    let mut process = Process::start(&folder, 1);
    process.fill();
    let used = folder.directory.used_bytes().unwrap();
    assert_eq!(used, process.bytes());
    assert!(used <= 4 << 20 && used > 3 << 20, "{used}");
    assert!(!process.should_give_back());
}

#[test]
fn a_later_writer_gets_its_share_from_an_idle_one() {
    let folder = Folder::new(8 << 20);
    let mut first = Process::start(&folder, 1);
    first.fill();
    let mut second = Process::start(&folder, 2);
    let mut rounds = 0;
    while second.bytes() + TARGET <= 4 << 20 {
        rounds += 1;
        assert!(rounds < 20, "{} bytes after {rounds} rounds", second.bytes());
        if second.grow() == "asked" {
            assert!(first.should_give_back());
            first.give_back();
        }
        assert_eq!(first.grow(), "full", "what was given back is not its own again");
        assert!(folder.directory.used_bytes().unwrap() <= 8 << 20);
    }
    assert_eq!(second.grow(), "full", "it has its share");
    assert!(!first.should_give_back());
    assert!(first.bytes() >= 3 << 20, "nor is the first one robbed");
}

#[test]
fn a_newcomer_is_not_starved_by_a_stopped_writer_that_has_the_most() {
    let folder = Folder::new(12 << 20);
    let mut stopped = Process::start(&folder, 1);
    stopped.fill();
    let mut second = Process::start(&folder, 2);
    while second.bytes() < 9 << 19 {
        if second.grow() == "asked" {
            stopped.give_back();
        }
    }
    assert!(stopped.bytes() > second.bytes());
    // From here on the first one does nothing.
    let mut newcomer = Process::start(&folder, 3);
    assert_eq!(newcomer.grow(), "asked");
    let start = Instant::now();
    assert!(!second.should_give_back_at(start), "the other one has more");
    assert!(!second.should_give_back_at(start + LARGEST_PATIENCE / 2));
    assert!(second.should_give_back_at(start + LARGEST_PATIENCE));
    second.give_back();
    assert_eq!(newcomer.grow(), "grown");
    while second.bytes() > 4 << 20 {
        second.give_back();
    }
    newcomer
        .shared
        .directory
        .control
        .set_wants(newcomer.place, 8 << 20);
    for seconds in 0..5 {
        let now = start + Duration::from_secs(seconds);
        assert!(!second.should_give_back_at(now), "it keeps its share");
    }
}

#[test]
fn more_writers_than_segments_still_get_one_each() {
    let folder = Folder::new(4 << 20);
    let mut first = Process::start(&folder, 1);
    first.fill();
    let mut others: Vec<Process> = (2..10).map(|id| Process::start(&folder, id)).collect();
    for _ in 0..30 {
        for process in &mut others {
            if process.bytes() == 0 {
                process.grow();
            }
        }
        if first.should_give_back() {
            first.give_back();
        }
        if first.bytes() == 0 {
            first.grow();
        }
    }
    let poor = others
        .iter()
        .chain([&first])
        .filter(|process| process.bytes() == 0)
        .count();
    assert_eq!(poor, 0);
    assert!(folder.directory.used_bytes().unwrap() <= 4 << 20);
}

#[test]
fn orphans_of_another_model_make_room_the_longest_unused_first() {
    let folder = Folder::new(4 << 20);
    let other = Geometry::new(vec![1000; 3]);
    let mut names = Vec::new();
    for mark in [5, 2, 9] {
        let segment = segment_of(&folder.directory, &other, 250, 1);
        commit(&segment, 0, key(mark), 0, mark);
        names.push((mark, crate::directory::segment_name(segment.header().segment_id)));
    }
    let mut process = Process::start(&folder, 2);
    let left = |folder: &Folder| -> Vec<u32> {
        names
            .iter()
            .filter(|(_, name)| folder.path().join(name).exists())
            .map(|(mark, _)| *mark)
            .collect()
    };
    assert_eq!(process.grow(), "grown");
    assert_eq!(left(&folder), [5, 9]);
    process.fill();
    assert_eq!(left(&folder), Vec::<u32>::new());
}

#[test]
fn an_orphan_without_a_slot_that_can_be_written_is_removed_and_not_adopted() {
    let folder = Folder::new(4 << 20);
    let orphan = folder.segment(400, 1);
    let path = orphan.view.path.clone();
    (0..400).for_each(|slot| set_sequence(&orphan, slot, u64::MAX));
    drop(orphan);
    let mut process = Process::start(&folder, 2);
    process.fill();
    assert!(!path.exists());
    assert_eq!(process.bytes(), folder.directory.used_bytes().unwrap());
    assert_eq!(process.shared.stats().adopted_segments, 0);
}

#[test]
fn a_living_writers_segments_are_never_removed_or_adopted() {
    let folder = Folder::new(2 << 20);
    let alive = segment_of(&folder.directory, &Geometry::new(vec![1000]), 480, 1);
    let also_alive = segment_of(&folder.directory, &geometry(), 2, 1);
    let mut process = Process::start(&folder, 2);
    process.fill();
    assert!(alive.view.path.exists() && also_alive.view.path.exists());
    assert!(alive.is_ours() && also_alive.is_ours());
}

#[test]
fn a_full_file_system_is_no_reason_to_leave_orphans_alone() {
    let folder = Folder::new(64 << 20);
    for id in 0..3 {
        commit(&folder.segment(4, 1), 0, key(id), 0, 1);
    }
    let mut process = Process::start(&folder, 2);
    let place = process.place;
    // There is room by the budget, but neither the memory limit nor the file system allow a new file.
    let mut adopted = 0;
    while let Room::Adopted(segment) = make_room(&process.shared, place, process.bytes()).unwrap() {
        process.segments.push(*segment);
        adopted += 1;
        assert!(adopted <= 3);
    }
    assert_eq!(adopted, 3);
}

/// Why a writer in a folder on `file_system` gets no segment.
fn refusal_on(file_system: &str) -> Option<(&'static str, String)> {
    let folder = Folder::new(4 << 20);
    let mut directory = folder.open_again();
    directory.choice.file_system = file_system.to_owned();
    let shared = shared(directory, 1);
    let place = shared.directory.control.register_writer(1).unwrap();
    match grow(&shared, place, TARGET, 0) {
        Growth::Refused { cause, reason, .. } => Some((cause, reason)),
        _ => None,
    }
}

#[test]
fn where_a_written_page_may_need_another_place_nothing_is_stored() {
    assert_eq!(refusal_on("ext4"), None);
    for file_system in ["zfs", "f2fs"] {
        let (cause, reason) = refusal_on(file_system).expect("it is refused");
        assert_eq!(cause, "copy-on-write");
        assert!(
            reason.contains(file_system) && reason.contains("ext4"),
            "{reason}"
        );
    }
}

#[test]
fn on_btrfs_a_file_that_would_be_copied_on_write_is_neither_made_nor_adopted() {
    let folder = Folder::new(4 << 20);
    // The flag is btrfs' own: what is below this test does not take it, or does not keep it.
    let orphan = folder.segment(1, 1);
    let name = crate::directory::segment_name(orphan.header().segment_id);
    drop(orphan);
    let mut directory = folder.open_again();
    directory.choice.file_system = "btrfs".to_owned();
    let file = std::fs::File::create(folder.path().join("empty")).unwrap();
    let is_btrfs = folder.directory.choice.file_system == "btrfs";
    assert_eq!(
        directory.choice.keep_places(&file).is_ok() && directory.choice.keeps_places(&file),
        is_btrfs
    );
    let adopted = OwnedSegment::adopt(&directory, &name, &geometry()).unwrap();
    assert_eq!(adopted.is_some(), is_btrfs);
}

#[test]
fn an_orphan_that_cannot_be_removed_does_not_keep_the_next_one() {
    let order = ["first", "second", "third"].map(|name| (0, name.to_owned()));
    let removed = std::cell::RefCell::new(Vec::new());
    let remove = |name: &str| {
        removed.borrow_mut().push(name.to_owned());
        match name {
            "first" => Err(FsError::io("remove", name)(
                std::io::ErrorKind::PermissionDenied.into(),
            )),
            _ => Ok(name == "third"),
        }
    };
    assert!(remove_first(&order, remove));
    assert_eq!(*removed.borrow(), ["first", "second", "third"]);
    assert!(!remove_first(&order[..2], remove));
}
