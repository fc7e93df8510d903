use super::*;
use crate::fixture::{Folder, commit, geometry, key, put, record};
use crate::format::SlotState;
use crate::jobs::lock;
use kvlane_core::{MissReason, Outcome};

fn name_of(segment: &OwnedSegment) -> String {
    segment_name(segment.header().segment_id)
}

#[test]
fn a_segment_has_one_owner() {
    let folder = Folder::new(8 << 20);
    let segment = folder.segment(4, 1);
    assert!(segment.view.owner_lives());
    let name = name_of(&segment);
    assert!(
        OwnedSegment::adopt(&folder.directory, &name, &geometry())
            .unwrap()
            .is_none()
    );
    assert!(!remove_orphan(&folder.directory, &name).unwrap());
    drop(segment);
    let adopted = OwnedSegment::adopt(&folder.directory, &name, &geometry())
        .unwrap()
        .unwrap();
    assert!(adopted.is_ours());
}

#[test]
fn an_old_owner_stops_writing_once_another_one_has_taken_over() {
    let folder = Folder::new(8 << 20);
    let (segment, name) = {
        let segment = folder.segment(4, 1);
        let name = name_of(&segment);
        (segment, name)
    };
    commit(&segment, 0, key(0), 0, 1);
    let odd = segment.invalidate(1).expect("it is ours");
    // As for a network file system that lost the lock of a client that did not answer.
    OWNER_LOCK.unlock(&segment.file).unwrap();
    let adopted = OwnedSegment::adopt(&folder.directory, &name, &geometry())
        .unwrap()
        .unwrap();
    assert!(!segment.is_ours());
    // The new owner has given the slot to somebody else; the old one was just about to commit.
    commit(&adopted, 1, key(7), 0, 1);
    let before = (
        adopted.view.sequence(1),
        adopted.view.record(1, adopted.view.sequence(1)).unwrap(),
    );
    assert!(!segment.publish(1, odd, &mut record(SlotState::Committed, key(1), 0)));
    let after = (
        adopted.view.sequence(1),
        adopted.view.record(1, adopted.view.sequence(1)).unwrap(),
    );
    assert_eq!(before, after);
    segment.retire(&folder.directory);
    assert!(
        is_linked_as(&folder.directory.folder, &adopted.file, &name).unwrap(),
        "it is not the old owner's to remove"
    );
    let sequence = adopted.view.sequence(0);
    assert_eq!(adopted.view.record(0, sequence).unwrap().key, key(0));
}

#[test]
fn readers_of_a_removed_orphan_find_nothing_valid() {
    let folder = Folder::new(8 << 20);
    let segment = folder.segment(4, 1);
    commit(&segment, 0, key(0), 0, 1);
    let name = name_of(&segment);
    let view = SegmentView::open(&folder.directory, &name).unwrap().unwrap();
    let sequence = view.sequence(0);
    assert!(view.record(0, sequence).is_ok());
    drop(segment);
    assert!(remove_orphan(&folder.directory, &name).unwrap());
    assert_ne!(view.sequence(0), sequence, "its payload is a hole now");
    assert_eq!(view.sequence(0) % 2, 1);
    assert!(!remove_orphan(&folder.directory, &name).unwrap());
}

#[test]
fn readers_of_a_retired_segment_find_nothing_valid() {
    let folder = Folder::new(8 << 20);
    let segment = folder.segment(4, 1);
    commit(&segment, 0, key(0), 0, 1);
    let view = SegmentView::open(&folder.directory, &name_of(&segment))
        .unwrap()
        .unwrap();
    segment.retire(&folder.directory);
    assert!((0..4).all(|slot| view.sequence(slot) % 2 == 1));
    assert_eq!(folder.directory.used_bytes().unwrap(), 0);
}

#[test]
fn sequences_never_go_back() {
    let folder = Folder::new(8 << 20);
    let segment = folder.segment(1, 1);
    let mut last = 0;
    for round in 0..5 {
        let odd = segment.invalidate(0).expect("it is ours");
        let again = segment.invalidate(0).expect("it is ours");
        assert!(
            odd > last && again > odd && odd % 2 == 1 && again % 2 == 1,
            "{round}: {last} {odd} {again}"
        );
        segment.publish(0, again, &mut record(SlotState::Free, key(0), 0));
        last = segment.view.sequence(0);
        assert_eq!(last, again + 1);
    }
}

