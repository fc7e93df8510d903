use super::*;
use crate::fixture::{Folder, commit, key, put, record, set_sequence};

fn none() -> HashSet<BlockKey> {
    HashSet::new()
}

fn spare(keys: &[BlockKey]) -> HashSet<BlockKey> {
    keys.iter().copied().collect()
}

/// The order in which the blocks are given up.
fn victims(slots: &mut Slots, spare: &HashSet<BlockKey>) -> Vec<u32> {
    let mut order = Vec::new();
    while let Some(at) = slots.take_victim(spare) {
        order.push(at.slot);
        slots.set(at, Slot::Filling);
    }
    order
}

fn with_segment(folder: &Folder, fill: impl FnOnce(&OwnedSegment)) -> Slots {
    let segment = Arc::new(folder.segment(8, 1));
    fill(&segment);
    let mut slots = Slots::default();
    slots.add(segment, Instant::now());
    slots
}

#[test]
fn the_longest_unused_block_goes_first_and_of_those_the_deepest() {
    let folder = Folder::new(8 << 20);
    let mut slots = with_segment(&folder, |segment| {
        for (slot, depth, mark) in [
            (0, 0, 5),
            (1, 1, 5),
            (2, 2, 5),
            (3, 9, 7),
            (4, 0, 3),
            (5, 4, 3),
            (6, 1, 9),
        ] {
            commit(segment, slot, key(slot), depth, mark);
        }
    });
    assert_eq!(victims(&mut slots, &none()), [5, 4, 2, 1, 0, 3, 6]);
}

#[test]
fn a_request_never_evicts_its_own_chain() {
    let folder = Folder::new(8 << 20);
    let mut slots = with_segment(&folder, |segment| {
        for slot in 0..8 {
            commit(segment, slot, key(slot), slot, 1);
        }
    });
    let chain: Vec<BlockKey> = (0..4).map(key).collect();
    // Stored earlier as one chain, of which the request names a part.
    slots.own_chain(&chain);
    let own = slots.own_chain(&chain[..1]);
    assert_eq!(victims(&mut slots, &own), [7, 6, 5, 4]);
    // Unknown as a chain, but named in the request.
    let mut slots = Slots::default();
    let segment = Arc::new(folder.segment(4, 1));
    for slot in 0..4 {
        commit(&segment, slot, key(slot), slot, 1);
    }
    slots.add(segment, Instant::now());
    assert_eq!(victims(&mut slots, &spare(&[key(3), key(1)])), [2, 0]);
}

#[test]
fn a_request_may_evict_others_that_begin_as_it_does() {
    let folder = Folder::new(8 << 20);
    let mut slots = with_segment(&folder, |segment| {
        for slot in 0..8 {
            commit(segment, slot, key(slot), slot.min(2), 1);
        }
    });
    // Both begin with blocks 0 and 1, the system prompt.
    let first = slots.own_chain(&[0, 1, 2, 3].map(key));
    let second = slots.own_chain(&[0, 1, 4, 5].map(key));
    assert_eq!(first, spare(&[0, 1, 2, 3].map(key)));
    assert_eq!(second, spare(&[0, 1, 4, 5].map(key)));
    // Its later parts are still known by what it named at first.
    assert_eq!(slots.own_chain(&[0, 1, 2].map(key)), first);
    assert_eq!(slots.own_chain(&[3].map(key)), first);
    assert_eq!(
        slots.own_chain(&[5, 6].map(key)),
        spare(&[0, 1, 4, 5, 6].map(key))
    );
    assert_eq!(victims(&mut slots, &second).len(), 4);
}

