use super::*;
use crate::fixture::{Folder, LISTING_PATIENCE, NAMESPACE, cache, key};
use crate::options::Medium;
use kvlane_core::LoadOrder;

#[test]
fn in_a_forked_child_every_call_returns_though_the_parent_had_the_locks() {
    let folder = Folder::new(8 << 20);
    let options = FsOptions::default().with_medium(crate::options::Medium::Disk);
    let mut transfer = FsTransfer::open(folder.path(), NAMESPACE, cache(), &options, true).unwrap();
    let (own, shared) = (transfer.process, Arc::clone(&transfer.shared));
    // What a child sees: another process id, and locks whose holder was not copied.
    transfer.process = own.wrapping_add(1);
    let _jobs = shared.jobs.lock_all_for_test();
    let _index = lock(&shared.index);
    let (sender, receiver) = std::sync::mpsc::channel();
    let child = std::thread::spawn(move || {
        let _loads = lock(&transfer.loads);
        let _threads = lock(&transfer.threads);
        let deadline = Instant::now() + Duration::from_secs(5);
        let (keys, blocks) = (vec![key(1)], vec![0]);
        let store = StoreRequest {
            keys: keys.clone(),
            blocks: blocks.clone(),
            first_depth: 0,
            deadline,
        };
        let load = LoadRequest {
            keys: keys.clone(),
            blocks,
            deadline,
            order: LoadOrder::BlockMajor,
        };
        let refused = [
            transfer.begin_store(store).map(drop),
            transfer.load(load).map(drop),
            transfer.layer_ready(JobId(1), 0),
            transfer.finish_store(JobId(1)),
            transfer.wait(JobId(1), deadline).map(drop),
            transfer.wait_layer(JobId(1), 0, deadline).map(drop),
            transfer.reset(),
        ];
        assert!(refused.iter().all(Result::is_err), "{refused:?}");
        transfer.reserve(&keys, 0, deadline).unwrap();
        transfer.withdraw(&keys).unwrap();
        transfer.cancel(JobId(1));
        assert_eq!(transfer.lookup(&keys), Availability::default());
        let mut done = Vec::new();
        transfer.poll(&mut done);
        assert_eq!(done, []);
        transfer.stats();
        transfer.close();
        drop((_loads, _threads));
        sender.send(transfer).unwrap();
    });
    let transfer = receiver.recv_timeout(Duration::from_secs(10));
    let Ok(mut transfer) = transfer else {
        // Its locks can be given back: a hang shows here as a failure and not as one of the test.
        panic!("a call hangs, or: {:?}", child.is_finished());
    };
    drop((_jobs, _index));
    transfer.process = own;
}

#[test]
fn an_open_that_fails_half_way_leaves_no_thread_behind() {
    use std::sync::atomic::AtomicUsize;

    let folder = Folder::new(8 << 20);
    let options = FsOptions::default().with_io_threads(1).with_medium(Medium::Disk);
    for can_store in [true, false] {
        for started_first in 0.. {
            let (started, running) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
            let (count, alive) = (Arc::clone(&started), Arc::clone(&running));
            let spawn = move |name: String, work: Box<dyn FnOnce() + Send>| {
                if count.fetch_add(1, Ordering::Relaxed) == started_first {
                    return Err(std::io::ErrorKind::WouldBlock.into());
                }
                alive.fetch_add(1, Ordering::Relaxed);
                let alive = Arc::clone(&alive);
                std::thread::Builder::new().name(name).spawn(move || {
                    work();
                    alive.fetch_sub(1, Ordering::Relaxed);
                })
            };
            let opened = FsTransfer::open_with(
                folder.path(),
                NAMESPACE,
                cache().into(),
                &options,
                can_store,
                &spawn,
            );
            let is_open = opened.is_ok();
            drop(opened);
            let end = Instant::now() + Duration::from_secs(10);
            while running.load(Ordering::Relaxed) > 0 {
                assert!(Instant::now() < end, "threads are left after {started_first}");
                std::thread::sleep(Duration::from_millis(1));
            }
            if is_open {
                assert_eq!(started.load(Ordering::Relaxed), started_first);
                break;
            }
        }
    }
}

