//! Workers whose caches are on a device; there is none, the driver is a stand-in whose streams are late. The risks: blocks
//! are read before the compute stream has written them, or written while it still does; a lane that is not possible.

#[allow(dead_code, reason = "shared with other tests, which use more of it")]
mod device_pair;

use std::process::Command;
use std::time::{Duration, Instant};

use device_pair::{
    Gpu, KERNEL, LONG_KERNEL, PATIENCE, Prefill, SOURCES, TARGETS, decode, done, offer, order, prefill,
    prefill_with, pull, wait,
};
use kvlane_p2p::proto::{DenyReason, PullResult};
use kvlane_p2p::{LaneChoice, PullOrder};
use kvlane_tests::timing::attempts;

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
fn blocks_that_prefill_still_computes_are_not_read_however_soon_decode_asks() {
    for (lane, used) in [(LaneChoice::Cuda, "cuda"), (LaneChoice::Tcp, "tcp")] {
        let mut kernels = [1, 2, 4, 4, 4].into_iter();
        attempts(|| {
            let kernel = LONG_KERNEL * kernels.next().expect("one for each attempt");
            let prefill = Prefill::start_with(kernel, &[]);
            let started = Instant::now();
            let gpu = Gpu::new();
            let decode = decode(&gpu, lane);
            // Nothing is on decode's stream, so it asks at once.
            let job = decode
                .pull_after(order(prefill.port, &TARGETS), gpu.stream())
                .expect("accepted");
            assert_eq!(wait(&decode, job), PullResult::Done, "{lane:?}");
            let took = started.elapsed();
            for (target, source) in TARGETS.into_iter().zip(SOURCES) {
                assert!(gpu.has(target, 1, source), "{lane:?}: block {target}");
            }
            assert!(decode.stats().pulled_bytes.contains_key(used));
            prefill.end();
            // The kernel began before the port was known; starting the processes took some of its time.
            if took > kernel / 3 {
                Ok(())
            } else {
                Err(format!("{lane:?}: {took:?} of {kernel:?}"))
            }
        });
    }
}

#[test]
fn what_prefill_does_not_allow_is_not_offered() {
    let gpu = Gpu::new();
    let prefill = prefill_with(&gpu, LaneChoice::Tcp);
    assert!(prefill.offer(offer(&SOURCES)).expect("accepted"));
    gpu.compute(1);
    prefill
        .progress_after(&[("hold", done(4))], gpu.stream())
        .expect("accepted");
    let port = prefill.port().expect("it listens");
    let refused = (PullResult::Denied(DenyReason::Namespace), Vec::new());
    assert_eq!(pull(port, LaneChoice::Cuda), refused);
    assert_eq!(pull(port, LaneChoice::Auto), (PullResult::Done, vec!["tcp"]));
}

/// A program of its own, because calls are counted by process.
#[test]
fn the_memory_of_a_prefill_server_that_is_gone_is_let_go_of_by_a_decode_server_that_does_nothing() {
    let test =
        "the_memory_of_a_prefill_server_that_is_gone_is_let_go_of_by_a_decode_server_that_does_nothing";
    let alone = "KVLANE_P2P_TEST_ALONE";
    if std::env::var_os(alone).is_none() {
        let ended = Command::new(std::env::current_exe().expect("a path"))
            .args(["--exact", test, "--nocapture"])
            .env(alone, "1")
            .status();
        assert!(ended.expect("it starts").success());
        return;
    }
    let stand_in = kvlane_cuda_stand_in::load();
    let mut prefill = Prefill::start(&[]);
    let gpu = Gpu::new();
    let decode = decode(&gpu, LaneChoice::Cuda);
    let job = decode
        .pull_after(order(prefill.port, &TARGETS), gpu.stream())
        .expect("accepted");
    assert_eq!(wait(&decode, job), PullResult::Done);
    let opened = stand_in.calls("cuIpcOpenMemHandle_v2");
    assert!(opened > 0);
    assert_eq!(stand_in.calls("cuIpcCloseMemHandle"), 0);
    prefill.child.kill().expect("it runs");
    let _ = prefill.child.wait();
    let deadline = Instant::now() + PATIENCE;
    while stand_in.calls("cuIpcCloseMemHandle") < opened {
        assert!(Instant::now() < deadline, "mapped memory is kept");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(decode);
}

#[test]
fn memory_that_cannot_be_shared_goes_over_tcp_unless_cuda_is_forced() {
    let prefill = Prefill::start(&[("KVLANE_CUDA_STAND_IN_FAIL", "cuIpcGetMemHandle:0:801")]);
    let refused = PullResult::Denied(DenyReason::Namespace);
    for lane in [LaneChoice::Cuda, LaneChoice::Shm] {
        assert_eq!(pull(prefill.port, lane), (refused, Vec::new()), "{lane:?}");
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
            .progress_after(&[("hold", done(4))], gpu.stream())
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
        .progress_after(&[("hold", done(4))], source.stream())
        .expect("accepted");
    // Preempted before the stream came to it, and begun anew in other blocks.
    assert!(prefill.revoke("hold").expect("accepted"));
    assert!(prefill.offer(offer(&[0, 1, 2, 6])).expect("accepted"));
    let mut short = order(prefill.port().expect("it listens"), &TARGETS);
    short.timeout = 4 * KERNEL;
    let job = decode.pull_after(short, target.stream()).expect("accepted");
    assert_eq!(wait(&decode, job), PullResult::TimedOut);
    prefill
        .progress_after(&[("hold", done(4))], source.stream())
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
    gpu.compute_for(2, 2 * PATIENCE); // nobody waits for its end
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
    let told = prefill.progress(&[("hold", done(4))]).unwrap_err().to_string();
    assert!(
        told.contains("stream is none, allowed: the compute stream"),
        "{told}"
    );
    assert!(decode.pull(order(1, &TARGETS)).is_err());
}
