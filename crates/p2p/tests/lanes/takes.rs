//! Takes: what comes without a grant counts only if it was found and held, and whatever else comes closes the line.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kvlane_core::PagedMemory;
use kvlane_p2p::lanes::{
    EpochTable, LaneError, Lease, Leases, LocalCache, OfferBoard, Pairing, PostedPrompt, RemoteCache,
    TakeLine, Taken, serve,
};
use kvlane_p2p::shape::{Axes, CacheShape};
use kvlane_p2p::{Prompt, TransferKey};

use crate::holder::content;
use crate::{LEASE, SMALL};

const PROMPT: Prompt = Prompt {
    tokens: 64,
    digest: [9; 32],
};
const POSTED: [u32; 4] = [7, 3, 20, 1];
const TARGETS: [u32; 2] = [5, 11];

/// Holds [`LEASE`], until it was looked at so many times.
struct Posted {
    board: OfferBoard,
    epochs: EpochTable,
    lapses_at: Option<u32>,
    looks: AtomicU32,
}

impl Leases for Posted {
    fn is_held(&self, lease: Lease) -> bool {
        let looks = self.looks.fetch_add(1, Ordering::Relaxed);
        self.lapses_at.is_none_or(|at| looks < at) && self.epochs.get(lease.slot) == lease.epoch
    }

    fn find_posted(&self, key: &[u8; 32], digest: &[u8; 32]) -> Option<PostedPrompt> {
        self.board.find(key, digest)
    }
}

fn key() -> TransferKey {
    TransferKey::new("key").unwrap()
}

fn posted(lapses_at: Option<u32>) -> Posted {
    let (board, epochs) = (OfferBoard::new(8), EpochTable::new(16));
    epochs.set(LEASE.slot, LEASE.epoch);
    let blocks = POSTED.to_vec();
    board.post(&key(), &PROMPT, &PostedPrompt { lease: LEASE, blocks });
    Posted {
        board,
        epochs,
        lapses_at,
        looks: AtomicU32::new(0),
    }
}

/// A line to `answering`, which gets the other end.
fn with_line<T>(answering: impl FnOnce(TcpStream) + Send, test: impl FnOnce(TakeLine, LocalCache) -> T) -> T {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || answering(listener.accept().unwrap().0));
        let cache = LocalCache::from(SMALL.cache());
        let remote = RemoteCache::of(SMALL.cache().map()).unwrap();
        let pairing = Arc::new(Pairing::new(&cache, remote).unwrap());
        let line = TakeLine::new(TcpStream::connect(address).unwrap(), pairing).unwrap();
        test(line.unwrap(), cache)
    })
}

fn serving(posted: Posted) -> impl FnOnce(TcpStream) + Send {
    move |socket| {
        let theirs = SMALL.filled(1);
        let stop = AtomicBool::new(false);
        let _ = serve(socket, &theirs, None, posted, &stop, Duration::from_secs(20));
    }
}

fn outcome(line: &mut TakeLine) -> Result<Taken, LaneError> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(taken) = line.progress()? {
            return Ok(taken);
        }
        assert!(Instant::now() < end, "a take without an end");
        std::thread::yield_now();
    }
}

fn layer_of(cache: &LocalCache, layer: usize, block: u32) -> Vec<u8> {
    let mut bytes = vec![0; SMALL.layer_bytes];
    cache.read_layer(layer, block, &mut bytes);
    bytes
}

#[test]
fn blocks_of_a_posted_prompt_arrive_in_one_exchange_again_and_again() {
    with_line(serving(posted(None)), |mut line, cache| {
        for first in [0, 2, 1] {
            assert!(line.begin(&key(), &PROMPT, first, &TARGETS).unwrap());
            assert!(
                !line.begin(&key(), &PROMPT, first, &TARGETS).unwrap(),
                "one at a time"
            );
            assert_eq!(outcome(&mut line).unwrap(), Taken::Found(LEASE));
            for layer in 0..SMALL.layers {
                for block in 0..SMALL.blocks {
                    let expected = match TARGETS.iter().position(|&target| target == block) {
                        Some(place) => content(1, layer, POSTED[first as usize + place], SMALL.layer_bytes),
                        None => vec![0; SMALL.layer_bytes],
                    };
                    assert_eq!(
                        layer_of(&cache, layer, block),
                        expected,
                        "layer {layer}, block {block}"
                    );
                }
            }
        }
        assert!(matches!(line.progress(), Ok(None)), "idle, and open");
    });
}

