//! Deadlines, cancellation, and peers that end or stop.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvlane_core::PagedMemory;
use kvlane_p2p::lanes::{LaneError, LocalCache, Pairing, RemoteCache, Span, TcpLane, serve};
use kvlane_tests::timing::{attempts, in_time, within};
use rustix::process::Signal;

use crate::fixture::Form;
use crate::holder::{Kind, Layout};
use crate::{EVERYWHERE, LEASE, Place, SLACK, SMALL, copy, holder, holder_for, soon, span};

const LARGE: Layout = Layout {
    form: Form::BlockMajor,
    layers: 4,
    blocks: 32,
    layer_bytes: 64 << 10,
};

/// Names the same blocks so often that copying them takes a good part of a second: 8 GB.
fn long() -> Span {
    let blocks: Vec<u32> = (0..32_768).map(|index| index % LARGE.blocks).collect();
    span(0..LARGE.layers, &blocks, &blocks)
}

/// How a copy failed, when it began, and when that was.
struct Failed {
    error: LaneError,
    began: Instant,
    ended: Instant,
}

impl Failed {
    /// Whether it ended in the middle, and soon, by something that was done then.
    fn by(&self, then: Instant) -> Result<(), String> {
        if self.began > then {
            return Err("the copy of that time ran to its end".to_owned());
        }
        in_time(self.ended.saturating_duration_since(then), SLACK)
    }
}

/// Copies over and over until a copy fails: whoever ends it finds one to end, however late.
fn copy_until_it_fails(mut copy: impl FnMut() -> Result<(), LaneError>) -> Failed {
    let until = soon();
    loop {
        let began = Instant::now();
        if let Err(error) = copy() {
            let ended = Instant::now();
            return Failed { error, began, ended };
        }
        assert!(Instant::now() < until, "nothing ends the copies");
    }
}

fn bytes_of(cache: &LocalCache) -> Vec<u8> {
    let mut all = Vec::new();
    let mut bytes = vec![0; cache.map().layer_bytes(0)];
    for layer in 0..cache.map().layer_count() {
        for block in 0..cache.map().block_count() {
            cache.read_layer(layer, block, &mut bytes);
            all.extend_from_slice(&bytes);
        }
    }
    all
}

#[test]
fn a_deadline_in_the_middle_of_a_copy_ends_it() {
    for (kind, place) in EVERYWHERE {
        let holder = holder_for(kind, LARGE, place);
        let lasts = Duration::from_millis(150);
        attempts(|| {
            let mut lane = holder.lane(kind, kind.cache(LARGE));
            copy(lane.as_mut(), &span(0..1, &[0], &[0])).unwrap();
            let start = Instant::now();
            let ended = lane.copy(&long(), LEASE, start + lasts, &AtomicBool::new(false));
            let took = start.elapsed();
            let Err(LaneError::TimedOut { done_bytes }) = ended else {
                panic!("{kind:?} {place:?}: {ended:?}");
            };
            assert!(took >= lasts, "{kind:?} {place:?}: {took:?}");
            if done_bytes > 0 && took < lasts + SLACK {
                Ok(())
            } else {
                Err(format!("{kind:?} {place:?}: {done_bytes} bytes, {took:?}"))
            }
        });
    }
}

#[test]
fn a_copy_in_the_middle_ends_when_it_is_cancelled() {
    for (kind, place) in EVERYWHERE {
        let holder = holder_for(kind, LARGE, place);
        attempts(|| {
            let mut lane = holder.lane(kind, kind.cache(LARGE));
            let cancelled = AtomicBool::new(false);
            let (failed, since) = std::thread::scope(|scope| {
                let copying =
                    scope.spawn(|| copy_until_it_fails(|| lane.copy(&long(), LEASE, soon(), &cancelled)));
                std::thread::sleep(Duration::from_millis(40));
                let since = Instant::now();
                cancelled.store(true, Ordering::Relaxed);
                (copying.join().unwrap(), since)
            });
            let error = &failed.error;
            assert!(
                matches!(error, LaneError::Cancelled { .. }),
                "{kind:?} {place:?}: {error:?}"
            );
            failed
                .by(since)
                .map_err(|late| format!("{kind:?} {place:?}: {late}"))
        });
    }
}

