//! Peers that say what is not so: about their process, their memory, or on a data connection.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kvlane_core::PagedMemory;
use kvlane_p2p::lanes::{
    EpochTable, Lane, LaneError, OfferBoard, Pairing, PeerMemory, PostedPrompt, ProbeToken, RemoteCache,
    RemoteRegion, ShmLane, TcpLane,
};
use kvlane_p2p::{Prompt, TransferKey};

use crate::holder::Layout;
use crate::{LEASE, Place, SMALL, copy, holder, soon, span};

/// Below the lowest address at which Linux maps anything.
const NOTHING: u64 = 4096;

fn open(memory: PeerMemory) -> Result<ShmLane, LaneError> {
    let pairing = Pairing::new(SMALL.cache(), RemoteCache::of(SMALL.cache().map()).unwrap()).unwrap();
    ShmLane::open(memory, Arc::new(pairing))
}

#[test]
fn a_process_that_does_not_show_the_token_is_refused() {
    let holder = holder(SMALL, Place::Child);
    let honest = holder.hello.memory;
    assert!(open(honest).is_ok());
    let mut other_token = honest;
    other_token.token[15] ^= 1;
    let refused = open(other_token).unwrap_err();
    assert!(matches!(refused, LaneError::WrongProcess { .. }), "{refused}");
    // Of this process, which may well have something at that address.
    let mut another = honest;
    another.pid = std::process::id();
    let refused = open(another).unwrap_err();
    assert!(
        matches!(
            refused,
            LaneError::WrongProcess { .. } | LaneError::BadAddress { .. }
        ),
        "{refused}"
    );
    let mut nowhere = honest;
    nowhere.token_address = NOTHING;
    let refused = open(nowhere).unwrap_err();
    assert!(matches!(refused, LaneError::BadAddress { .. }), "{refused}");
    assert_eq!(refused.errno(), Some(libc::EFAULT));
}

#[test]
fn numbers_that_are_no_process_and_no_memory_are_refused() {
    let honest = holder(SMALL, Place::Here).hello.memory;
    for pid in [0, u32::MAX, 1 << 31] {
        let refused = open(PeerMemory { pid, ..honest }).unwrap_err();
        assert!(matches!(refused, LaneError::Layout(_)), "{refused}");
    }
    // Above the highest number that Linux gives out.
    let refused = open(PeerMemory {
        pid: i32::MAX as u32,
        ..honest
    })
    .unwrap_err();
    assert!(matches!(refused, LaneError::PeerGone { .. }), "{refused}");
    assert_eq!(refused.errno(), Some(libc::ESRCH));
    for (token_address, epochs_address) in [
        (0, honest.epochs_address),
        (u64::MAX - 8, honest.epochs_address),
        (honest.token_address, 0),
        (honest.token_address, u64::MAX - 8),
        (honest.token_address, i64::MAX as u64),
    ] {
        let refused = open(PeerMemory {
            token_address,
            epochs_address,
            ..honest
        })
        .unwrap_err();
        assert!(matches!(refused, LaneError::Layout(_)), "{refused}");
    }
}

