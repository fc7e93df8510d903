//! Workers whose caches are on a device; there is none, the driver is a stand-in whose streams are late. The risks: blocks
//! are read before the compute stream has written them, or written while it still does; a lane that is not possible.

#[allow(dead_code, reason = "shared with other tests, which use more of it")]
mod device_pair;

use device_pair::{
    Gpu, KERNEL, PATIENCE, Prefill, SOURCES, TARGETS, decode, done, offer, order, prefill, pull, wait,
};
use kvlane_p2p::proto::{DenyReason, PullResult};
use kvlane_p2p::{LaneChoice, PullOrder};

#[test]
fn a_prompt_moves_after_the_compute_streams_of_both_sides_and_over_the_lane_that_was_asked_for() {
    for (lane, used) in [
        (LaneChoice::Auto, "cuda"),
        (LaneChoice::Cuda, "cuda"),
        (LaneChoice::Tcp, "tcp"),
    ] {
        let prefill = Prefill::start(&[]);
        assert_eq!(
            pull(prefill.port, lane),
            (PullResult::Done, vec![used]),
            "{lane:?}"
        );
        prefill.end();
    }
    assert_eq!(kvlane_cuda_stand_in::load().violations(), Vec::<String>::new());
}

#[test]
fn memory_that_cannot_be_shared_goes_over_tcp_unless_cuda_is_forced() {
    let prefill = Prefill::start(&[("KVLANE_CUDA_STAND_IN_FAIL", "cuIpcGetMemHandle:0:801")]);
    let refused = PullResult::Denied(DenyReason::Namespace);
    for lane in [LaneChoice::Cuda, LaneChoice::Shm] {
        let (result, _) = pull(prefill.port, lane);
        // The first pull may be asked for before the peer has said what it is.
        assert!(
            result == refused || result == PullResult::Unreachable,
            "{lane:?}: {result:?}"
        );
    }
    assert_eq!(
        pull(prefill.port, LaneChoice::Auto),
        (PullResult::Done, vec!["tcp"])
    );
    prefill.end();
}

/// The two workers are in one process, where CUDA opens no handles.
#[test]
fn memory_that_cannot_be_mapped_goes_over_tcp_unless_cuda_is_forced() {
    for (lane, expected) in [
        (LaneChoice::Auto, (PullResult::Done, vec!["tcp"])),
        (LaneChoice::Cuda, (PullResult::Failed, Vec::new())),
    ] {
        let gpu = Gpu::new();
        let prefill = prefill(&gpu);
        assert!(prefill.offer(offer(&SOURCES)).expect("accepted"));
        gpu.compute(1);
        prefill
            .progress_after("hold", done(4), gpu.stream())
            .expect("accepted");
        assert_eq!(pull(prefill.port().expect("it listens"), lane), expected);
    }
}

#[test]
fn progress_of_a_revoked_offer_is_not_told_for_the_next_one_of_that_name() {
    let (source, target) = (Gpu::new(), Gpu::new());
    let (prefill, decode) = (prefill(&source), decode(&target, LaneChoice::Tcp));
    assert!(prefill.offer(offer(&SOURCES)).expect("accepted"));
    source.compute(1);
    prefill
        .progress_after("hold", done(4), source.stream())
        .expect("accepted");
    // Preempted before the stream came to it, and begun anew in other blocks.
    assert!(prefill.revoke("hold").expect("accepted"));
    assert!(prefill.offer(offer(&[0, 1, 2, 6])).expect("accepted"));
    let mut short = order(prefill.port().expect("it listens"), &TARGETS);
    short.timeout = 4 * KERNEL;
    let job = decode.pull_after(short, target.stream()).expect("accepted");
    assert_eq!(wait(&decode, job), PullResult::TimedOut);
    prefill
        .progress_after("hold", done(4), source.stream())
        .expect("accepted");
    let again = order(prefill.port().expect("it listens"), &TARGETS);
    let job = decode.pull_after(again, target.stream()).expect("accepted");
    assert_eq!(wait(&decode, job), PullResult::Done);
    assert!(target.has(TARGETS[3], 1, 6));
}

#[test]
fn a_pull_that_waits_for_the_stream_ends_when_it_is_cancelled_times_out_or_the_worker_is_closed() {
    let gpu = Gpu::new();
    let decode = decode(&gpu, LaneChoice::Auto);
    let address = 1; // nobody listens there, and nobody is asked
    gpu.compute(2);
    let begin = |timeout| {
        let order = PullOrder {
            timeout,
            ..order(address, &TARGETS)
        };
        decode.pull_after(order, gpu.stream()).expect("accepted")
    };
    let (cancelled, late, left) = (begin(PATIENCE), begin(KERNEL / 10), begin(PATIENCE));
    decode.cancel(cancelled);
    assert_eq!(wait(&decode, cancelled), PullResult::Cancelled);
    assert_eq!(wait(&decode, late), PullResult::TimedOut);
    decode.close();
    assert_eq!(wait(&decode, left), PullResult::Unreachable);
}

#[test]
fn without_a_stream_nothing_of_a_device_is_told_or_pulled() {
    let gpu = Gpu::new();
    let (prefill, decode) = (prefill(&gpu), decode(&gpu, LaneChoice::Auto));
    let told = prefill.progress("hold", done(4)).unwrap_err().to_string();
    assert!(
        told.contains("stream is none, allowed: the compute stream"),
        "{told}"
    );
    assert!(decode.pull(order(1, &TARGETS)).is_err());
}