#[test]
fn what_is_over_before_it_starts_copies_nothing_and_leaves_the_lane_open() {
    for (kind, place) in EVERYWHERE {
        let holder = holder_for(kind, SMALL, place);
        let local = kind.filled(SMALL, 2);
        let before = bytes_of(&local);
        let mut lane = holder.lane(kind, &local);
        let span = span(0..3, &[1, 2], &[3, 4]);
        let late = lane.copy(&span, LEASE, Instant::now(), &AtomicBool::new(false));
        assert!(
            matches!(late, Err(LaneError::TimedOut { done_bytes: 0 })),
            "{late:?}"
        );
        let cancelled = lane.copy(&span, LEASE, soon(), &AtomicBool::new(true));
        assert!(
            matches!(cancelled, Err(LaneError::Cancelled { done_bytes: 0 })),
            "{cancelled:?}"
        );
        assert!(matches!(
            lane.is_held(LEASE, Instant::now(), &AtomicBool::new(false)),
            Err(LaneError::TimedOut { .. })
        ));
        assert!(bytes_of(&local) == before, "{kind:?} {place:?}");
        assert!(lane.is_open());
        copy(lane.as_mut(), &span).unwrap();
    }
}

#[test]
fn a_dead_peer_is_gone_at_once_and_the_lane_closed() {
    for kind in [Kind::Shm, Kind::Tcp, Kind::Cuda, Kind::Nccl, Kind::TcpDevice] {
        within(SLACK, || {
            let mut holder = holder_for(kind, SMALL, Place::Child);
            let mut lane = holder.lane(kind, kind.cache(SMALL));
            holder.signal(Signal::KILL);
            let start = Instant::now();
            let gone = copy(lane.as_mut(), &span(0..1, &[1], &[1])).unwrap_err();
            let took = start.elapsed();
            assert!(matches!(gone, LaneError::PeerGone { .. }), "{kind:?}: {gone}");
            if kind == Kind::Shm {
                assert_eq!(gone.errno(), Some(libc::ESRCH));
            }
            assert!(!lane.is_open());
            let closed = copy(lane.as_mut(), &span(0..1, &[1], &[1])).unwrap_err();
            assert!(matches!(closed, LaneError::Closed), "{kind:?}: {closed}");
            assert!(matches!(
                lane.is_held(LEASE, soon(), &AtomicBool::new(false)),
                Err(LaneError::Closed)
            ));
            took
        });
    }
}

#[test]
fn a_peer_that_dies_in_the_middle_of_a_copy_ends_it() {
    for kind in [Kind::Shm, Kind::Tcp, Kind::Cuda, Kind::Nccl, Kind::TcpDevice] {
        attempts(|| {
            let mut holder = holder_for(kind, LARGE, Place::Child);
            let mut lane = holder.lane(kind, kind.cache(LARGE));
            let (failed, since) = std::thread::scope(|scope| {
                let copying = scope.spawn(|| copy_until_it_fails(|| copy(lane.as_mut(), &long())));
                std::thread::sleep(Duration::from_millis(40));
                let since = Instant::now();
                holder.signal(Signal::KILL);
                (copying.join().unwrap(), since)
            });
            let error = &failed.error;
            assert!(matches!(error, LaneError::PeerGone { .. }), "{kind:?}: {error:?}");
            assert!(!lane.is_open());
            failed.by(since).map_err(|late| format!("{kind:?}: {late}"))
        });
    }
}

