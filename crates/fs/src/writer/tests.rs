use std::time::Duration;

use kvlane_core::{Availability, MissReason, StoreRequest};

use super::*;
use crate::descriptors::Share;
use crate::fixture::{Folder, NAMESPACE, commit, key, shared};
use crate::index::{Index, LookupCursor};

/// A writer without its thread, in a folder of its own.
struct Alone {
    writer: Writer,
    folder: Folder,
    _tasks: Receiver<StoreTask>,
}

impl Alone {
    fn new() -> Self {
        Self::in_folder(Folder::new(8 << 20), u64::MAX)
    }

    fn in_folder(folder: Folder, descriptors_max: u64) -> Self {
        let mut directory = folder.open_again();
        directory.descriptors = Share::of_another_process(descriptors_max);
        let shared = shared(directory, 1);
        let place = shared.directory.control.register_writer(1).unwrap();
        let (sender, tasks) = crossbeam::channel::unbounded();
        let mut writer = Writer::new(shared, place, 1 << 20, sender, 1);
        writer.prepare();
        Alone {
            writer,
            folder,
            _tasks: tasks,
        }
    }

    fn reserve(&mut self, keys: &[BlockKey]) {
        self.writer
            .reserve(keys, 0, Instant::now() + Duration::from_secs(60));
    }

    fn job(&self, keys: &[BlockKey]) -> Arc<StoreJob> {
        let request = StoreRequest {
            keys: keys.to_vec(),
            blocks: (0..keys.len() as u32).collect(),
            first_depth: 0,
            deadline: Instant::now() + Duration::from_secs(60),
        };
        let shared = &self.writer.shared;
        StoreJob::new(shared, shared.jobs.next_id(), request, NAMESPACE.with_epoch(0), 0)
    }

    fn found(&self, keys: &[BlockKey]) -> Availability {
        let mut index = Index::new(&[NAMESPACE]);
        index.refresh(&self.folder.directory);
        index.availability(keys, &mut LookupCursor::default())
    }
}

#[test]
fn a_store_that_is_over_before_it_begins_leaves_no_promise() {
    let mut alone = Alone::new();
    let keys: Vec<BlockKey> = (0..3).map(key).collect();
    alone.reserve(&keys);
    assert_eq!(alone.found(&keys).pending_blocks, 3);
    let job = alone.job(&keys[..2]);
    job.close(MissReason::Cancelled);
    alone.writer.begin(job);
    assert_eq!(
        alone.found(&keys[2..]).pending_blocks,
        1,
        "that was not of the job"
    );
    assert_eq!(alone.found(&keys).pending_blocks, 0);
    assert_eq!(alone.writer.slots.promises().len(), 1);
}

#[test]
fn a_promise_that_somebody_else_has_kept_gives_its_slot_back() {
    let mut alone = Alone::new();
    let keys: Vec<BlockKey> = (0..2).map(key).collect();
    alone.reserve(&keys);
    let other = alone.folder.segment(4, 2);
    commit(&other, 0, key(0), 0, 1);
    let job = alone.job(&keys);
    alone.writer.begin(Arc::clone(&job));
    assert!(
        matches!(job.plans(), [Plan::Present, Plan::Copy(_)]),
        "{:?}",
        job.plans()
    );
    assert_eq!(alone.writer.slots.promises(), []);
    let free = std::iter::from_fn(|| alone.writer.slots.take_free()).count();
    let all = alone.writer.slots.segments().next().unwrap().header().slot_count as usize;
    assert_eq!(free, all - 1);
}

#[test]
fn a_wish_for_space_ends_when_nothing_was_needed_for_a_while() {
    let mut alone = Alone::new();
    let control = Arc::clone(&alone.writer.shared.directory.control);
    let wants = || {
        let writers = alone.folder.directory.control.live_writers(None);
        writers.iter().map(|writer| writer.wants_bytes).sum::<u64>()
    };
    control.set_wants(alone.writer.place, 4096);
    alone.writer.wished = Some(Instant::now());
    alone.writer.tick();
    assert_eq!(wants(), 4096, "it is still needed");
    alone.writer.wished = Instant::now().checked_sub(WISH_LASTS);
    assert!(alone.writer.wished.is_some(), "the machine has run long enough");
    alone.writer.tick();
    assert_eq!(wants(), 0);
}

#[test]
fn a_cause_for_which_no_segment_comes_is_said_once_however_often_its_numbers_change() {
    let mut alone = Alone::new();
    assert!(alone.writer.is_new_cause("memory limit"));
    assert!(!alone.writer.is_new_cause("memory limit"));
    assert!(alone.writer.is_new_cause("full"));
}

/// What the segments of a process may take, and how many segments of its own a writer gets then.
fn segments_with(descriptors_max: u64) -> (Alone, usize) {
    let mut alone = Alone::in_folder(Folder::new(8 << 20), descriptors_max);
    let segments = |alone: &Alone| alone.writer.slots.segments().count();
    while segments(&alone) < 5 {
        alone.writer.grow_after = Instant::now();
        if !alone.writer.grow() {
            break;
        }
    }
    let count = segments(&alone);
    (alone, count)
}

#[test]
fn a_writer_whose_segments_take_their_part_of_the_file_descriptors_gets_no_further_one() {
    // Each takes three.
    let (mut alone, segments) = segments_with(12);
    assert_eq!(segments, 3);
    assert!(!alone.writer.is_new_cause("descriptors"), "it was said");
    assert_eq!(segments_with(16).1, 4);
}

