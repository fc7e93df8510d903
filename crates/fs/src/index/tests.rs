use super::*;
use crate::directory::unix_ms;
use crate::fixture::{Folder, NAMESPACE, commit, key, put, record, segment_of};
use crate::format::SlotRecord;
use crate::segment::OwnedSegment;

impl Index {
    /// All that the lister's thread does, and a look.
    pub(crate) fn refresh(&mut self, directory: &Directory) {
        if let Some(wanted) = self.wanted_listing(directory) {
            self.take_listing(wanted.list(directory));
        }
        let unsure = self.unsure_owners();
        let answers = unsure.iter().map(|view| view.owner_lives()).collect();
        self.take_owners(&unsure, answers);
        self.catch_up(directory);
    }
}

fn index() -> Index {
    Index::new(&[NAMESPACE])
}

/// Whether a look at the folder finds the block, and in which slot.
fn slot_of(index: &mut Index, directory: &Directory, number: u32) -> Option<u32> {
    directory.control.bump_changes();
    index.refresh(directory);
    index.find(0, &key(number)).map(|found| found.slot)
}

fn ready_and_pending(index: &mut Index, directory: &Directory, numbers: &[u32]) -> (usize, usize) {
    directory.control.bump_changes();
    index.refresh(directory);
    let chain: Vec<BlockKey> = numbers.iter().map(|&number| key(number)).collect();
    let found = index.availability(&chain, &mut LookupCursor::default());
    (found.ready_blocks, found.pending_blocks)
}

#[test]
fn blocks_come_and_go_with_their_records() {
    let folder = Folder::new(8 << 20);
    let mut index = index();
    assert_eq!(slot_of(&mut index, &folder.directory, 1), None);
    let segment = folder.segment(4, 1);
    commit(&segment, 2, key(1), 0, 1);
    assert_eq!(slot_of(&mut index, &folder.directory, 1), Some(2));
    segment.invalidate(2).expect("it is ours");
    assert_eq!(slot_of(&mut index, &folder.directory, 1), None);
    commit(&segment, 2, key(5), 0, 1);
    assert_eq!(slot_of(&mut index, &folder.directory, 1), None);
    assert_eq!(slot_of(&mut index, &folder.directory, 5), Some(2));
    segment.retire(&folder.directory);
    assert_eq!(slot_of(&mut index, &folder.directory, 5), None);
    assert_eq!(index.segment_count(), 0, "a removed segment is let go");
}

#[test]
fn a_block_in_several_slots_is_found_until_the_last_one_is_gone() {
    let folder = Folder::new(8 << 20);
    let (first, second, third) = (folder.segment(4, 1), folder.segment(4, 1), folder.segment(4, 1));
    let mut index = index();
    commit(&first, 0, key(1), 0, 1);
    assert_eq!(slot_of(&mut index, &folder.directory, 1), Some(0));
    put(&second, 1, record(SlotState::Reserved, key(1), 0));
    assert_eq!(slot_of(&mut index, &folder.directory, 1), Some(0));
    commit(&third, 2, key(1), 0, 1);
    assert_eq!(slot_of(&mut index, &folder.directory, 1), Some(0));
    // What is left is a promise and a block, in this order: the block counts.
    first.invalidate(0).expect("it is ours");
    assert_eq!(slot_of(&mut index, &folder.directory, 1), Some(2));
    third.invalidate(2).expect("it is ours");
    assert_eq!(ready_and_pending(&mut index, &folder.directory, &[1]), (0, 1));
    second.invalidate(1).expect("it is ours");
    // A promised slot that is being filled is still promised.
    assert_eq!(ready_and_pending(&mut index, &folder.directory, &[1]), (0, 1));
    put(&second, 1, record(SlotState::Free, BlockKey([0; 32]), 0));
    assert_eq!(ready_and_pending(&mut index, &folder.directory, &[1]), (0, 0));
    assert!(
        index.others.is_empty() && index.tables[0].blocks.is_empty(),
        "{index:?}"
    );
}

#[test]
fn a_promise_of_a_dead_writer_does_not_hide_that_of_a_living_one() {
    let folder = Folder::new(8 << 20);
    let mut index = index();
    let dead = folder.segment(4, 1);
    put(&dead, 0, record(SlotState::Reserved, key(1), 0));
    assert_eq!(ready_and_pending(&mut index, &folder.directory, &[1]), (0, 1));
    drop(dead);
    std::thread::sleep(2 * OWNER_CHECK_INTERVAL);
    assert_eq!(ready_and_pending(&mut index, &folder.directory, &[1]), (0, 0));
    let alive = folder.segment(4, 2);
    put(&alive, 0, record(SlotState::Reserved, key(1), 0));
    assert_eq!(ready_and_pending(&mut index, &folder.directory, &[1]), (0, 1));
}

#[test]
fn torn_and_overdue_records_are_not_believed() {
    let folder = Folder::new(8 << 20);
    let segment = folder.segment(4, 1);
    let mut index = index();
    let late = SlotRecord {
        deadline_unix_ms: unix_ms() - 1,
        ..record(SlotState::Reserved, key(1), 0)
    };
    put(&segment, 0, late);
    assert_eq!(ready_and_pending(&mut index, &folder.directory, &[1]), (0, 0));
    // A record of another sequence: what a reader sees between the two writes of a commit.
    commit(&segment, 1, key(2), 0, 1);
    let word = segment
        .mapping()
        .u64_at(segment.header().sequence_offset(1) as usize);
    word.fetch_add(2, std::sync::atomic::Ordering::Release);
    segment.bump_changes();
    assert_eq!(slot_of(&mut index, &folder.directory, 2), None);
    // A flipped bit in each part of the record.
    for byte in [0, 8, 12, 16, 47, 48, 79, 80, 96, 104, 112, 116, 128, 135] {
        commit(&segment, 2, key(3), 0, 1);
        assert_eq!(slot_of(&mut index, &folder.directory, 3), Some(2));
        let offset = segment.header().record_offset(2) as usize + byte;
        let mut value = [0];
        segment.mapping().read_bytes(offset, &mut value);
        segment.mapping().write_bytes(offset, &[value[0] ^ 4]);
        let mut fresh = self::index();
        assert_eq!(slot_of(&mut fresh, &folder.directory, 3), None, "byte {byte}");
    }
    commit(&segment, 2, key(3), 0, 1);
    assert_eq!(
        slot_of(&mut index, &folder.directory, 3),
        Some(2),
        "the slot can be used again"
    );
}

