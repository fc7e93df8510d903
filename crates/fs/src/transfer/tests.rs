use super::*;
use crate::fixture::{Folder, NAMESPACE, cache, key};
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
