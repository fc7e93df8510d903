use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::*;
use crate::fixture::{Folder, NAMESPACE, commit, key};

/// A lister whose thread does `before` in front of each round.
fn with_thread<R>(
    folder: &Folder,
    before: impl Fn() + Sync,
    test: impl FnOnce(&Lister, &Mutex<Index>) -> R,
) -> R {
    let (lister, index) = (Lister::default(), Mutex::new(Index::new(&[NAMESPACE])));
    drop(lister.look(&folder.directory, &index));
    lister.started();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            lister.run(|| {
                before();
                list(&folder.directory, &index);
            });
        });
        let result = test(&lister, &index);
        lister.close();
        result
    })
}

#[test]
fn a_block_in_a_segment_that_has_just_come_is_found_by_the_next_lookup() {
    let folder = Folder::new(8 << 20);
    with_thread(
        &folder,
        || {},
        |lister, index| {
            for number in 0..20 {
                let segment = folder.segment(1, 1);
                commit(&segment, 0, key(number), 0, 1);
                folder.directory.control.bump_changes();
                let index = lister.look(&folder.directory, index);
                assert!(index.find(0, &key(number)).is_some(), "{number}");
            }
        },
    );
}

#[test]
fn lookups_go_on_while_the_file_system_does_not_answer() {
    let folder = Folder::new(8 << 20);
    let first = folder.segment(1, 1);
    commit(&first, 0, key(0), 0, 1);
    let frozen = Arc::new(AtomicBool::new(false));
    let stands_still = || {
        while frozen.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    with_thread(&folder, stands_still, |lister, index| {
        frozen.store(true, Ordering::Relaxed);
        let second = folder.segment(1, 1);
        commit(&second, 0, key(1), 0, 1);
        folder.directory.control.bump_changes();
        let started = Instant::now();
        for _ in 0..100 {
            let index = lister.look(&folder.directory, index);
            assert!(index.find(0, &key(0)).is_some(), "what is known is found");
        }
        assert!(started.elapsed() < 10 * PATIENCE, "only the first one waits");
        frozen.store(false, Ordering::Relaxed);
        let end = Instant::now() + Duration::from_secs(10);
        while lister.look(&folder.directory, index).find(0, &key(1)).is_none() {
            assert!(Instant::now() < end, "it is never found");
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}