#[test]
fn an_adopted_segment_is_seen_even_if_its_maker_died_before_it_told_anybody() {
    let folder = Folder::new(8 << 20);
    let mut index = index();
    index.refresh(&folder.directory);
    // What a maker leaves that is killed between the two.
    let generation = folder.directory.control.generation();
    let segment = folder.segment(4, 1);
    let name = crate::directory::segment_name(segment.header().segment_id);
    folder.directory.control.set_generation_for_test(generation);
    index.refresh(&folder.directory);
    assert_eq!(index.segment_count(), 0);
    drop(segment);
    let adopted = OwnedSegment::adopt(&folder.directory, &name, &crate::fixture::geometry())
        .unwrap()
        .unwrap();
    commit(&adopted, 0, key(1), 0, 1);
    assert_eq!(slot_of(&mut index, &folder.directory, 1), Some(0));
}

#[test]
fn a_copy_of_a_segment_under_another_name_is_left_out() {
    let folder = Folder::new(8 << 20);
    let segment = folder.segment(4, 1);
    commit(&segment, 0, key(1), 0, 1);
    let copy = folder.path().join(crate::directory::segment_name(12345));
    std::fs::copy(&segment.view.path, copy).unwrap();
    let mut index = index();
    for _ in 0..3 {
        folder.directory.control.bump_generation();
        assert_eq!(slot_of(&mut index, &folder.directory, 1), Some(0));
        assert_eq!(index.segment_count(), 1);
    }
}

#[test]
fn a_bad_block_is_forgotten_until_its_slot_changes() {
    let folder = Folder::new(8 << 20);
    let segment = folder.segment(4, 1);
    let mut index = index();
    commit(&segment, 0, key(1), 0, 1);
    index.refresh(&folder.directory);
    let found = index.find(0, &key(1)).unwrap();
    index.forget(&found);
    assert_eq!(slot_of(&mut index, &folder.directory, 1), None);
    commit(&segment, 0, key(1), 0, 1);
    index.forget(&found);
    assert_eq!(
        slot_of(&mut index, &folder.directory, 1),
        Some(0),
        "that was another one"
    );
}

#[test]
fn a_new_epoch_hides_everything_and_its_own_blocks_are_found() {
    let folder = Folder::new(8 << 20);
    let segment = folder.segment(4, 1);
    let mut index = index();
    commit(&segment, 0, key(1), 0, 1);
    assert_eq!(slot_of(&mut index, &folder.directory, 1), Some(0));
    folder.directory.control.start_epoch().unwrap();
    assert_eq!(slot_of(&mut index, &folder.directory, 1), None);
    let namespace = index.effective(0);
    assert_eq!(namespace, NAMESPACE.with_epoch(1));
    put(
        &segment,
        1,
        SlotRecord {
            namespace,
            ..record(SlotState::Committed, key(1), 0)
        },
    );
    assert_eq!(slot_of(&mut index, &folder.directory, 1), Some(1));
}

#[test]
fn a_cursor_never_counts_blocks_that_went_meanwhile() {
    let folder = Folder::new(8 << 20);
    let segment = folder.segment(8, 1);
    let mut index = index();
    let chain: Vec<BlockKey> = (0..4).map(key).collect();
    let mut cursor = LookupCursor::default();
    let ready = |index: &mut Index, cursor: &mut LookupCursor| {
        folder.directory.control.bump_changes();
        index.refresh(&folder.directory);
        index.availability(&chain, cursor).ready_blocks
    };
    for slot in 0..3 {
        commit(&segment, slot, key(slot), slot, 1);
    }
    assert_eq!(ready(&mut index, &mut cursor), 3);
    segment.invalidate(1).expect("it is ours");
    assert_eq!(ready(&mut index, &mut cursor), 1);
    commit(&segment, 5, key(1), 1, 1);
    commit(&segment, 6, key(3), 3, 1);
    assert_eq!(ready(&mut index, &mut cursor), 4);
}

#[test]
fn segments_of_all_writers_count_and_foreign_files_do_not() {
    let folder = Folder::new(8 << 20);
    let mine = folder.segment(4, 1);
    let other = segment_of(
        &folder.open_again(),
        &crate::segment::Geometry::new(vec![64]),
        2,
        2,
    );
    commit(&mine, 0, key(1), 0, 1);
    put(
        &other,
        0,
        SlotRecord {
            layer_crcs: vec![1],
            ..record(SlotState::Committed, key(2), 0)
        },
    );
    std::fs::write(folder.path().join(crate::directory::segment_name(1)), b"rubbish").unwrap();
    std::os::unix::fs::symlink(
        &mine.view.path,
        folder.path().join(crate::directory::segment_name(2)),
    )
    .unwrap();
    std::fs::create_dir(folder.path().join(crate::directory::segment_name(3))).unwrap();
    let mut index = index();
    assert_eq!(slot_of(&mut index, &folder.directory, 1), Some(0));
    assert_eq!(slot_of(&mut index, &folder.directory, 2), Some(0));
    assert_eq!(index.segment_count(), 2);
}