#[test]
fn a_store_that_no_writer_takes_and_that_is_late_too_ends_once() {
    const STORES: usize = 20_000;
    let folder = Folder::new(8 << 20);
    let options = FsOptions::default().with_medium(Medium::Disk);
    let transfer = FsTransfer::open(folder.path(), NAMESPACE, cache(), &options, true).unwrap();
    transfer.shared.tell_writer(Command::Stop);
    let end = Instant::now() + Duration::from_secs(10);
    while transfer.shared.tell_writer(Command::Stop) {
        assert!(Instant::now() < end, "the writer does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    let stopped = AtomicBool::new(false);
    let mut done = Vec::new();
    std::thread::scope(|scope| {
        // The clock: it ends what is late, and every store is.
        scope.spawn(|| {
            while !stopped.load(Ordering::Relaxed) {
                transfer.shared.jobs.expire();
            }
        });
        for _ in 0..STORES {
            let store = StoreRequest {
                keys: vec![key(1)],
                blocks: vec![0],
                first_depth: 0,
                deadline: Instant::now(),
            };
            let _ = transfer.begin_store(store);
        }
        stopped.store(true, Ordering::Relaxed);
    });
    transfer.poll(&mut done);
    assert_eq!(done.len(), STORES);
}

#[test]
fn what_waits_for_a_writer_that_stands_still_has_a_bound() {
    let folder = Folder::new(8 << 20);
    let options = FsOptions::default().with_medium(Medium::Disk);
    let spawn = |name: String, work: Box<dyn FnOnce() + Send>| {
        let stands_still = name == "kvlane-writer";
        std::thread::Builder::new().name(name).spawn(move || {
            if stands_still {
                // With its end of the channel, as a thread that never comes back from the kernel.
                std::mem::forget(work);
            } else {
                work();
            }
        })
    };
    let transfer =
        FsTransfer::open_with(folder.path(), NAMESPACE, cache().into(), &options, true, &spawn).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    let keys = [key(1)];
    for _ in 0..crate::shared::COMMANDS_MAX {
        transfer.reserve(&keys, 0, deadline).unwrap();
        transfer.withdraw(&keys).unwrap();
    }
    assert!(transfer.shared.commands_waiting() <= crate::shared::COMMANDS_MAX);
}

#[test]
fn a_block_with_wrong_bytes_is_absent_for_everybody_and_can_be_stored_again() {
    use std::os::unix::fs::FileExt;

    use crate::index::LookupCursor;

    let folder = Folder::new(8 << 20);
    let mut options = FsOptions::default().with_medium(Medium::Disk);
    options.listing_patience = Some(LISTING_PATIENCE);
    let open = |can_store| FsTransfer::open(folder.path(), NAMESPACE, cache(), &options, can_store).unwrap();
    let (producer, consumer) = (open(true), open(false));
    let scheduler = crate::reader::FsReader::open(folder.path(), vec![NAMESPACE], &options).unwrap();
    let (keys, soon) = (vec![key(1)], || Instant::now() + Duration::from_secs(10));
    let mut cursor = LookupCursor::default();
    let mut ready = || scheduler.lookup(&keys, &mut cursor).ready_blocks;
    let store = || {
        let request = StoreRequest {
            keys: keys.clone(),
            blocks: vec![0],
            first_depth: 0,
            deadline: soon(),
        };
        let job = producer.begin_store(request).unwrap();
        producer.finish_store(job).unwrap();
        producer.wait(job, soon()).unwrap().unwrap().outcome
    };
    let load = || {
        let request = LoadRequest {
            keys: keys.clone(),
            blocks: vec![1],
            deadline: soon(),
            order: LoadOrder::BlockMajor,
        };
        let job = consumer.load(request).unwrap();
        consumer.wait(job, soon()).unwrap().unwrap().outcome
    };
    let reason = |outcome: &Outcome| match outcome {
        Outcome::Miss { reason, .. } => Some(*reason),
        _ => None,
    };
    assert_eq!((store(), load(), ready()), (Outcome::Done, Outcome::Done, 1));
    let found = producer.shared.look().find(0, &keys[0]).unwrap();
    let file = std::fs::File::options()
        .write(true)
        .open(&found.view.path)
        .unwrap();
    let offset = found.view.header.slot_offset(found.slot);
    file.write_all_at(&[0xa5; 64], offset).unwrap();
    assert_eq!(reason(&load()), Some(MissReason::Corrupt));
    assert_eq!(ready(), 0, "the same cursor had counted it");
    assert_eq!((store(), load(), ready()), (Outcome::Done, Outcome::Done, 1));
    assert_eq!(producer.stats().stored_blocks, 2);
    let end = soon();
    while found.view.sequence(found.slot) == found.sequence || found.view.is_bad(found.slot) {
        assert!(Instant::now() < end, "the owner does not use the slot again");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn one_damaged_sequence_costs_one_slot_and_no_store() {
    let folder = Folder::new(1 << 20);
    let mut options = FsOptions::default().with_medium(Medium::Disk);
    options.listing_patience = Some(LISTING_PATIENCE);
    let open = || FsTransfer::open(folder.path(), NAMESPACE, cache(), &options, true).unwrap();
    let store = |transfer: &FsTransfer, chain: u32| {
        let deadline = Instant::now() + Duration::from_secs(10);
        let request = StoreRequest {
            keys: (0..6).map(|block| key(chain * 6 + block)).collect(),
            blocks: (0..6).collect(),
            first_depth: 0,
            deadline,
        };
        let job = transfer.begin_store(request).unwrap();
        transfer.finish_store(job).unwrap();
        transfer.wait(job, deadline).unwrap().unwrap().outcome
    };
    let writer = open();
    for chain in 0..30 {
        assert_eq!(store(&writer, chain), Outcome::Done);
    }
    let found = writer.shared.look().find(0, &key(29 * 6)).unwrap();
    drop(writer);
    let file = std::fs::File::options()
        .write(true)
        .open(&found.view.path)
        .unwrap();
    let offset = found.view.header.sequence_offset(found.slot);
    std::os::unix::fs::FileExt::write_all_at(&file, &(u64::MAX - 1).to_le_bytes(), offset).unwrap();
    let writer = open();
    for chain in 30..90 {
        assert_eq!(store(&writer, chain), Outcome::Done, "{chain}");
    }
}

#[test]
fn a_writer_says_the_capacity_whoever_opened_the_folder_first_and_only_while_it_is_empty() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("store");
    let mut options = FsOptions::default().with_medium(Medium::Disk);
    options.listing_patience = Some(LISTING_PATIENCE);
    let open =
        |options: &FsOptions, can_store| FsTransfer::open(&path, NAMESPACE, cache(), options, can_store);
    let consumer = open(&options, false).unwrap();
    let scheduler = crate::reader::FsReader::open(&path, vec![NAMESPACE], &options).unwrap();
    let small = options.clone().with_capacity_bytes(8 << 20);
    let producer = open(&small, true).unwrap();
    for seen in [&consumer, &producer] {
        assert_eq!(seen.shared.directory.control.capacity_bytes(), 8 << 20);
    }
    let request = StoreRequest {
        keys: vec![key(1)],
        blocks: vec![0],
        first_depth: 0,
        deadline: Instant::now() + Duration::from_secs(10),
    };
    let job = producer.begin_store(request).unwrap();
    producer.finish_store(job).unwrap();
    producer
        .wait(job, Instant::now() + Duration::from_secs(10))
        .unwrap();
    let mut cursor = crate::index::LookupCursor::default();
    assert_eq!(scheduler.lookup(&[key(1)], &mut cursor).ready_blocks, 1);
    // Somebody writes, and then there are blocks.
    let other = options.with_capacity_bytes(16 << 20);
    let refused = || {
        let error = open(&other, true).unwrap_err();
        assert!(
            matches!(error, crate::error::FsError::CapacityMismatch { recorded, .. } if recorded == 8 << 20),
            "{error}"
        );
    };
    refused();
    producer.close();
    drop(producer);
    refused();
}