#[test]
fn a_stopped_peer_is_read_over_shm_and_never_overruns_a_deadline_over_tcp() {
    within(SLACK, || {
        let mut holder = holder(SMALL, Place::Child);
        let local = Kind::Shm.filled(SMALL, 2);
        let mut shm = holder.lane(Kind::Shm, &local);
        let mut tcp = holder.lane(Kind::Tcp, &local);
        copy(tcp.as_mut(), &span(0..1, &[0], &[0])).unwrap();
        holder.signal(Signal::STOP);
        copy(shm.as_mut(), &span(0..3, &[1, 2], &[3, 4])).unwrap();

        let before = bytes_of(&local);
        let lasts = Duration::from_millis(100);
        let start = Instant::now();
        let ended = tcp.copy(
            &span(0..3, &[5, 6], &[7, 8]),
            LEASE,
            start + lasts,
            &AtomicBool::new(false),
        );
        let took = start.elapsed();
        assert!(matches!(ended, Err(LaneError::TimedOut { .. })), "{ended:?}");
        assert!(took >= lasts, "{took:?}");
        assert!(!tcp.is_open());

        // It goes on, finds the request, and answers into the void.
        holder.signal(Signal::CONT);
        holder.set(1, 1);
        std::thread::sleep(Duration::from_millis(50));
        assert!(bytes_of(&local) == before, "a byte came after the copy had ended");
        took - lasts
    });
}

#[test]
fn a_peer_that_stops_in_the_middle_of_a_copy_never_overruns_the_deadline() {
    for kind in [Kind::Tcp, Kind::Nccl] {
        within(SLACK, || {
            let mut holder = holder_for(kind, LARGE, Place::Child);
            let mut lane = holder.lane(kind, kind.cache(LARGE));
            let lasts = Duration::from_millis(250);
            let start = Instant::now();
            let (ended, took) = std::thread::scope(|scope| {
                let copying = scope.spawn(|| {
                    let ended = lane.copy(&long(), LEASE, start + lasts, &AtomicBool::new(false));
                    (ended, start.elapsed())
                });
                std::thread::sleep(Duration::from_millis(40));
                holder.signal(Signal::STOP);
                copying.join().unwrap()
            });
            assert!(
                matches!(ended, Err(LaneError::TimedOut { .. })),
                "{kind:?}: {ended:?}"
            );
            assert!(took >= lasts, "{kind:?}: {took:?}");
            took - lasts
        });
    }
}

#[test]
fn a_lease_that_lapses_on_the_way_ends_the_serving_and_the_copy() {
    let theirs = LARGE.filled(1);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let pairing = Pairing::new(LARGE.cache(), RemoteCache::of(theirs.map()).unwrap()).unwrap();
    let socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut lane = TcpLane::new(socket, Arc::new(pairing)).unwrap();
    // Held before the first byte and after the first piece, not after the second.
    let questions = Mutex::new(0);
    let is_held = |_| {
        let mut questions = questions.lock().unwrap();
        *questions += 1;
        *questions < 3
    };
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let (socket, _) = listener.accept().unwrap();
            serve(
                socket,
                &theirs,
                None,
                is_held,
                &AtomicBool::new(false),
                Duration::from_secs(20),
            )
        });
        let ended = copy(&mut lane, &long());
        assert!(matches!(ended, Err(LaneError::PeerGone { .. })), "{ended:?}");
        let served = serving.join().unwrap();
        assert!(matches!(served, Err(LaneError::Lapsed { .. })), "{served:?}");
    });
    assert_eq!(*questions.lock().unwrap(), 3);
}

#[test]
fn a_lease_that_lapses_before_the_last_byte_is_told_behind_it() {
    let theirs = SMALL.filled(1);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let pairing = Pairing::new(SMALL.cache(), RemoteCache::of(theirs.map()).unwrap()).unwrap();
    let socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut lane = TcpLane::new(socket, Arc::new(pairing)).unwrap();
    let questions = Mutex::new(0);
    let is_held = |_| {
        let mut questions = questions.lock().unwrap();
        *questions += 1;
        *questions != 2
    };
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let (socket, _) = listener.accept().unwrap();
            serve(
                socket,
                &theirs,
                None,
                is_held,
                &AtomicBool::new(false),
                Duration::from_secs(20),
            )
        });
        let span = span(0..3, &[1], &[1]);
        let lapsed = copy(&mut lane, &span);
        assert!(matches!(lapsed, Err(LaneError::Lapsed { .. })), "{lapsed:?}");
        copy(&mut lane, &span).unwrap();
        drop(lane);
        let served = serving.join().unwrap().unwrap();
        assert_eq!(
            (served.fetches, served.bytes),
            (2, 2 * 3 * SMALL.layer_bytes as u64)
        );
    });
}