#[test]
fn what_is_remembered_of_chains_is_bounded() {
    let mut chains = Chains::default();
    for number in 0..2_000 {
        let chain: Vec<BlockKey> = [0, 1]
            .into_iter()
            .chain(number * 3 + 2..number * 3 + 5)
            .map(key)
            .collect();
        for _ in 0..3 {
            assert_eq!(chains.whole(&chain), spare(&chain));
        }
    }
    assert_eq!(chains.remembered.len(), CHAINS_REMEMBERED);
    assert_eq!(chains.key_count, 5 * CHAINS_REMEMBERED);
    assert_eq!(chains.latest.len(), 3 * CHAINS_REMEMBERED + 2);
    let long: Vec<BlockKey> = (0..CHAIN_KEYS_REMEMBERED as u32).map(key).collect();
    chains.whole(&long);
    assert_eq!((chains.remembered.len(), chains.latest.len()), (1, long.len()));
}

#[test]
fn a_victim_that_was_used_meanwhile_is_kept() {
    let folder = Folder::new(8 << 20);
    let segment = Arc::new(folder.segment(4, 1));
    for slot in 0..4 {
        commit(&segment, slot, key(slot), 0, 1 + slot);
    }
    let mut slots = Slots::default();
    slots.add(Arc::clone(&segment), Instant::now());
    let first = slots.take_victim(&none()).unwrap();
    assert_eq!(first.slot, 0);
    slots.set(first, Slot::Filling);
    segment.set_mark(1, 100);
    assert_eq!(victims(&mut slots, &none()), [2, 3, 1]);
}

#[test]
fn only_whole_blocks_are_victims() {
    let folder = Folder::new(8 << 20);
    let mut slots = with_segment(&folder, |segment| {
        commit(segment, 0, key(0), 0, 1);
        put(segment, 1, record(SlotState::Reserved, key(1), 0));
        segment.invalidate(2).expect("it is ours");
    });
    let at = slots.take_free().unwrap();
    let until = Instant::now() + Duration::from_secs(9);
    slots.set(at, Slot::Reserved { key: key(3), until });
    assert_eq!(victims(&mut slots, &none()), [0]);
    assert_eq!(slots.reserved(&key(3)), Some(at));
}

#[test]
fn an_adopted_segment_brings_its_blocks_and_its_half_written_slots_rest() {
    let folder = Folder::new(8 << 20);
    let first = folder.segment(4, 1);
    commit(&first, 0, key(0), 3, 1);
    first.invalidate(1).expect("it is ours");
    put(&first, 2, record(SlotState::Reserved, key(2), 0));
    let name = crate::directory::segment_name(first.header().segment_id);
    drop(first);
    let geometry = crate::fixture::geometry();
    let adopted = OwnedSegment::adopt(&folder.directory, &name, &geometry)
        .unwrap()
        .unwrap();
    let mut slots = Slots::default();
    let now = Instant::now();
    slots.add(Arc::new(adopted), now);
    let mut free = Vec::new();
    while let Some(at) = slots.take_free() {
        free.push(at.slot);
        slots.set(at, Slot::Filling);
    }
    assert_eq!(
        free,
        [2, 3],
        "slot 0 has a block and slot 1 may still be written to"
    );
    assert_eq!(slots.overdue(now + QUARANTINE / 2), []);
    assert_eq!(slots.overdue(now + QUARANTINE), [SlotRef { segment: 0, slot: 1 }]);
    assert_eq!(victims(&mut slots, &none()), [0]);
}

#[test]
fn a_free_slot_is_given_out_once() {
    let folder = Folder::new(8 << 20);
    let mut slots = with_segment(&folder, |_| {});
    let mut given = Vec::new();
    while let Some(at) = slots.take_free() {
        given.push(at.slot);
        slots.set(at, Slot::Filling);
    }
    assert_eq!(given, (0..8).collect::<Vec<_>>());
    let at = SlotRef { segment: 0, slot: 3 };
    slots.set(at, Slot::Free);
    assert_eq!((slots.take_free(), slots.take_free()), (Some(at), None));
}