#[test]
fn a_writer_without_a_segment_gets_one_however_many_others_there_are() {
    let folder = Folder::new(8 << 20);
    let _others = [(); 10].map(|()| folder.segment(1, 2));
    let mut alone = Alone::in_folder(folder, 2);
    assert_eq!(alone.writer.slots.segments().count(), 1);
    assert!(!alone.writer.grow());
    // What it stores there is found.
    alone.reserve(&[key(0)]);
    let segments = alone.writer.shared.look().segment_count();
    assert_eq!(segments, 1, "there is no room for those of others");
    assert_eq!(alone.found(&[key(0)]).pending_blocks, 1);
}

/// Lets a store of `keys` end with what the system said of each of its blocks.
fn store_that_fails(alone: &mut Alone, keys: &[BlockKey], code: i32) -> Vec<SlotRef> {
    let job = alone.job(keys);
    alone.writer.begin(Arc::clone(&job));
    let slots = alone.writer.jobs[&job.id()].slots.clone();
    for position in 0..keys.len() {
        job.fail_block(position, std::io::Error::from_raw_os_error(code));
    }
    alone.writer.ended(job.id());
    slots.into_iter().flatten().collect()
}

#[test]
fn a_slot_that_cannot_be_written_is_not_the_next_one_again() {
    let mut alone = Alone::new();
    let mut tried = HashSet::new();
    for number in 0..5 {
        for at in store_that_fails(&mut alone, &[key(2 * number), key(2 * number + 1)], libc::EIO) {
            assert!(tried.insert(at), "{at:?} again");
        }
    }
    assert_eq!(tried.len(), 10);
    assert!(!alone.writer.is_new_cause("block not written"), "it was said");
    assert_eq!(alone.found(&[key(0)]).pending_blocks, 0);
}

#[test]
fn a_full_file_system_gets_its_next_blocks_where_others_have_been() {
    let mut alone = Alone::new();
    let segment = Arc::clone(alone.writer.slots.segments().next().unwrap());
    let mut written = HashSet::new();
    for number in 0..4 {
        let at = alone.writer.allocate(&HashSet::new()).unwrap();
        commit(&segment, at.slot, key(number), 0, 1);
        let (key, depth) = (key(number), 0);
        alone.writer.slots.set(at, Slot::Committed { key, depth });
        written.insert(at);
    }
    let tried = store_that_fails(&mut alone, &[key(10), key(11)], libc::ENOSPC);
    assert!(tried.iter().all(|at| !written.contains(at)), "{tried:?}");
    for _ in 0..3 {
        let at = alone.writer.allocate(&HashSet::new()).unwrap();
        assert!(written.contains(&at), "{at:?} has no space of its own");
        alone.writer.slots.set(at, Slot::Filling);
    }
    // Of no use either: the last block is not given up, too.
    let tried = store_that_fails(&mut alone, &[key(12)], libc::ENOSPC);
    assert!(written.contains(&tried[0]));
    commit(&segment, tried[0].slot, key(13), 0, 1);
    alone.writer.slots.set(
        tried[0],
        Slot::Committed {
            key: key(13),
            depth: 0,
        },
    );
    for number in 20..30 {
        let tried = store_that_fails(&mut alone, &[key(number)], libc::ENOSPC);
        assert!(!written.contains(&tried[0]), "{tried:?}");
    }
}

#[test]
fn a_full_file_system_evicts_nothing_while_a_free_slot_has_space_of_its_own() {
    let mut alone = Alone::new();
    let segment = Arc::clone(alone.writer.slots.segments().next().unwrap());
    let mut written = Vec::new();
    for number in 0..4 {
        let at = alone.writer.allocate(&HashSet::new()).unwrap();
        commit(&segment, at.slot, key(number), 0, 1);
        let (key, depth) = (key(number), 0);
        alone.writer.slots.set(at, Slot::Committed { key, depth });
        written.push(at);
    }
    store_that_fails(&mut alone, &[key(10)], libc::ENOSPC);
    // As after a reset, or once somebody has marked them bad.
    alone.writer.free(written[1]);
    alone.writer.free(written[2]);
    let given = [(); 2].map(|()| {
        let at = alone.writer.allocate(&HashSet::new()).unwrap();
        alone.writer.slots.set(at, Slot::Filling);
        at
    });
    assert_eq!(given, [written[2], written[1]]);
    assert_eq!(alone.writer.shared.counters.snapshot().evicted_blocks, 0);
    // Then blocks have to go.
    let at = alone.writer.allocate(&HashSet::new()).unwrap();
    assert!(at == written[0] || at == written[3], "{at:?}");
}

#[test]
fn a_wish_for_space_ends_when_space_is_refused() {
    let mut alone = Alone::in_folder(Folder::new(8 << 20), 3);
    let control = Arc::clone(&alone.writer.shared.directory.control);
    control.set_wants(alone.writer.place, 4096);
    assert!(!alone.writer.grow(), "it has what it may have");
    let wants: u64 = control
        .live_writers(Some(alone.writer.place))
        .iter()
        .map(|writer| writer.wants_bytes)
        .sum();
    assert_eq!(wants, 0);
}
