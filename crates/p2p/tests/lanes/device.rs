//! What belongs to lanes of a device alone: offers that lie, peers that stop, copies that are merged, errors of the driver.
//! There is no device: the driver is a stand-in.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kvlane_core::PagedMemory;
use kvlane_cuda::{CacheOffer, CudaError};
use kvlane_p2p::lanes::{CudaLane, Lane, LaneError, LocalCache, Pairing, RemoteCache, RemoteRegion, TcpLane};
use kvlane_tests::timing::within;
use rustix::process::Signal;

use crate::fixture::Form;
use crate::holder::{Holder, Kind, Layout, check_device, content, patient};
use crate::{LEASE, Place, SLACK, SMALL, copy, holder_for, span};

fn cuda_holder() -> Holder {
    holder_for(Kind::Cuda, SMALL, Place::Child)
}

/// Why an offer is not taken.
fn refusal(offer: &CacheOffer) -> CudaError {
    SMALL.device_cache().map_peer(offer, &patient()).unwrap_err()
}

#[test]
fn an_offer_whose_token_is_not_there_is_refused() {
    let holder = cuda_holder();
    let honest = holder.hello.offer.clone().unwrap();
    let mut other_token = honest.clone();
    other_token.token[3] ^= 1;
    let told = refusal(&other_token).to_string();
    assert!(told.contains("its token is not in the memory"), "{told}");
    let mut other_place = honest.clone();
    other_place.token_address += 16;
    assert!(matches!(refusal(&other_place), CudaError::Offer(_)));
    let mut nowhere = honest.clone();
    nowhere.token_address = 1;
    let told = refusal(&nowhere).to_string();
    assert!(told.contains("not in what it has offered"), "{told}");
}

#[test]
fn allocations_that_are_shorter_than_offered_and_handles_that_are_none_are_refused() {
    let holder = cuda_holder();
    let honest = holder.hello.offer.clone().unwrap();
    let mut longer = honest.clone();
    longer.allocations[0].len_bytes += 1;
    let told = refusal(&longer).to_string();
    assert!(told.contains("of which"), "{told}");
    let mut garbage = honest.clone();
    garbage.allocations[0].handle = [7; 64];
    let told = refusal(&garbage).to_string();
    assert!(
        told.contains("cuIpcOpenMemHandle_v2 failed with CUDA_ERROR_INVALID_VALUE"),
        "{told}"
    );
    let mut none = honest.clone();
    none.allocations.clear();
    assert!(matches!(refusal(&none), CudaError::Offer(_)));
    let mut wraps = honest;
    wraps.allocations[0].address = u64::MAX - 8;
    assert!(matches!(refusal(&wraps), CudaError::Offer(_)));
}

#[test]
fn the_offer_of_a_peer_that_has_ended_is_refused() {
    let mut holder = cuda_holder();
    let offer = holder.hello.offer.clone().unwrap();
    holder.signal(Signal::KILL);
    assert!(matches!(refusal(&offer), CudaError::Driver { .. }));
}

#[test]
fn a_layout_outside_of_what_was_offered_closes_the_lane_before_a_byte_is_copied() {
    let holder = cuda_holder();
    // The peer says that its blocks lie where it has offered nothing.
    let moved: Vec<RemoteRegion> = holder
        .hello
        .cache
        .regions()
        .iter()
        .map(|region| RemoteRegion {
            address: 0x1_0000,
            ..region.clone()
        })
        .collect();
    let local = SMALL.device_cache();
    let remote = RemoteCache::new(moved, SMALL.blocks).unwrap();
    let pairing = Arc::new(Pairing::new(Arc::clone(&local), remote).unwrap());
    let peer = local
        .map_peer(holder.hello.offer.as_ref().unwrap(), &patient())
        .unwrap();
    let witness = TcpLane::new(holder.connect(), Arc::clone(&pairing)).unwrap();
    let mut lane = CudaLane::new(peer, pairing, Box::new(witness)).unwrap();
    let refused = copy(&mut lane, &span(0..1, &[1], &[1])).unwrap_err();
    assert!(
        matches!(&refused, LaneError::Device(CudaError::Offer(_))),
        "{refused}"
    );
    assert!(!lane.is_open());
    let mut bytes = vec![9; SMALL.layer_bytes];
    local.read_layer(0, 1, &mut bytes);
    assert!(bytes.iter().all(|&byte| byte == 0));
}