#[test]
fn the_coldest_segment_is_one_that_nobody_fills() {
    let folder = Folder::new(8 << 20);
    let mut slots = Slots::default();
    for mark in [5, 3, 4] {
        let segment = Arc::new(folder.segment(2, 1));
        commit(&segment, 0, key(mark), 0, mark);
        slots.add(segment, Instant::now());
    }
    assert_eq!(slots.coldest(), Some(1));
    slots.set(SlotRef { segment: 1, slot: 1 }, Slot::Filling);
    assert_eq!(slots.coldest(), Some(2));
    assert!(slots.remove(2).is_some());
    assert_eq!(slots.coldest(), Some(0));
    assert!(
        slots.take_free().is_some_and(|at| at.segment != 2),
        "its slots went with it"
    );
}

#[test]
fn a_segment_that_somebody_took_over_is_let_go_once_nobody_fills_it() {
    let folder = Folder::new(8 << 20);
    let segment = Arc::new(folder.segment(2, 1));
    let mut slots = Slots::default();
    slots.add(Arc::clone(&segment), Instant::now());
    let at = slots.take_free().unwrap();
    slots.set(at, Slot::Filling);
    assert_eq!(slots.lost(), Vec::<usize>::new());
    segment.set_owner(2);
    assert_eq!(slots.lost(), Vec::<usize>::new(), "a copy is still running");
    slots.set(at, Slot::Free);
    assert_eq!(slots.lost(), [0]);
}

#[test]
fn a_slot_whose_sequence_is_at_its_end_is_never_given_out() {
    let folder = Folder::new(8 << 20);
    let segment = Arc::new(folder.segment(8, 1));
    for slot in 2..6 {
        commit(&segment, slot, key(slot), 0, slot);
    }
    // Two free ones and a block are damaged before the segment comes, and one of each behind.
    for (slot, sequence) in [(0, u64::MAX), (1, u64::MAX - 1), (2, u64::MAX - 2)] {
        set_sequence(&segment, slot, sequence);
    }
    let mut slots = Slots::default();
    slots.add(Arc::clone(&segment), Instant::now());
    assert_eq!(slots.overdue(Instant::now() + 2 * QUARANTINE), []);
    set_sequence(&segment, 3, u64::MAX - 1);
    set_sequence(&segment, 6, u64::MAX - 1);
    let given = slots.take_free().unwrap();
    assert_eq!((given.slot, slots.take_free()), (7, None));
    assert_eq!(victims(&mut slots, &none()), [4, 5]);
}

#[test]
fn a_slot_that_took_no_block_rests_and_comes_before_its_time_only_if_there_is_no_other() {
    let folder = Folder::new(8 << 20);
    let mut slots = with_segment(&folder, |segment| commit(segment, 7, key(7), 0, 1));
    let now = Instant::now();
    let first = slots.take_free().unwrap();
    slots.set(first, Slot::Filling);
    slots.set_refused(first, now);
    let mut given = Vec::new();
    while let Some(at) = slots.take_free() {
        given.push(at.slot);
        slots.set(at, Slot::Filling);
    }
    assert_eq!(given, (1..7).collect::<Vec<_>>());
    assert_eq!(slots.overdue(now + QUARANTINE / 2), []);
    assert_eq!(slots.overdue(now + QUARANTINE), [first]);
    assert_eq!((slots.take_refused(), slots.take_refused()), (Some(first), None));
}

#[test]
fn where_no_slot_takes_a_block_most_of_them_stay_free() {
    let folder = Folder::new(8 << 20);
    let segment = Arc::new(folder.segment(200, 1));
    let mut slots = Slots::default();
    slots.add(segment, Instant::now());
    for _ in 0..1000 {
        let at = slots.take_free().expect("there is another free one");
        slots.set(at, Slot::Filling);
        slots.set_refused(at, Instant::now());
    }
    let free: HashSet<SlotRef> = std::iter::from_fn(|| slots.take_free()).collect();
    assert_eq!(free.len(), 200 - REFUSED_MAX);
    assert_eq!(slots.quarantined.len(), REFUSED_MAX);
}