#[test]
fn a_segment_of_another_geometry_is_not_adopted_but_can_be_removed() {
    let folder = Folder::new(8 << 20);
    let other = Geometry::new(vec![100, 200, 300]);
    let segment = crate::fixture::segment_of(&folder.directory, &other, 2, 1);
    put(&segment, 0, record(SlotState::Free, key(0), 0));
    let name = name_of(&segment);
    drop(segment);
    assert!(
        OwnedSegment::adopt(&folder.directory, &name, &geometry())
            .unwrap()
            .is_none()
    );
    assert!(remove_orphan(&folder.directory, &name).unwrap());
}

#[test]
fn on_a_network_only_the_creating_host_adopts_and_removes() {
    let folder = Folder::new(8 << 20);
    let name = name_of(&folder.segment(4, 1));
    let mut network = folder.open_as(crate::options::Medium::Network);
    network.host = crate::host::Host {
        boot_id: [9; 16],
        machine_id: [9; 16],
    };
    assert!(
        OwnedSegment::adopt(&network, &name, &geometry())
            .unwrap()
            .is_none()
    );
    assert!(
        !remove_orphan(&network, &name).unwrap(),
        "its owner's lock may be invisible here"
    );
    assert!(
        OwnedSegment::adopt(
            &folder.open_as(crate::options::Medium::Network),
            &name,
            &geometry()
        )
        .unwrap()
        .is_some()
    );
}

#[test]
fn a_header_states_no_more_than_fits_the_target() {
    for layers in [1, 3, 96] {
        for layer_bytes in [1_u64, 4096, 100_000] {
            let geometry = Geometry::new(vec![layer_bytes; layers]);
            for target in [1 << 16, 1 << 20, 64 << 20] {
                let header = geometry
                    .header(target, u64::MAX, crate::host::Host::this())
                    .unwrap();
                assert!(header.slot_count == 1 || header.file_bytes() <= target);
                assert_eq!(
                    geometry
                        .header(target, header.file_bytes(), crate::host::Host::this())
                        .unwrap()
                        .slot_count,
                    header.slot_count
                );
                let one = format::SegmentHeader {
                    slot_count: 1,
                    ..header
                };
                assert!(
                    geometry
                        .header(target, one.file_bytes() - 1, crate::host::Host::this())
                        .is_none()
                );
            }
        }
    }
}

/// Two processes count up the same words: one that was stopped and one that took over.
#[test]
fn sequences_never_go_back_under_two_hands() {
    let word = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut last = 0;
                for _ in 0..100_000 {
                    let odd = move_on(&word);
                    assert!(odd > last && odd % 2 == 1);
                    last = odd;
                }
            });
        }
    });
    assert_eq!(word.into_inner(), 2 * 200_000 - 1, "no step was lost");
}

#[test]
fn a_sequence_at_the_end_of_the_numbers_stays_there() {
    let folder = Folder::new(8 << 20);
    let segment = folder.segment(1, 1);
    let word = segment
        .mapping()
        .u64_at(segment.header().sequence_offset(0) as usize);
    word.store(u64::MAX - 1, Ordering::Relaxed);
    for _ in 0..2 {
        segment.clear(0);
        assert_eq!(segment.view.sequence(0), u64::MAX);
    }
}