#[test]
fn a_posted_prompt_is_found_only_where_token_and_board_are_the_peers() {
    let (epochs, token, board) = (
        EpochTable::new(64),
        ProbeToken::new().unwrap(),
        OfferBoard::new(8),
    );
    let honest = PeerMemory {
        pid: std::process::id(),
        token_address: token.address(),
        token: token.bytes(),
        epochs_address: epochs.address(),
        epoch_slots: 64,
        board_address: board.address(),
        board_entries: board.entry_count(),
    };
    let key = TransferKey::new("a").unwrap();
    let prompt = Prompt {
        tokens: 8,
        digest: [1; 32],
    };
    let posted = PostedPrompt {
        lease: LEASE,
        blocks: vec![3, 1],
    };
    let find = |memory| open(memory).and_then(|mut lane| lane.find_posted(&key, &prompt));
    assert_eq!(find(honest).unwrap(), None);
    board.post(&key, &prompt, &posted);
    assert_eq!(find(honest).unwrap(), Some(posted));
    let without = PeerMemory {
        board_entries: 0,
        ..honest
    };
    assert_eq!(find(without).unwrap(), None);
    for board_address in [0, u64::MAX - 8, i64::MAX as u64] {
        let refused = find(PeerMemory {
            board_address,
            ..honest
        });
        assert!(matches!(refused, Err(LaneError::Layout(_))), "{refused:?}");
    }
    let nowhere = find(PeerMemory {
        board_address: NOTHING,
        ..honest
    });
    assert!(
        matches!(nowhere, Err(LaneError::BadAddress { .. })),
        "{nowhere:?}"
    );
    let mut lane = open(honest).unwrap();
    drop(token);
    let other = lane.find_posted(&key, &prompt);
    assert!(
        matches!(
            other,
            Err(LaneError::WrongProcess { .. } | LaneError::BadAddress { .. })
        ),
        "{other:?}"
    );
    assert!(!lane.is_open());
}

#[test]
fn a_token_that_is_gone_ends_the_lane_though_slot_and_bytes_are_there() {
    let cache = SMALL.filled(1);
    let epochs = EpochTable::new(64);
    epochs.set(LEASE.slot, LEASE.epoch);
    let token = ProbeToken::new().unwrap();
    let memory = PeerMemory {
        pid: std::process::id(),
        token_address: token.address(),
        token: token.bytes(),
        epochs_address: epochs.address(),
        epoch_slots: 64,
        board_address: 0,
        board_entries: 0,
    };
    let pairing = Pairing::new(SMALL.cache(), RemoteCache::of(cache.map()).unwrap()).unwrap();
    let mut lane = ShmLane::open(memory, Arc::new(pairing)).unwrap();
    copy(&mut lane, &span(0..1, &[0], &[0])).unwrap();
    // As in a process that was given the peer's number.
    drop(token);
    let ended = copy(&mut lane, &span(0..1, &[0], &[0])).unwrap_err();
    assert!(
        matches!(
            ended,
            LaneError::WrongProcess { .. } | LaneError::BadAddress { .. }
        ),
        "{ended}"
    );
    assert!(!lane.is_open());
}

#[test]
fn blocks_where_the_peer_has_no_memory_are_an_error() {
    for place in [Place::Here, Place::Child] {
        let holder = holder(SMALL, place);
        let lie = |region: &RemoteRegion| RemoteRegion {
            address: NOTHING,
            ..region.clone()
        };
        let mut regions = holder.hello.cache.regions().to_vec();
        regions[1] = lie(&regions[1]);
        let cache = RemoteCache::new(regions, SMALL.blocks).unwrap();
        let pairing = Pairing::new(SMALL.cache(), cache).unwrap();
        let mut lane = ShmLane::open(holder.hello.memory, Arc::new(pairing)).unwrap();
        copy(&mut lane, &span(0..1, &[0], &[0])).unwrap();
        let ended = copy(&mut lane, &span(0..3, &[0], &[0])).unwrap_err();
        assert!(matches!(ended, LaneError::BadAddress { .. }), "{ended}");
        assert_eq!(ended.errno(), Some(libc::EFAULT));
        assert!(!lane.is_open());
    }
}

/// A lane to a peer that answers the first request with `bytes` and then closes, or stays silent.
fn lane_to(answer: &'static [u8], closes: bool) -> TcpLane {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut request = [0; 36];
        let _ = socket.read(&mut request);
        let _ = socket.write_all(answer);
        if !closes {
            // Until the lane closes.
            let _ = socket.read_to_end(&mut Vec::new());
        }
    });
    let pairing = Pairing::new(tiny().cache(), RemoteCache::of(tiny().cache().map()).unwrap()).unwrap();
    TcpLane::new(socket, Arc::new(pairing)).unwrap()
}

