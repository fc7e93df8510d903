//! What belongs to the lane over communicators alone: groups that never end, errors that come later, versions, and what an abort
//! leaves behind. There is no NCCL: it is a stand-in, over sockets.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kvlane_core::PagedMemory;
use kvlane_cuda::{CommunicatorId, CudaError, Rank};
use kvlane_p2p::lanes::{Lane, LaneError, LocalCache, NcclLane, Pairing, RemoteCache, TcpLane};
use kvlane_tests::timing::within;
use rustix::process::Signal;

use crate::device::answer;
use crate::fixture::Form;
use crate::holder::{Holder, Kind, Layout, STAGING_BYTES, check_device, content, patient};
use crate::{LEASE, Place, SLACK, SMALL, copy, holder_for, holder_with, soon, span};

/// Two groups of sends and more.
const LONG: Layout = Layout {
    form: Form::KvOuter,
    layers: 4,
    blocks: 32,
    layer_bytes: 128 << 10,
};

fn long_span() -> kvlane_p2p::lanes::Span {
    let blocks: Vec<u32> = (0..LONG.blocks).collect();
    span(0..LONG.layers, &blocks, &blocks)
}

/// All bytes of a holder's blocks have come.
fn check_all(local: &LocalCache, layout: Layout) {
    let mut bytes = vec![0; layout.layer_bytes];
    for layer in 0..layout.layers {
        for block in 0..layout.blocks {
            local.read_layer(layer, block, &mut bytes);
            assert!(
                bytes == content(1, layer, block, layout.layer_bytes),
                "layer {layer}, block {block}"
            );
        }
    }
    check_device(local);
}

/// What the next holder and a new communicator bring is right.
fn check_next(local: &LocalCache) {
    let holder = holder_for(Kind::Nccl, LONG, Place::Child);
    let mut lane = holder.lane(Kind::Nccl, local);
    copy(lane.as_mut(), &long_span()).unwrap();
    check_all(local, LONG);
}

fn lane(holder: &Holder, local: &LocalCache) -> Box<dyn Lane> {
    holder.lane(Kind::Nccl, local)
}

#[test]
fn a_peer_killed_in_the_middle_of_a_group_is_gone_at_once_and_the_next_transfer_has_a_new_communicator() {
    within(SLACK, || {
        // Its second group never ends.
        let mut holder = holder_with(Kind::Nccl, LONG, &[("KVLANE_NCCL_STAND_IN_FAIL", "hang:1:1")]);
        let local = Kind::Nccl.filled(LONG, 2);
        let mut lane = lane(&holder, &local);
        let (ended, since) = std::thread::scope(|scope| {
            let copying = scope.spawn(|| (copy(lane.as_mut(), &long_span()), Instant::now()));
            std::thread::sleep(Duration::from_millis(300));
            assert!(!copying.is_finished());
            holder.signal(Signal::KILL);
            let since = Instant::now();
            let (ended, at) = copying.join().unwrap();
            (ended, at.saturating_duration_since(since))
        });
        assert!(matches!(ended, Err(LaneError::PeerGone { .. })), "{ended:?}");
        assert!(!lane.is_open());
        assert!(matches!(
            copy(lane.as_mut(), &long_span()),
            Err(LaneError::Closed)
        ));
        check_next(&local);
        since
    });
}

#[test]
fn a_group_that_never_ends_is_left_at_the_deadline_and_nothing_of_it_reaches_a_block_afterwards() {
    within(SLACK, || {
        let holder = holder_with(Kind::Nccl, LONG, &[("KVLANE_NCCL_STAND_IN_FAIL", "hang:0:1")]);
        let local = Kind::Nccl.filled(LONG, 2);
        let mut lane = lane(&holder, &local);
        let lasts = Duration::from_millis(200);
        let start = Instant::now();
        let ended = lane.copy(&long_span(), LEASE, start + lasts, &AtomicBool::new(false));
        let took = start.elapsed();
        assert!(
            matches!(ended, Err(LaneError::TimedOut { done_bytes: 0 })),
            "{ended:?}"
        );
        assert!(took >= lasts, "{took:?}");
        assert!(!lane.is_open());
        // The abort makes the stand-in write once more, into what is the communicator's.
        std::thread::sleep(Duration::from_millis(100));
        let mut bytes = vec![0; LONG.layer_bytes];
        for layer in 0..LONG.layers {
            for block in 0..LONG.blocks {
                local.read_layer(layer, block, &mut bytes);
                assert!(bytes == content(2, layer, block, LONG.layer_bytes));
            }
        }
        check_device(&local);
        check_next(&local);
        took - lasts
    });
}

