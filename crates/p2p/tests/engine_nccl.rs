//! Workers whose caches are on a device, with NCCL beside it; there is neither, both are stand-ins. The risks: a lane is chosen
//! that does not work while another would, a reason that nobody is told, more communicators than one for a pair.

#[allow(dead_code, reason = "shared with other tests, which use more of it")]
mod device_pair;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use device_pair::{
    Gpu, NCCL_VARIABLE, Prefill, SOURCES, TARGETS, decode, done, offer, order, prefill, pull, wait,
};
use kvlane_p2p::LaneChoice;
use kvlane_p2p::proto::{DenyReason, PullResult};

/// Calls are counted for the whole process, so the tests take turns.
static TURN: Mutex<()> = Mutex::new(());

const WITH_NCCL: (&str, &str) = (NCCL_VARIABLE, "1");
/// Memory of this process cannot be shared.
const WITHOUT_CUDA: (&str, &str) = ("KVLANE_CUDA_STAND_IN_FAIL", "cuIpcGetMemHandle:0:801");

fn with_nccl() -> MutexGuard<'static, ()> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    kvlane_cuda_stand_in::load();
    kvlane_nccl_stand_in::load();
    turn
}

fn check_devices() {
    assert_eq!(kvlane_cuda_stand_in::load().violations(), Vec::<String>::new());
}

#[test]
fn the_best_lane_that_works_is_chosen_and_any_of_them_can_be_forced() {
    let _turn = with_nccl();
    for (settings, lane, used) in [
        (&[WITH_NCCL][..], LaneChoice::Auto, "cuda"),
        (&[WITH_NCCL], LaneChoice::Nccl, "nccl"),
        (&[WITH_NCCL], LaneChoice::Tcp, "tcp"),
        (&[WITH_NCCL, WITHOUT_CUDA], LaneChoice::Auto, "nccl"),
        (&[WITHOUT_CUDA], LaneChoice::Auto, "tcp"),
        (&[], LaneChoice::Auto, "cuda"),
    ] {
        let prefill = Prefill::start(settings);
        assert_eq!(
            pull(prefill.port, lane),
            (PullResult::Done, vec![used]),
            "{lane:?} {settings:?}"
        );
        prefill.end();
    }
    check_devices();
}

/// The two workers are in one process, where CUDA opens no handles.
#[test]
fn memory_that_cannot_be_mapped_goes_over_nccl() {
    let _turn = with_nccl();
    let gpu = Gpu::new();
    let prefill = prefill(&gpu);
    assert!(prefill.offer(offer(&SOURCES)).expect("accepted"));
    gpu.compute(1);
    prefill
        .progress_after(&[("hold", done(4))], gpu.stream())
        .expect("accepted");
    assert_eq!(
        pull(prefill.port().expect("it listens"), LaneChoice::Auto),
        (PullResult::Done, vec!["nccl"])
    );
    check_devices();
}

#[test]
fn another_version_of_nccl_is_refused_where_it_is_forced_and_else_not_used() {
    let _turn = with_nccl();
    let other = ("KVLANE_NCCL_STAND_IN_VERSION", "22708");
    for settings in [&[WITH_NCCL, WITHOUT_CUDA, other][..], &[WITHOUT_CUDA]] {
        let prefill = Prefill::start(settings);
        let (result, _) = pull(prefill.port, LaneChoice::Nccl);
        // The first pull may be asked for before the peer has said what it is.
        assert!(
            result == PullResult::Denied(DenyReason::Namespace) || result == PullResult::Unreachable,
            "{settings:?}: {result:?}"
        );
        assert_eq!(
            pull(prefill.port, LaneChoice::Auto),
            (PullResult::Done, vec!["tcp"]),
            "{settings:?}"
        );
        prefill.end();
    }
    check_devices();
}

#[test]
fn a_communicator_that_cannot_be_made_fails_where_it_is_forced_and_else_tcp_is_used() {
    let _turn = with_nccl();
    let settings = ("KVLANE_NCCL_STAND_IN_FAIL", "init:0:2");
    let prefill = Prefill::start(&[WITH_NCCL, WITHOUT_CUDA, settings]);
    assert_eq!(
        pull(prefill.port, LaneChoice::Nccl),
        (PullResult::Failed, Vec::new())
    );
    assert_eq!(
        pull(prefill.port, LaneChoice::Auto),
        (PullResult::Done, vec!["tcp"])
    );
    prefill.end();
    check_devices();
}

#[test]
fn all_transfers_of_a_pair_share_one_communicator_which_ends_with_the_worker() {
    let _turn = with_nccl();
    let nccl = kvlane_nccl_stand_in::load();
    let gone = |count| {
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while nccl.communicators() > count {
            assert!(std::time::Instant::now() < until, "a communicator is left");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    // Those of the tests before.
    gone(0);
    let prefill = Prefill::start(&[WITH_NCCL]);
    let gpu = Gpu::new();
    let worker = decode(&gpu, LaneChoice::Nccl);
    let before = nccl.calls("ncclCommInitRankConfig");
    // As many as there are threads, at the same time.
    for _ in 0..3 {
        let jobs = [0, 1].map(|_| {
            worker
                .pull_after(order(prefill.port, &TARGETS), gpu.stream())
                .expect("accepted")
        });
        for job in jobs {
            assert_eq!(wait(&worker, job), PullResult::Done);
        }
    }
    assert_eq!(nccl.calls("ncclCommInitRankConfig") - before, 1);
    assert_eq!(nccl.communicators(), 1);
    for (target, source) in TARGETS.into_iter().zip(SOURCES) {
        assert!(gpu.has(target, 1, source));
    }
    worker.close();
    drop(worker);
    gone(0);
    prefill.end();
    check_devices();
}

#[test]
fn a_group_that_fails_costs_one_pull_and_the_next_one_makes_a_new_communicator() {
    let _turn = with_nccl();
    let nccl = kvlane_nccl_stand_in::load();
    let prefill = Prefill::start(&[WITH_NCCL]);
    let gpu = Gpu::new();
    let worker = decode(&gpu, LaneChoice::Nccl);
    let pull = || {
        let job = worker
            .pull_after(order(prefill.port, &TARGETS), gpu.stream())
            .expect("accepted");
        wait(&worker, job)
    };
    assert_eq!(pull(), PullResult::Done);
    nccl.fail("group", 0, 6);
    assert_eq!(pull(), PullResult::Failed);
    nccl.fail("group", 0, 0);
    assert_eq!(pull(), PullResult::Done);
    assert!(gpu.has(TARGETS[0], 1, SOURCES[0]));
    drop(worker);
    prefill.end();
    check_devices();
}