#[test]
fn a_stopped_peer_never_overruns_the_deadline_and_nothing_is_written_afterwards() {
    for kind in [Kind::Cuda, Kind::Nccl, Kind::TcpDevice] {
        within(SLACK, || {
            let mut holder = holder_for(kind, SMALL, Place::Child);
            let local = kind.filled(SMALL, 2);
            let mut lane = holder.lane(kind, &local);
            copy(lane.as_mut(), &span(0..1, &[0], &[0])).unwrap();
            holder.signal(Signal::STOP);
            let lasts = Duration::from_millis(100);
            let start = Instant::now();
            let ended = lane.copy(
                &span(0..3, &[5, 6], &[7, 8]),
                LEASE,
                start + lasts,
                &AtomicBool::new(false),
            );
            let took = start.elapsed();
            assert!(
                matches!(ended, Err(LaneError::TimedOut { .. })),
                "{kind:?}: {ended:?}"
            );
            assert!(took >= lasts, "{kind:?}: {took:?}");
            assert!(!lane.is_open());
            // The engine has given the blocks to somebody else.
            for layer in 0..SMALL.layers {
                local.write_layer(layer, 7, &content(3, layer, 7, SMALL.layer_bytes));
            }
            holder.signal(Signal::CONT);
            holder.set(1, 1);
            std::thread::sleep(Duration::from_millis(50));
            let mut bytes = vec![0; SMALL.layer_bytes];
            for layer in 0..SMALL.layers {
                local.read_layer(layer, 7, &mut bytes);
                assert!(bytes == content(3, layer, 7, SMALL.layer_bytes), "{kind:?}");
            }
            check_device(&local);
            took - lasts
        });
    }
}

/// Counts of calls are the process's, so this runs in one of its own.
#[test]
#[ignore = "run by the other tests in a process of its own"]
fn neighbours_in_a_process_of_their_own() {
    let stand_in = kvlane_cuda_stand_in::load();
    let layout = Layout {
        form: Form::BlockMajor,
        ..SMALL
    };
    let holder = holder_for(Kind::Cuda, layout, Place::Child);
    let local = layout.device_cache();
    let mut lane = holder.lane(Kind::Cuda, LocalCache::from(Arc::clone(&local)));
    let counts = || ["cuMemcpyDtoDAsync_v2", "cuLaunchKernel"].map(|call| stand_in.calls(call));
    let before = counts();
    copy(lane.as_mut(), &span(0..1, &[4, 5, 6, 7], &[9, 10, 11, 12])).unwrap();
    let one = counts();
    copy(lane.as_mut(), &span(0..1, &[4, 6, 8], &[1, 2, 3])).unwrap();
    let three = counts();
    println!(
        "answer: {} {} {} {}",
        one[0] - before[0],
        one[1] - before[1],
        three[0] - one[0],
        three[1] - one[1]
    );
    let mut bytes = vec![0; layout.layer_bytes];
    for (theirs, ours) in [(4, 9), (7, 12), (4, 1), (8, 3)] {
        local.read_layer(0, ours, &mut bytes);
        assert!(bytes == content(1, 0, theirs, layout.layer_bytes));
    }
}

/// Runs an ignored test in a process with other settings of the stand-in, and returns its answer.
pub(crate) fn answer(test: &str, settings: &[(&str, &str)]) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", test, "--nocapture"])
        .envs(settings.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let line = text.lines().find_map(|line| line.split_once("answer: "));
    line.unwrap_or_else(|| panic!("no answer in {text}")).1.to_owned()
}

#[test]
fn neighbours_on_both_sides_are_one_copy_and_others_one_launch_where_the_driver_takes_the_kernel() {
    let test = "device::neighbours_in_a_process_of_their_own";
    assert_eq!(answer(test, &[]), "1 0 0 1");
    let old = ("KVLANE_CUDA_STAND_IN_FAIL", "cuModuleLoadData:0:222");
    assert_eq!(answer(test, &[old]), "1 0 3 0");
    // A driver that takes the kernel and does not launch it: copied all the same.
    let refusing = ("KVLANE_CUDA_STAND_IN_FAIL", "cuLaunchKernel:0:801");
    assert_eq!(answer(test, &[refusing]), "1 0 3 1");
}

/// A device that fails stays lost, so this runs in a process of its own.
#[test]
#[ignore = "run by the other tests in a process of its own"]
fn a_failing_device_in_a_process_of_its_own() {
    let stand_in = kvlane_cuda_stand_in::load();
    let holder = cuda_holder();
    let local = Kind::Cuda.filled(SMALL, 2);
    let mut lane = holder.lane(Kind::Cuda, &local);
    // The second copy of a span cannot be started; the first is waited for.
    stand_in.fail("cuLaunchKernel", 0, 801);
    stand_in.fail("cuMemcpyDtoDAsync_v2", 1, 700);
    let failed = copy(lane.as_mut(), &span(0..3, &[1, 3], &[5, 7])).unwrap_err();
    assert!(
        matches!(&failed, LaneError::Device(CudaError::Driver { code: 700, .. })),
        "{failed}"
    );
    assert!(!lane.is_open());
    assert_eq!(stand_in.violations(), Vec::<String>::new());
    println!("answer: {failed}");
}

#[test]
fn an_error_of_the_driver_ends_a_copy_and_is_told() {
    let told = answer("device::a_failing_device_in_a_process_of_its_own", &[]);
    assert_eq!(
        told,
        "on the GPU: cuMemcpyDtoDAsync_v2 failed with CUDA_ERROR_ILLEGAL_ADDRESS (700) while starting a copy between \
         devices"
    );
}
