//! What the serving end refuses, and that it ends.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvlane_p2p::lanes::{LaneError, Served, serve};
use kvlane_tests::timing::within;

use crate::SMALL;

const LAST_BLOCK: u32 = SMALL.blocks - 1;
const FETCH: u32 = 1;
const CHECK: u32 = 2;

/// Runs `client` against a serving end, which holds every lease, and returns how the serving ended. What the client returns,
/// such as the socket, is kept until then.
fn serve_to<T>(
    timeout: Duration,
    stop: &AtomicBool,
    client: impl FnOnce(TcpStream) -> T,
) -> Result<Served, LaneError> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let cache = SMALL.filled(1);
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let (socket, _) = listener.accept().unwrap();
            serve(socket, &cache, None, |_| true, stop, timeout)
        });
        let kept = client(TcpStream::connect(address).unwrap());
        let end = Instant::now() + LONG;
        while !serving.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(kept);
        serving.join().unwrap()
    })
}

fn request(kind: u32, layers: (u32, u32), named: u32, blocks: &[u32]) -> Vec<u8> {
    let mut bytes = b"kvQ1".to_vec();
    for number in [kind, 5, named, 77, 0, layers.0, layers.1].iter().chain(blocks) {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes
}

/// Sends bytes and returns all that comes back until the serving end closes, and how it ended.
fn answer_to(bytes: &[u8], timeout: Duration) -> (Vec<u8>, Result<Served, LaneError>) {
    let mut answer = Vec::new();
    let ended = serve_to(timeout, &AtomicBool::new(false), |mut socket| {
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.write_all(bytes).unwrap();
        // A reset is a way to close, too.
        let _ = socket.read_to_end(&mut answer);
    });
    (answer, ended)
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn requests_outside_of_the_cache_or_of_the_protocol_close_the_connection_without_a_byte() {
    for (case, bytes) in [
        (
            "a block beyond the last",
            request(FETCH, (0, 1), 2, &[0, LAST_BLOCK + 1]),
        ),
        ("the largest block", request(FETCH, (0, 1), 1, &[u32::MAX])),
        ("a layer beyond the last", request(FETCH, (0, 4), 1, &[0])),
        (
            "the largest layers",
            request(FETCH, (u32::MAX, u32::MAX), 1, &[0]),
        ),
        ("layers backwards", request(FETCH, (2, 1), 1, &[0])),
        ("too many blocks", request(FETCH, (0, 1), 4097, &[])),
        (
            "as many blocks as a number holds",
            request(FETCH, (0, 1), u32::MAX, &[]),
        ),
        ("a check that names blocks", request(CHECK, (0, 0), 1, &[0])),
        ("an unknown kind", request(7, (0, 1), 1, &[0])),
        ("a cut of what is not known", request(5, (0, 0), 0, &[])),
        (
            "another protocol",
            b"GET / HTTP/1.1\r\nHost: localhost:1234\r\n\r\n".to_vec(),
        ),
    ] {
        let (answer, ended) = answer_to(&bytes, LONG);
        assert!(answer.is_empty(), "{case}: {answer:?}");
        assert!(
            matches!(ended, Err(LaneError::Protocol(_) | LaneError::Request(_))),
            "{case}: {ended:?}"
        );
    }
}

#[test]
fn requests_at_the_edge_of_the_cache_are_served() {
    let good = serve_to(LONG, &AtomicBool::new(false), |mut socket| {
        socket
            .write_all(&request(FETCH, (2, 3), 1, &[LAST_BLOCK]))
            .unwrap();
        let mut answer = vec![0; 16 + SMALL.layer_bytes + 16];
        socket.read_exact(&mut answer).unwrap();
        socket
            .write_all(&request(FETCH, (3, 3), 1, &[LAST_BLOCK]))
            .unwrap();
        socket.write_all(&request(FETCH, (0, 3), 0, &[])).unwrap();
        socket.write_all(&request(CHECK, (0, 0), 0, &[])).unwrap();
        let mut answer = [0; 5 * 16];
        socket.read_exact(&mut answer).unwrap();
        let kinds: Vec<u8> = answer.chunks(16).map(|answer| answer[4]).collect();
        assert_eq!(kinds, [1, 2, 1, 2, 2]);
    });
    let served = good.unwrap();
    assert_eq!((served.fetches, served.bytes), (3, SMALL.layer_bytes as u64));
}

#[test]
fn a_request_that_stops_in_the_middle_is_given_up_and_one_that_ends_there_too() {
    let whole = request(FETCH, (0, 1), 1, &[0]);
    for len in [1, 31, 32, 35] {
        let start = Instant::now();
        let (answer, ended) = answer_to(&whole[..len], Duration::from_millis(30));
        assert!(answer.is_empty());
        assert!(
            matches!(ended, Err(LaneError::TimedOut { .. })),
            "{len}: {ended:?}"
        );
        assert!(start.elapsed() < Duration::from_secs(5));
        let ended = serve_to(LONG, &AtomicBool::new(false), |mut socket| {
            socket.write_all(&whole[..len]).unwrap();
            socket.shutdown(Shutdown::Write).unwrap();
            let _ = socket.read_to_end(&mut Vec::new());
        });
        assert!(
            matches!(ended, Err(LaneError::PeerGone { .. })),
            "{len}: {ended:?}"
        );
    }
}

#[test]
fn a_peer_that_takes_no_bytes_is_given_up() {
    let blocks = vec![3; 4096];
    within(Duration::from_millis(300), || {
        let start = Instant::now();
        let ended = serve_to(
            Duration::from_millis(100),
            &AtomicBool::new(false),
            |mut socket| {
                socket.write_all(&request(FETCH, (0, 3), 4096, &blocks)).unwrap();
                // 30 MB are more than the two sockets hold.
                socket
            },
        );
        let took = start.elapsed();
        assert!(
            matches!(ended, Err(LaneError::TimedOut { .. })),
            "{ended:?} after {took:?}"
        );
        took
    });
}

#[test]
fn an_idle_connection_ends_when_the_peer_closes_it_and_when_it_should_stop() {
    let ended = serve_to(LONG, &AtomicBool::new(false), drop);
    assert_eq!(ended.unwrap(), Served::default());
    within(Duration::from_secs(1), || {
        let stop = AtomicBool::new(false);
        let mut took = Duration::ZERO;
        let ended = serve_to(LONG, &stop, |mut socket| {
            stop.store(true, Ordering::Relaxed);
            let start = Instant::now();
            let _ = socket.read_to_end(&mut Vec::new());
            took = start.elapsed();
        });
        assert_eq!(ended.unwrap(), Served::default());
        took
    });
}
