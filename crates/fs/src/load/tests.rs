use std::sync::atomic::AtomicBool;

use super::*;
use crate::fixture::{Folder, LISTING_PATIENCE, NAMESPACE, commit, key, load_after, put, record, shared};
use crate::lister;

fn begin(shared: &Arc<Shared>, key: kvlane_core::BlockKey) -> (JobId, Arc<LoadJob>) {
    let search = shared.search(&[key]);
    load_after(shared, key, search, None)
}

/// A load of a block in a segment that nobody has listed yet; `meanwhile` runs between its begin and its work.
fn load_before_the_listing(meanwhile: impl FnOnce(&Folder)) -> Outcome {
    let folder = Folder::new(8 << 20);
    let shared = shared(folder.open_again(), 1);
    drop(shared.look());
    let frozen = AtomicBool::new(true);
    shared.lister.started();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            shared.lister.run(|| {
                while frozen.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                lister::list(&shared.directory, &shared.index)
            });
        });
        let segment = folder.segment(1, 1);
        commit(&segment, 0, key(1), 0, 1);
        folder.directory.control.bump_changes();
        let started = Instant::now();
        let (id, job) = begin(&shared, key(1));
        let took = started.elapsed();
        meanwhile(&folder);
        frozen.store(false, Ordering::Relaxed);
        job.run(&mut Bounce::default());
        shared.lister.close();
        assert!(took < LISTING_PATIENCE / 2, "{took:?}");
        shared.jobs.wait(id, Instant::now()).unwrap().unwrap().outcome
    })
}

fn reason(outcome: Outcome) -> Option<MissReason> {
    match outcome {
        Outcome::Miss { reason, .. } => Some(reason),
        _ => None,
    }
}

#[test]
fn a_load_begins_at_once_and_finds_its_block_when_the_folder_has_been_listed() {
    // The fixture's checksums are made up, so being found shows as being read.
    assert_eq!(reason(load_before_the_listing(|_| ())), Some(MissReason::Corrupt));
}

#[test]
fn a_load_from_before_a_reset_does_not_take_what_comes_after_it() {
    let outcome = load_before_the_listing(|folder| {
        let control = &folder.directory.control;
        control.start_epoch().unwrap();
        let segment = folder.segment(1, 1);
        let mut later = record(SlotState::Committed, key(1), 0);
        later.namespace = NAMESPACE.with_epoch(control.epoch());
        put(&segment, 0, later);
        control.bump_changes();
    });
    assert_eq!(reason(outcome), Some(MissReason::Absent));
}