#[test]
fn an_error_on_the_holders_side_ends_the_copy_and_is_no_reason_to_wait() {
    for failure in ["group:1:6", "ncclGroupEnd:1:3", "ncclSend:1:5"] {
        within(Duration::from_secs(3), || {
            let holder = holder_with(Kind::Nccl, LONG, &[("KVLANE_NCCL_STAND_IN_FAIL", failure)]);
            let local = Kind::Nccl.filled(LONG, 2);
            let mut lane = lane(&holder, &local);
            let start = Instant::now();
            let ended = copy(lane.as_mut(), &long_span());
            let took = start.elapsed();
            assert!(
                matches!(ended, Err(LaneError::PeerGone { .. })),
                "{failure}: {ended:?}"
            );
            assert!(!lane.is_open());
            check_device(&local);
            took
        });
    }
}

/// What is injected is the process's, so this runs in one of its own.
#[test]
#[ignore = "run by the other tests in a process of its own"]
fn failing_calls_in_a_process_of_their_own() {
    let local = Kind::Nccl.filled(LONG, 2);
    let stand_in = kvlane_nccl_stand_in::load();
    let holder = holder_for(Kind::Nccl, LONG, Place::Child);
    for (what, code, told) in [
        ("group", 3, "NCCL failed with 'unknown result code' (3"),
        ("ncclRecv", 5, "ncclRecv failed with 'invalid usage' (5"),
        (
            "ncclGroupEnd",
            1,
            "ncclGroupEnd failed with 'unhandled cuda error'",
        ),
        ("ncclCommGetAsyncError", 3, "ncclCommGetAsyncError failed"),
    ] {
        let mut lane = lane(&holder, &local);
        stand_in.fail(what, 1, code);
        let failed = copy(lane.as_mut(), &long_span()).unwrap_err();
        stand_in.fail(what, 0, 0);
        assert!(
            matches!(&failed, LaneError::Device(CudaError::Nccl { code: found, .. }) if *found == code),
            "{what}: {failed}"
        );
        assert!(failed.to_string().contains(told), "{what}: {failed}");
        assert!(!lane.is_open());
        drop(lane);
        // A communicator that could not be made is none; the next one is.
        stand_in.fail("init", 0, 2);
        let refused = holder.nccl_lane(&local, STAGING_BYTES, soon()).unwrap_err();
        stand_in.fail("init", 0, 0);
        assert!(
            matches!(&refused, LaneError::Unavailable(why) if why.contains("making a communicator")),
            "{refused}"
        );
    }
    let mut lane = holder.lane(Kind::Nccl, &local);
    copy(lane.as_mut(), &long_span()).unwrap();
    check_all(&local, LONG);
    let fall_to = |count| {
        let until = soon();
        while stand_in.communicators() > count {
            assert!(Instant::now() < until, "a communicator is left");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    fall_to(1);
    copy(lane.as_mut(), &long_span()).unwrap();
    assert_eq!(stand_in.communicators(), 1);
    drop(lane);
    fall_to(0);
    check_device(&local);
    println!("answer: done");
}

#[test]
fn an_error_on_the_own_side_is_told_and_the_next_communicator_works() {
    assert_eq!(
        answer("nccl::failing_calls_in_a_process_of_their_own", &[]),
        "done"
    );
}

#[test]
fn another_version_is_refused_with_what_to_do() {
    let holder = holder_with(Kind::Nccl, SMALL, &[("KVLANE_NCCL_STAND_IN_VERSION", "22708")]);
    let local = Kind::Nccl.cache(SMALL);
    let refused = holder.nccl_lane(&local, STAGING_BYTES, soon()).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "lane nccl is not possible: the peer says: NCCL 2.27.8 on the prefill server and 2.29.7 on the decode server: install \
         the same version of PyTorch, or of its package nvidia-nccl, on both"
    );
    // Other lanes to it work.
    copy(
        holder.lane(Kind::TcpDevice, &local).as_mut(),
        &span(0..3, &[1], &[1]),
    )
    .unwrap();
}

#[test]
fn a_holder_that_cannot_take_part_says_why_and_this_side_does_not_wait() {
    let holder = holder_with(Kind::Nccl, SMALL, &[("KVLANE_NCCL_STAND_IN_FAIL", "init:0:2")]);
    let local = Kind::Nccl.cache(SMALL);
    within(Duration::from_secs(3), || {
        let start = Instant::now();
        let refused = holder.nccl_lane(&local, STAGING_BYTES, soon()).unwrap_err();
        let took = start.elapsed();
        assert!(
            matches!(&refused, LaneError::Unavailable(why) if why.contains("unhandled system error")),
            "{refused}"
        );
        took
    });
    for bytes in [257 << 20, 0] {
        let refused = holder.nccl_lane(&local, bytes, soon()).unwrap_err();
        assert!(
            refused.to_string().contains("bytes of staging, allowed"),
            "{refused}"
        );
    }
    let host = holder_for(Kind::Tcp, SMALL, Place::Child);
    let refused = host.nccl_lane(&local, STAGING_BYTES, soon()).unwrap_err();
    assert!(refused.to_string().contains("in host memory"), "{refused}");
}

#[test]
fn a_peer_that_stops_while_a_communicator_is_made_never_overruns_the_deadline() {
    within(SLACK, || {
        let mut holder = holder_for(Kind::Nccl, SMALL, Place::Child);
        let local = Kind::Nccl.cache(SMALL);
        holder.signal(Signal::STOP);
        let lasts = Duration::from_millis(150);
        let start = Instant::now();
        let late = holder
            .nccl_lane(&local, STAGING_BYTES, start + lasts)
            .unwrap_err();
        let took = start.elapsed();
        assert!(matches!(late, LaneError::TimedOut { .. }), "{late}");
        assert!(took >= lasts, "{took:?}");
        holder.signal(Signal::CONT);
        copy(lane(&holder, &local).as_mut(), &span(0..3, &[1], &[1])).unwrap();
        check_device(&local);
        took - lasts
    });
}

/// Counts of calls are the process's, so this runs in one of its own.
#[test]
#[ignore = "run by the other tests in a process of its own"]
fn sends_in_a_process_of_their_own() {
    let local = Kind::Nccl.cache(LONG);
    let stand_in = kvlane_nccl_stand_in::load();
    // The holder is in this process: its sends are counted.
    let count = |layout: Layout, blocks: &[u32]| {
        let holder = holder_for(Kind::Nccl, layout, Place::Here);
        let local = Kind::Nccl.cache(layout);
        let mut lane = lane(&holder, &local);
        let before = (stand_in.calls("ncclSend"), stand_in.calls("ncclGroupEnd"));
        copy(lane.as_mut(), &span(0..1, blocks, blocks)).unwrap();
        let mut bytes = vec![0; layout.layer_bytes];
        for &block in blocks {
            local.read_layer(0, block, &mut bytes);
            assert!(bytes == content(1, 0, block, layout.layer_bytes));
        }
        check_device(&local);
        // Each group has two ends.
        let groups = (stand_in.calls("ncclGroupEnd") - before.1) / 2;
        (stand_in.calls("ncclSend") - before.0, groups)
    };
    let large = Layout {
        form: Form::BlockMajor,
        layers: 1,
        blocks: 8,
        layer_bytes: 1 << 20,
    };
    drop(local);
    println!(
        "answer: {:?} {:?} {:?}",
        count(LONG, &[1, 3, 5, 7]),
        count(large, &[1, 3, 5]),
        count(large, &[1, 2])
    );
}

#[test]
fn short_runs_are_gathered_into_one_send_and_long_ones_sent_from_where_they_are() {
    assert_eq!(
        answer("nccl::sends_in_a_process_of_their_own", &[]),
        "(1, 1) (3, 1) (1, 1)"
    );
}

#[test]
fn a_cache_has_a_bounded_number_of_communicators() {
    let holder = holder_for(Kind::Nccl, SMALL, Place::Child);
    let local = Kind::Nccl.cache(SMALL);
    let mut lanes = Vec::new();
    let refused = loop {
        match holder.nccl_lane(&local, 4096, soon()) {
            Ok(lane) => lanes.push(lane),
            Err(error) => break error,
        }
        assert!(lanes.len() <= 32, "there is no bound");
    };
    assert_eq!(lanes.len(), 32);
    assert!(
        matches!(&refused, LaneError::Unavailable(why) if why.contains("allowed: 32")),
        "{refused}"
    );
    // The end of one makes room on both sides.
    lanes.pop();
    let until = soon();
    while holder.nccl_lane(&local, 4096, soon()).is_err() {
        assert!(Instant::now() < until, "no room");
        std::thread::sleep(Duration::from_millis(5));
    }
    let LocalCache::Device(cache) = &local else {
        unreachable!()
    };
    drop(lanes);
    assert_eq!(Arc::strong_count(cache), 1);
}

/// A lane to a holder that takes part in a communicator, and answers the first request for blocks with these bytes.
fn lane_to(local: &LocalCache, answer: Vec<u8>) -> NcclLane {
    let theirs = SMALL.device_cache();
    let remote = RemoteCache::of(theirs.map()).unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        socket.read_exact(&mut [0; 32]).unwrap();
        let id = CommunicatorId::new().unwrap();
        socket.write_all(&frame(4, 128)).unwrap();
        socket.write_all(id.as_bytes()).unwrap();
        let communicator = theirs
            .join(
                theirs.communicator_place().unwrap(),
                &id,
                Rank::Sender,
                STAGING_BYTES,
                &patient(),
            )
            .unwrap();
        socket.write_all(&frame(5, 0)).unwrap();
        socket.read_exact(&mut [0; 36]).unwrap();
        socket.write_all(&answer).unwrap();
        // Until the lane closes.
        let _ = socket.read_to_end(&mut Vec::new());
        drop(communicator);
    });
    let pairing = Arc::new(Pairing::new(local, remote).unwrap());
    let line = TcpLane::new(socket, pairing).unwrap();
    NcclLane::open(line, STAGING_BYTES, soon(), &AtomicBool::new(false)).unwrap()
}

