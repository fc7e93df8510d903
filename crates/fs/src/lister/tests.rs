use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::*;
use crate::fixture::{Folder, LISTING_PATIENCE, NAMESPACE, commit, key};

/// Ends the thread also when an assertion fails: the scope waits for it.
struct Closes<'a>(&'a Lister);

impl Drop for Closes<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A lister whose thread does `before` in front of each round.
fn with_thread<R>(
    lister: Lister,
    folder: &Folder,
    before: impl Fn() + Sync,
    test: impl FnOnce(&Lister, &Mutex<Index>) -> R,
) -> R {
    let index = Mutex::new(Index::new(&[NAMESPACE]));
    drop(lister.look(&folder.directory, &index));
    lister.started();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            lister.run(|| {
                before();
                list(&folder.directory, &index)
            });
        });
        let _end = Closes(&lister);
        test(&lister, &index)
    })
}

#[test]
fn a_block_in_a_segment_that_has_just_come_is_found_by_the_next_lookup() {
    let folder = Folder::new(8 << 20);
    with_thread(
        Lister::new(Some(LISTING_PATIENCE)),
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
fn a_lookup_of_a_quick_folder_waits_for_the_listing_as_long_as_is_shipped() {
    // A listing that is held up is not waited for.
    let mut attempts = 0..5;
    let is_found = || {
        let folder = Folder::new(8 << 20);
        with_thread(
            Lister::default(),
            &folder,
            || {},
            |lister, index| {
                let segment = folder.segment(1, 1);
                commit(&segment, 0, key(1), 0, 1);
                lister.look(&folder.directory, index).find(0, &key(1)).is_some()
            },
        )
    };
    assert!(attempts.any(|_| is_found()), "no lookup waited");
}

#[test]
fn lookups_go_on_while_the_file_system_does_not_answer() {
    // On a busy machine lookups that do not wait may take as long. Then the whole is tried again.
    let is_quick = |_| time_of_lookups_on_a_frozen_folder() < 10 * PATIENCE;
    assert!((0..5).any(is_quick), "only the first one waits");
}

fn time_of_lookups_on_a_frozen_folder() -> Duration {
    let folder = Folder::new(8 << 20);
    let first = folder.segment(1, 1);
    commit(&first, 0, key(0), 0, 1);
    let frozen = Arc::new(AtomicBool::new(false));
    let stands_still = || {
        while frozen.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    with_thread(Lister::default(), &folder, stands_still, |lister, index| {
        frozen.store(true, Ordering::Relaxed);
        let second = folder.segment(1, 1);
        commit(&second, 0, key(1), 0, 1);
        folder.directory.control.bump_changes();
        let started = Instant::now();
        for _ in 0..100 {
            let index = lister.look(&folder.directory, index);
            assert!(index.find(0, &key(0)).is_some(), "what is known is found");
        }
        let took = started.elapsed();
        frozen.store(false, Ordering::Relaxed);
        let end = Instant::now() + Duration::from_secs(10);
        while lister.look(&folder.directory, index).find(0, &key(1)).is_none() {
            assert!(Instant::now() < end, "it is never found");
            std::thread::sleep(Duration::from_millis(1));
        }
        took
    })
}

#[test]
fn on_a_slow_folder_no_more_than_two_lookups_ever_wait_for_a_listing() {
    // On a busy machine a lookup that does not wait may take as long. Then the whole is tried again.
    let waited: Vec<u32> = std::iter::repeat_with(waited_of_six_lookups_on_a_slow_folder)
        .take(5)
        .take_while(|waited| *waited > SLOW_LISTINGS)
        .collect();
    assert!(waited.len() < 5, "{waited:?} of 6 waited");
}

fn waited_of_six_lookups_on_a_slow_folder() -> u32 {
    const LASTS: Duration = Duration::from_millis(100);
    let folder = Folder::new(8 << 20);
    let slow = || std::thread::sleep(LASTS);
    with_thread(Lister::default(), &folder, slow, |lister, index| {
        let mut waited = 0;
        for number in 0..6 {
            let segment = folder.segment(1, 1);
            commit(&segment, 0, key(number), 0, 1);
            folder.directory.control.bump_changes();
            let started = Instant::now();
            drop(lister.look(&folder.directory, index));
            waited += u32::from(started.elapsed() >= LASTS);
            let end = Instant::now() + Duration::from_secs(10);
            while lister
                .glance(&folder.directory, index)
                .find(0, &key(number))
                .is_none()
            {
                assert!(Instant::now() < end, "it is never found");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        waited
    })
}

#[test]
fn one_slow_listing_makes_no_slow_folder_and_a_quick_one_ends_it() {
    let mut state = State::default();
    state.count(2 * SLOW);
    assert!(state.slow_listings < SLOW_LISTINGS);
    state.count(2 * SLOW);
    assert!(state.slow_listings >= SLOW_LISTINGS);
    state.count(SLOW / 10);
    assert_eq!(state.slow_listings, 0);
}

#[test]
fn a_glance_does_not_wait_for_a_file_system_that_does_not_answer() {
    let folder = Folder::new(8 << 20);
    let (frozen, rounds) = (AtomicBool::new(true), AtomicBool::new(false));
    let stands_still = || {
        rounds.store(true, Ordering::Relaxed);
        while frozen.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let lister = Lister::new(Some(LISTING_PATIENCE));
    with_thread(lister, &folder, stands_still, |lister, index| {
        while !rounds.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _segment = folder.segment(1, 1);
        let started = Instant::now();
        drop(lister.glance(&folder.directory, index));
        let took = started.elapsed();
        frozen.store(false, Ordering::Relaxed);
        assert!(took < LISTING_PATIENCE / 2, "{took:?}");
    });
}

#[test]
fn a_segment_that_cannot_be_opened_for_now_is_complained_about_once() {
    let folder = Folder::new(8 << 20);
    let mut index = Index::new(&[NAMESPACE]);
    let mut listed = |problems: &[&str]| {
        folder.directory.control.bump_generation();
        let wanted = index.wanted_listing(&folder.directory).unwrap();
        let mut listing = wanted.list(&folder.directory);
        // As if this process had run out of descriptors.
        listing
            .problems
            .extend(problems.iter().map(|problem| (*problem).to_owned()));
        index.take_listing(listing).news
    };
    assert_eq!(listed(&["no descriptors"]), ["no descriptors"]);
    assert!(listed(&["no descriptors"]).is_empty());
    assert!(listed(&[]).is_empty());
    assert_eq!(listed(&["no descriptors"]), ["no descriptors"], "again");
}

#[test]
fn a_segment_that_the_system_did_not_give_is_tried_again_and_rubbish_is_not() {
    for code in [
        libc::EIO,
        libc::EACCES,
        libc::ESTALE,
        libc::ETIMEDOUT,
        libc::EMFILE,
    ] {
        let error = FsError::io("open", "segment")(std::io::Error::from_raw_os_error(code));
        assert!(is_transient(&error), "{error}");
    }
    let folder = Folder::new(8 << 20);
    std::fs::write(folder.path().join(crate::directory::segment_name(1)), b"rubbish").unwrap();
    let mut index = Index::new(&[NAMESPACE]);
    let listing = index
        .wanted_listing(&folder.directory)
        .unwrap()
        .list(&folder.directory);
    assert!(
        listing.complete && listing.rejected == [1],
        "{:?}",
        listing.problems
    );
}

#[test]
fn no_more_segments_of_others_are_opened_than_the_file_descriptors_allow() {
    let folder = Folder::new(8 << 20);
    let segments = [(); 3].map(|()| folder.segment(1, 1));
    let directory = folder.open_again();
    let mut index = Index::new(&[NAMESPACE]);
    let round = |index: &mut Index, others_max| {
        directory.control.bump_generation();
        let wanted = index.wanted_listing(&directory).unwrap();
        let listing = wanted.list_some(&directory, others_max);
        let complete = listing.complete;
        (
            complete,
            index.take_listing(listing).news.len(),
            index.segment_count(),
        )
    };
    assert_eq!(round(&mut index, 2), (false, 1, 2));
    assert_eq!(round(&mut index, 2), (false, 0, 2), "it is said once");
    assert_eq!(round(&mut index, 3), (true, 0, 3));
    drop(segments);
}

#[test]
fn segments_that_cannot_be_opened_for_one_cause_are_one_complaint() {
    let error = |action, name: &str| {
        let source = std::io::Error::from_raw_os_error(libc::EMFILE);
        complaint_of(&FsError::io(action, std::path::Path::new("/folder").join(name))(
            source,
        ))
    };
    let first = error("open", "seg-1");
    assert!(
        first.contains("/folder") && first.contains("Too many open files"),
        "{first}"
    );
    assert_eq!(first, error("open", "seg-2"));
    assert_ne!(first, error("map", "seg-2"));
}