/// Eight bytes a block.
fn tiny() -> Layout {
    Layout {
        layers: 1,
        layer_bytes: 8,
        ..SMALL
    }
}

const DATA_OF_8: [u8; 16] = *b"kvA1\x01\0\0\0\x08\0\0\0\0\0\0\0";
const HELD: [u8; 16] = *b"kvA1\x02\0\0\0\0\0\0\0\0\0\0\0";

fn concat(parts: &[&[u8]]) -> &'static [u8] {
    parts.concat().leak()
}

#[test]
fn answers_that_the_protocol_does_not_allow_close_the_lane() {
    let with = |place: usize, byte: u8, bytes: [u8; 16]| {
        let mut bytes = bytes;
        bytes[place] = byte;
        bytes
    };
    for (case, answer) in [
        ("garbage", b"HTTP/1.1 400 Bad Request\r\n".to_vec()),
        ("too few bytes announced", with(8, 7, DATA_OF_8).to_vec()),
        ("too many bytes announced", with(15, 0x80, DATA_OF_8).to_vec()),
        ("held instead of bytes", HELD.to_vec()),
        (
            "lapsed with bytes",
            [&b"kvA1\x03\0\0\0\0\0\0\0\0\0\0\0"[..], b"12345678"].concat(),
        ),
        ("an unknown kind", with(4, 9, DATA_OF_8).to_vec()),
        (
            "garbage behind the bytes",
            [&DATA_OF_8[..], b"12345678", b"0123456789abcdef"].concat(),
        ),
        (
            "bytes instead of held",
            [&DATA_OF_8[..], b"12345678", &DATA_OF_8].concat(),
        ),
    ] {
        for closes in [true, false] {
            let mut lane = lane_to(concat(&[&answer]), closes);
            let refused = copy(&mut lane, &span(0..1, &[1], &[1])).unwrap_err();
            assert!(matches!(refused, LaneError::Protocol(_)), "{case}: {refused}");
            assert!(!lane.is_open(), "{case}");
        }
    }
}

#[test]
fn an_answer_that_ends_anywhere_is_no_copy() {
    let whole = concat(&[&DATA_OF_8, b"12345678", &HELD]);
    for len in 0..whole.len() {
        let mut lane = lane_to(&whole[..len], true);
        let ended = copy(&mut lane, &span(0..1, &[1], &[1])).unwrap_err();
        assert!(
            matches!(ended, LaneError::PeerGone { .. }),
            "after {len} bytes: {ended}"
        );
        assert!(!lane.is_open());
    }
    copy(&mut lane_to(whole, true), &span(0..1, &[1], &[1])).unwrap();
}

#[test]
fn silence_ends_with_the_deadline() {
    for answer in [&[][..], &DATA_OF_8, concat(&[&DATA_OF_8, b"1234"])] {
        let mut lane = lane_to(answer, false);
        let deadline = Instant::now() + Duration::from_millis(30);
        let ended = lane.copy(&span(0..1, &[1], &[1]), LEASE, deadline, &AtomicBool::new(false));
        assert!(matches!(ended, Err(LaneError::TimedOut { .. })), "{ended:?}");
        assert!(!lane.is_open());
    }
    let mut lane = lane_to(&HELD, false);
    assert!(lane.is_held(LEASE, soon(), &AtomicBool::new(false)).unwrap());
    let mut lane = lane_to(&DATA_OF_8, false);
    let refused = lane.is_held(LEASE, soon(), &AtomicBool::new(false));
    assert!(matches!(refused, Err(LaneError::Protocol(_))), "{refused:?}");
}

#[test]
fn a_cache_that_does_not_fit_the_local_one_gets_no_lane() {
    let holder = holder(SMALL, Place::Here);
    let other = Layout {
        layer_bytes: SMALL.layer_bytes + 2,
        ..SMALL
    };
    let refused = Pairing::new(other.cache(), holder.hello.cache.clone()).unwrap_err();
    assert!(
        refused.to_string().contains("layer 0 has 2474 bytes"),
        "{refused}"
    );
}