#[test]
fn a_record_that_does_not_belong_into_its_segment_is_a_miss() {
    let folder = Folder::in_memory(8 << 20);
    let shared = crate::fixture::shared(folder.open_as(crate::options::Medium::Memory), 1);
    // As many layers, but so small that a block of ours would end behind the file.
    let small = crate::fixture::segment_of(&folder.directory, &Geometry::new(vec![64, 64]), 1, 1);
    commit(&small, 0, key(0), 0, 1);
    let right = folder.segment(1, 1);
    commit(&right, 0, key(0), 0, 1);
    let found = |segment: &OwnedSegment, epoch| crate::index::Found {
        slot: 0,
        sequence: segment.view.sequence(0),
        view: Arc::new(
            SegmentView::open(&folder.directory, &name_of(segment))
                .unwrap()
                .unwrap(),
        ),
        namespace: crate::fixture::NAMESPACE.with_epoch(epoch),
    };
    let recycled = Some(MissReason::Recycled);
    assert_eq!(load_of(&shared, key(0), found(&small, 0)), recycled);
    assert_eq!(load_of(&shared, key(0), found(&right, 1)), recycled);
    assert_eq!(load_of(&shared, key(1), found(&right, 0)), recycled);
    let whole = load_of(&shared, key(0), found(&right, 0));
    assert_eq!(whole, Some(MissReason::Corrupt), "only its bytes are none");
}

#[test]
fn what_was_not_as_the_index_said_is_not_offered_again() {
    let folder = Folder::new(8 << 20);
    let shared = crate::fixture::shared(folder.open_again(), 1);
    let segment = folder.segment(1, 1);
    commit(&segment, 0, key(0), 0, 1);
    let mut index = lock(&shared.index);
    index.refresh(&shared.directory);
    let found = index.find(0, &key(0)).unwrap();
    drop(index);
    // The record goes bad behind the index' back.
    let offset = segment.header().record_offset(0) as usize + 20;
    segment.mapping().write_bytes(offset, &[0xff; 4]);
    assert_eq!(load_of(&shared, key(0), found), Some(MissReason::Recycled));
    assert!(lock(&shared.index).find(0, &key(0)).is_none());
}

#[test]
fn what_was_written_before_the_last_boot_is_checked_even_if_nothing_else_is() {
    let folder = Folder::new(8 << 20);
    let shared = crate::fixture::shared_that_verifies(folder.open_again(), 1, false);
    for (number, boot_id) in [(1, folder.directory.host.boot_id), (2, [9; 16])] {
        let mut header = geometry().header(1, u64::MAX, folder.directory.host).unwrap();
        (header.slot_count, header.boot_id) = (1, boot_id);
        let segment = OwnedSegment::create(&folder.directory, &header, &geometry().layer_bytes, 1).unwrap();
        // Its checksums are not those of its payload.
        commit(&segment, 0, key(number), 0, 1);
        let mut index = lock(&shared.index);
        index.refresh(&shared.directory);
        let found = index.find(0, &key(number)).unwrap();
        drop(index);
        let expected = (number == 2).then_some(MissReason::Corrupt);
        assert_eq!(load_of(&shared, key(number), found), expected);
    }
}

