use std::sync::Mutex;

use super::*;
use crate::directory::Directory;
use crate::fixture::{Folder, NAMESPACE};
use crate::index::Index;
use crate::lister::list;
use crate::options::{FsOptions, Medium};

/// Lists the folder anew, and answers how many segments the index knows then.
fn listed(directory: &Directory, index: &Mutex<Index>) -> usize {
    directory.control.bump_generation();
    list(directory, index);
    lock(index).segment_count()
}

#[test]
fn all_folders_of_a_process_are_counted_together() {
    let folder = Folder::new(8 << 20);
    let options = FsOptions::default().with_medium(Medium::Disk);
    let open = || Directory::open(folder.path(), &options, false).unwrap().unwrap();
    let (worker, scheduler) = (open(), open());
    assert!(Arc::ptr_eq(&worker.descriptors.0, &scheduler.descriptors.0));
}

#[test]
fn a_worker_and_a_scheduler_in_one_process_share_what_segments_may_take() {
    let folder = Folder::new(8 << 20);
    let _others = [(); 10].map(|()| folder.segment(1, 1));
    let mut worker = folder.open_again();
    worker.descriptors = Share::of_another_process(8);
    let index = || Mutex::new(Index::new(&[NAMESPACE]));
    let (worker_index, scheduler_index) = (index(), index());
    assert_eq!(listed(&worker, &worker_index), 6, "what others make leaves room");
    let mut scheduler = folder.open_again();
    scheduler.descriptors = worker.descriptors.beside();
    for _ in 0..3 {
        listed(&scheduler, &scheduler_index);
        assert!(worker.descriptors.0.open() <= 8);
        listed(&worker, &worker_index);
        assert!(worker.descriptors.0.open() <= 8);
    }
    assert_eq!(listed(&worker, &worker_index), 3);
    assert_eq!(listed(&scheduler, &scheduler_index), 3);
    drop((scheduler, scheduler_index));
    assert_eq!(listed(&worker, &worker_index), 6);
    drop(worker_index);
    assert_eq!(worker.descriptors.0.open(), 0);
}

#[test]
fn own_segments_are_known_whatever_others_have_made() {
    let folder = Folder::new(8 << 20);
    let _others = [(); 10].map(|()| folder.segment(1, 1));
    let mut worker = folder.open_again();
    worker.descriptors = Share::of_another_process(8);
    let index = Mutex::new(Index::new(&[NAMESPACE]));
    assert_eq!(listed(&worker, &index), 6);
    let geometry = crate::fixture::geometry();
    let own = [(); 2].map(|()| crate::fixture::segment_of(&worker, &geometry, 1, 2));
    assert_eq!(listed(&worker, &index), 8);
    drop(own);
    assert_eq!(worker.descriptors.own().len(), 0);
}

#[test]
fn a_segment_that_is_open_twice_stays_known_until_both_have_let_go() {
    let share = Share::of_another_process(80);
    let (lost, taken_over) = (share.take_own(7), share.take_own(7));
    drop(lost);
    assert_eq!(share.own(), HashSet::from([7]));
    drop(taken_over);
    assert_eq!(share.own(), HashSet::new());
}

#[test]
fn a_forked_child_takes_no_lock_of_its_parent_and_counts_what_it_inherited() {
    let parent = OfProcess::new(1, 0);
    let share = Share::of(parent.descriptors_of(1));
    let _open = share.take();
    let _held = lock(&share.0.own);
    let child = Share::of(parent.descriptors_of(2));
    assert_eq!(child.own(), HashSet::new());
    assert_eq!(child.0.open(), 1);
    assert!(Arc::ptr_eq(&parent.descriptors_of(2), &child.0));
    assert!(Arc::ptr_eq(&parent.descriptors_of(1), &share.0));
}