fn frame(kind: u32, number: u64) -> Vec<u8> {
    [&b"kvA1"[..], &kind.to_le_bytes(), &number.to_le_bytes()].concat()
}

fn group(lens: &[u32]) -> Vec<u8> {
    let lens_bytes = lens.iter().flat_map(|len| len.to_le_bytes());
    frame(6, lens.len() as u64)
        .into_iter()
        .chain(lens_bytes)
        .collect()
}

#[test]
fn groups_that_are_not_what_was_asked_for_close_the_lane_before_anything_is_received() {
    let whole = SMALL.layer_bytes as u32;
    for (case, answer) in [
        ("more bytes than were asked for", group(&[whole + 1])),
        ("more bytes than there is staging", group(&[u32::MAX, u32::MAX])),
        ("a send of no bytes", group(&[whole, 0])),
        ("more sends than a group has", frame(6, 65)),
        ("no sends", frame(6, 0)),
        ("held instead of bytes", frame(2, 0)),
        ("bytes over the connection", frame(1, u64::from(whole))),
        ("another join", frame(5, 0)),
        ("garbage", b"HTTP/1.1 400 Bad Request\r\n".to_vec()),
    ] {
        let local = Kind::Nccl.filled(SMALL, 2);
        let mut lane = lane_to(&local, answer);
        let refused = copy(&mut lane, &span(0..1, &[1], &[1])).unwrap_err();
        assert!(matches!(refused, LaneError::Protocol(_)), "{case}: {refused}");
        assert!(!lane.is_open(), "{case}");
        let mut bytes = vec![0; SMALL.layer_bytes];
        local.read_layer(0, 1, &mut bytes);
        assert!(bytes == content(2, 0, 1, SMALL.layer_bytes), "{case}");
        check_device(&local);
    }
}

#[test]
fn a_group_that_is_announced_and_not_sent_ends_with_the_deadline() {
    within(SLACK, || {
        let local = Kind::Nccl.filled(SMALL, 2);
        let mut lane = lane_to(&local, group(&[SMALL.layer_bytes as u32]));
        let lasts = Duration::from_millis(100);
        let start = Instant::now();
        let ended = lane.copy(
            &span(0..1, &[1], &[1]),
            LEASE,
            start + lasts,
            &AtomicBool::new(false),
        );
        let took = start.elapsed();
        assert!(matches!(ended, Err(LaneError::TimedOut { .. })), "{ended:?}");
        assert!(took >= lasts, "{took:?}");
        assert!(!lane.is_open());
        took - lasts
    });
}