#[test]
fn a_block_is_missed_when_the_readers_of_cold_blocks_stand_still() {
    let folder = Folder::new(8 << 20);
    let shared = crate::fixture::shared(folder.open_again(), 1);
    let segment = folder.segment(500, 1);
    commit(&segment, 499, key(0), 0, 1);
    let mut index = lock(&shared.index);
    index.refresh(&shared.directory);
    let found = index.find(0, &key(0)).unwrap();
    drop(index);
    // What was read ahead with the tables goes again.
    rustix::fs::fadvise(&segment.file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let (cold, _nobody_reads) = crossbeam::channel::bounded(0);
    let (id, job) = crate::fixture::load_of(&shared, key(0), found, Some(cold));
    job.run(&mut crate::cold::Bounce::default());
    let mut done = Vec::new();
    shared.jobs.poll(&mut done);
    assert_eq!(done[0].job, id);
    let expected = Outcome::Miss {
        positions: vec![0],
        reason: MissReason::Dropped,
    };
    assert_eq!(done[0].outcome, expected);
}

/// Why a load of this block misses.
fn load_of(
    shared: &Arc<crate::shared::Shared>,
    key: BlockKey,
    found: crate::index::Found,
) -> Option<MissReason> {
    let (id, job) = crate::fixture::load_of(shared, key, found, None);
    job.run(&mut crate::cold::Bounce::default());
    drop(job);
    let mut done = Vec::new();
    shared.jobs.poll(&mut done);
    assert_eq!((done.len(), done[0].job), (1, id));
    match done[0].outcome {
        Outcome::Done => None,
        Outcome::Miss { reason, .. } => Some(reason),
    }
}

/// Whether the payload takes space.
fn has_payload(file: &File, header: &SegmentHeader) -> bool {
    file.metadata().unwrap().blocks() * 512 > header.data_offset()
}

#[test]
fn a_payload_is_given_back_once_nobody_copies_from_it() {
    let folder = Folder::in_memory(8 << 20);
    for orphan in [false, true] {
        let segment = folder.segment(4, 1);
        commit(&segment, 0, key(0), 0, 1);
        let (name, header) = (name_of(&segment), segment.header().clone());
        let view = Arc::new(SegmentView::open(&folder.directory, &name).unwrap().unwrap());
        let (one, other) = (view.hold().unwrap(), view.hold().unwrap());
        if orphan {
            drop(segment);
            assert!(remove_orphan(&folder.directory, &name).unwrap());
        } else {
            segment.retire(&folder.directory);
        }
        assert!(!view.path.exists(), "its name goes at once");
        drop(one);
        folder.directory.give_back_payloads();
        assert!(has_payload(&view.file, &header), "somebody copies from it");
        drop(other);
        folder.directory.give_back_payloads();
        assert!(!has_payload(&view.file, &header));
    }
}

#[test]
fn a_load_from_a_removed_segment_is_a_miss_and_takes_no_memory() {
    let folder = Folder::in_memory(8 << 20);
    let shared = crate::fixture::shared(folder.open_as(crate::options::Medium::Memory), 1);
    let segment = folder.segment(4, 1);
    commit(&segment, 0, key(0), 0, 1);
    let view = Arc::new(
        SegmentView::open(&folder.directory, &name_of(&segment))
            .unwrap()
            .unwrap(),
    );
    let found = crate::index::Found {
        slot: 0,
        sequence: view.sequence(0),
        view: Arc::clone(&view),
        namespace: crate::fixture::NAMESPACE.with_epoch(0),
    };
    segment.retire(&folder.directory);
    assert_eq!(load_of(&shared, key(0), found), Some(MissReason::Recycled));
    assert!(
        !has_payload(&view.file, segment.header()),
        "the load took pages of the hole"
    );
}

/// A process that was stopped between any two steps finds out that it has been replaced before it changes anything.
#[test]
fn what_a_new_owner_wrote_is_not_touched_by_the_old_one() {
    let folder = Folder::new(8 << 20);
    let old = folder.segment(1, 3);
    let odd = old.invalidate(0).expect("it is ours");
    assert!(old.publish(0, odd, &mut record(SlotState::Committed, key(1), 0)));
    old.set_owner(old.start_id + 1);
    let before: Vec<u64> = (0..3).map(|slot| old.view.sequence(slot)).collect();
    assert_eq!(old.invalidate(0), None);
    old.clear(1);
    old.retire(&folder.directory);
    let after: Vec<u64> = (0..3).map(|slot| old.view.sequence(slot)).collect();
    assert_eq!(before, after);
    assert!(old.view.path.exists());
}

/// Commits a block in slot 0 as the process would that takes the segment over.
fn take_over(old: &OwnedSegment, uses_slot: bool) {
    old.set_owner(old.start_id + 1);
    if uses_slot {
        let sequence = old.header().sequence_offset(0) as usize;
        old.mapping().u64_at(sequence).fetch_add(2, Ordering::SeqCst);
    }
}

/// The process stands still where `invalidate` looks at what it knows, and is replaced meanwhile.
#[test]
fn a_process_that_is_replaced_in_the_middle_of_a_step_does_not_move_a_slot_of_the_new_owner() {
    for place in 0..2 {
        let folder = Folder::new(8 << 20);
        let old = folder.segment(1, 1);
        let steps = std::cell::Cell::new(0);
        let before = old.view.sequence(0);
        let odd = old.invalidate_with(0, || {
            if steps.replace(steps.get() + 1) == place {
                // Who comes later sees the slot odd, and lets it rest.
                take_over(&old, place == 0);
            }
        });
        assert_eq!(odd, None, "{place}");
        assert_eq!(steps.get(), place + 1);
        assert_eq!(old.view.sequence(0), before + 2 - place, "{place}");
    }
}