#[test]
fn what_is_not_posted_not_held_or_beyond_the_prompt_is_absent_and_the_line_stays_open() {
    let other = TransferKey::new("other").unwrap();
    let digest = Prompt {
        digest: [8; 32],
        ..PROMPT
    };
    with_line(serving(posted(None)), |mut line, _| {
        for (key, prompt, first) in [(&other, &PROMPT, 0), (&key(), &digest, 0), (&key(), &PROMPT, 3)] {
            assert!(line.begin(key, prompt, first, &TARGETS).unwrap());
            assert_eq!(outcome(&mut line).unwrap(), Taken::Absent);
        }
        assert!(line.begin(&key(), &PROMPT, 0, &TARGETS).unwrap());
        assert_eq!(outcome(&mut line).unwrap(), Taken::Found(LEASE));
    });
    // Before the first byte, and behind the last.
    for lapses_at in [0, 1] {
        with_line(serving(posted(Some(lapses_at))), |mut line, _| {
            assert!(line.begin(&key(), &PROMPT, 0, &TARGETS).unwrap());
            assert_eq!(
                outcome(&mut line).unwrap(),
                Taken::Absent,
                "after {lapses_at} looks"
            );
        });
    }
}

#[test]
fn blocks_that_are_not_there_or_in_too_many_pieces_are_not_asked_for() {
    with_line(serving(posted(None)), |mut line, _| {
        assert!(!line.begin(&key(), &PROMPT, 0, &[SMALL.blocks]).unwrap());
        let many = vec![1; 10_000];
        assert!(!line.begin(&key(), &PROMPT, 0, &many).unwrap());
        assert!(line.begin(&key(), &PROMPT, 0, &TARGETS).unwrap());
        assert_eq!(outcome(&mut line).unwrap(), Taken::Found(LEASE));
    });
}

#[test]
fn lies_and_ends_are_errors_behind_which_the_line_is_of_no_use() {
    let frame = |kind: u32, len: u64| {
        let mut bytes = b"kvA1".to_vec();
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes
    };
    let payload = SMALL.layers as u64 * SMALL.layer_bytes as u64 * 2;
    let whole = |tail: Vec<u8>| [frame(8, payload), vec![0; 12 + payload as usize], tail].concat();
    for (case, bytes) in [
        ("another length", frame(8, payload + 1)),
        ("data that was not asked for", frame(1, payload)),
        ("another magic", vec![0; 28]),
        ("more behind absent", [frame(9, 0), frame(9, 0)].concat()),
        ("no word about the lease", whole(frame(1, 0))),
        (
            "the end in the middle",
            [frame(8, payload), vec![0; 100]].concat(),
        ),
        ("the end at once", Vec::new()),
    ] {
        let answering = move |mut socket: TcpStream| {
            socket.read_exact(&mut [0; 96]).unwrap();
            socket.write_all(&bytes).unwrap();
        };
        with_line(answering, |mut line, _| {
            assert!(line.begin(&key(), &PROMPT, 0, &TARGETS).unwrap());
            assert!(outcome(&mut line).is_err(), "{case}");
        });
    }
    // Nobody asked for anything.
    for bytes in [vec![1], Vec::new()] {
        let answering = move |mut socket: TcpStream| socket.write_all(&bytes).unwrap();
        with_line(answering, |mut line, _| {
            assert!(outcome(&mut line).is_err());
        });
    }
}

#[test]
fn a_take_behind_a_cut_closes_the_connection_because_its_blocks_would_be_taken_for_units() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let theirs = SMALL.filled(1);
    let axes = Axes {
        tokens: 2,
        are_tokens_packed: false,
        heads: Some(3),
    };
    let shape = CacheShape::of(theirs.map(), 1, 0..1, 1, &[axes; SMALL.layers]).unwrap();
    let ended = std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let (socket, _) = listener.accept().unwrap();
            let stop = AtomicBool::new(false);
            serve(
                socket,
                &theirs,
                Some(&shape),
                posted(None),
                &stop,
                Duration::from_secs(20),
            )
        });
        let mut socket = TcpStream::connect(address).unwrap();
        let (cut, take) = ([5, 1, 0, 0, 1, 0, 0], [6, 0, 1, 0, 0, 0, 3]);
        for request in [cut, take] {
            socket.write_all(b"kvQ1").unwrap();
            for number in request {
                socket.write_all(&u32::to_le_bytes(number)).unwrap();
            }
        }
        socket.write_all(&[0; 64]).unwrap();
        let mut answer = Vec::new();
        // A reset is a way to close, too.
        let _ = socket.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{answer:?}");
        serving.join().unwrap()
    });
    assert!(matches!(ended, Err(LaneError::Protocol(_))), "{ended:?}");
}
