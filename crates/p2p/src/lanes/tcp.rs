//! The lane over a connection: the peer's [`serve`](super::serve) sends from its runs, this side receives into its own.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::pairing::Walk;
use super::patience::Patience;
use super::wire::{ANSWER_BYTES, Answer, MAX_FETCH_BLOCKS, Request};
use super::{Lane, LaneError, Lease, Pairing, Span};
use crate::raw::{Interest, LocalRanges, keep_alive, receive, send, send_unpaced};

/// Most bytes that one call receives.
const WINDOW_BYTES: usize = 1 << 20;

/// How often a waiting lane looks whether it was cancelled.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Pulls blocks over one data connection, on which nothing else is sent. On any doubt the connection is closed: bytes that
/// come late find nobody who would write them anywhere.
pub struct TcpLane {
    socket: TcpStream,
    pairing: Arc<Pairing>,
    local: LocalRanges,
    request: Vec<u8>,
    is_open: bool,
}

impl TcpLane {
    /// Takes a connection on whose other end [`serve`](super::serve) runs, over the cache that `pairing` has as the remote
    /// one.
    pub fn new(socket: TcpStream, pairing: Arc<Pairing>) -> Result<Self, LaneError> {
        prepare(&socket)?;
        Ok(Self {
            socket,
            local: LocalRanges::new(Arc::clone(pairing.local())),
            pairing,
            request: Vec::new(),
            is_open: true,
        })
    }

    /// Asks for blocks of which one request may name as many, and receives them.
    fn fetch(
        &mut self,
        layers: &Range<usize>,
        (remote, local): (&[u32], &[u32]),
        lease: Lease,
        patience: &Patience<'_>,
        done_bytes: &mut u64,
    ) -> Result<(), LaneError> {
        let request = Request::Fetch {
            lease,
            layers: layers.clone(),
            block_count: remote.len(),
        };
        self.request.clear();
        self.request.extend_from_slice(&request.encode());
        for block in remote {
            self.request.extend_from_slice(&block.to_le_bytes());
        }
        self.send_request(patience)?;

        let pairing = Arc::clone(&self.pairing);
        let expected = pairing.payload_bytes(layers, remote.len());
        let mut walk = pairing.walk(layers, remote, local);
        let (mut head, mut tail) = ([0; ANSWER_BYTES], [0; ANSWER_BYTES]);
        let (mut head_done, mut tail_done) = (0, 0);
        let mut is_answered = false;
        while tail_done < ANSWER_BYTES {
            patience.check(*done_bytes)?;
            if self.local.len_bytes() == 0 {
                self.fill(&mut walk);
            }
            // The last window takes the answer behind the payload along.
            let back: &mut [u8] = if walk.is_done() {
                &mut tail[tail_done..]
            } else {
                &mut []
            };
            let received = receive(&self.socket, &mut head[head_done..], &mut self.local, back)
                .map_err(|error| LaneError::of_socket("recvmsg", error))?;
            let Some(moved) = received else {
                patience.wait(&self.socket, Interest::Readable)?;
                continue;
            };
            if moved.total() == 0 {
                return Err(closed());
            }
            head_done += moved.front;
            tail_done += moved.back;
            *done_bytes += moved.ranges as u64;
            if !is_answered && head_done == ANSWER_BYTES {
                match Answer::decode(&head)? {
                    Answer::Data { len_bytes } if len_bytes == expected => is_answered = true,
                    Answer::Lapsed if moved.ranges == 0 => return Err(lease.lapsed()),
                    answer => {
                        return Err(LaneError::Protocol(format!(
                            "{answer:?} where {expected} bytes should come"
                        )));
                    }
                }
            }
        }
        match Answer::decode(&tail)? {
            Answer::Held => Ok(()),
            Answer::Lapsed => Err(lease.lapsed()),
            answer @ Answer::Data { .. } => Err(LaneError::Protocol(format!("{answer:?} behind the bytes"))),
        }
    }

    fn ask(&mut self, lease: Lease, patience: &Patience<'_>) -> Result<bool, LaneError> {
        self.request.clear();
        self.request.extend_from_slice(&Request::Check { lease }.encode());
        self.send_request(patience)?;
        let mut answer = [0; ANSWER_BYTES];
        let mut done = 0;
        while done < ANSWER_BYTES {
            patience.check(0)?;
            match receive(&self.socket, &mut answer[done..], &mut self.local, &mut [])
                .map_err(|error| LaneError::of_socket("recvmsg", error))?
            {
                None => patience.wait(&self.socket, Interest::Readable)?,
                Some(moved) if moved.total() == 0 => return Err(closed()),
                Some(moved) => done += moved.front,
            }
        }
        match Answer::decode(&answer)? {
            Answer::Held => Ok(true),
            Answer::Lapsed => Ok(false),
            answer @ Answer::Data { .. } => Err(LaneError::Protocol(format!(
                "{answer:?} as the answer to a check"
            ))),
        }
    }

    fn send_request(&mut self, patience: &Patience<'_>) -> Result<(), LaneError> {
        self.local.clear();
        send_all(&self.socket, &self.request, &mut self.local, patience, 0)
    }

    fn fill(&mut self, walk: &mut Walk<'_>) {
        self.local.clear();
        while self.local.count() < LocalRanges::MAX {
            let Some(part) = walk.next(WINDOW_BYTES - self.local.len_bytes()) else {
                break;
            };
            self.local
                .push(part.layer, part.block, part.run, part.offset, part.len);
        }
    }

    /// Runs `work` on an open lane. An error after which the two sides may not agree on what comes next closes it.
    fn guard<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, LaneError>) -> Result<T, LaneError> {
        if !self.is_open {
            return Err(LaneError::Closed);
        }
        let result = work(self);
        if !matches!(result, Ok(_) | Err(LaneError::Lapsed { .. })) {
            self.is_open = false;
            // Fails only where the connection is gone already.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
        result
    }
}

impl Lane for TcpLane {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn is_open(&self) -> bool {
        self.is_open
    }

    fn copy(
        &mut self,
        span: &Span,
        lease: Lease,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), LaneError> {
        self.pairing.check(span)?;
        let patience = patience(deadline, cancelled);
        let mut done_bytes = 0;
        // Nothing was sent yet, so this does not close the lane.
        patience.check(done_bytes)?;
        if span.layers.is_empty() || span.remote.is_empty() {
            return match self.guard(|lane| lane.ask(lease, &patience))? {
                true => Ok(()),
                false => Err(lease.lapsed()),
            };
        }
        let remote = span.remote.chunks(MAX_FETCH_BLOCKS);
        let local = span.local.chunks(MAX_FETCH_BLOCKS);
        for blocks in remote.zip(local) {
            self.guard(|lane| lane.fetch(&span.layers, blocks, lease, &patience, &mut done_bytes))?;
        }
        Ok(())
    }

    fn is_held(
        &mut self,
        lease: Lease,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<bool, LaneError> {
        let patience = patience(deadline, cancelled);
        patience.check(0)?;
        self.guard(|lane| lane.ask(lease, &patience))
    }
}

impl std::fmt::Debug for TcpLane {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("TcpLane")
            .field("socket", &self.socket)
            .field("is_open", &self.is_open)
            .finish_non_exhaustive()
    }
}

fn patience(deadline: Instant, cancelled: &AtomicBool) -> Patience<'_> {
    Patience {
        deadline: Some(deadline),
        stop: cancelled,
        look_every: LOOK_EVERY,
    }
}

/// What both ends of a data connection ask of it. Buffers are left to the kernel, which sizes them by what it measures; a
/// fixed size was never faster and would be a limit on long ways.
pub(super) fn prepare(socket: &TcpStream) -> Result<(), LaneError> {
    let options = || -> io::Result<()> {
        socket.set_nodelay(true)?;
        keep_alive(socket)?;
        if socket.local_addr()?.ip() == socket.peer_addr()?.ip() {
            send_unpaced(socket);
        }
        Ok(())
    };
    options().map_err(|error| LaneError::of_socket("setsockopt", error))
}

/// Sends `front` and then `ranges`, all of them.
pub(super) fn send_all(
    socket: &TcpStream,
    front: &[u8],
    ranges: &mut LocalRanges,
    patience: &Patience<'_>,
    done_bytes: u64,
) -> Result<(), LaneError> {
    let mut front_done = 0;
    while front_done < front.len() || ranges.len_bytes() > 0 {
        patience.check(done_bytes)?;
        match send(socket, &front[front_done..], ranges)
            .map_err(|error| LaneError::of_socket("sendmsg", error))?
        {
            None => patience.wait(socket, Interest::Writable)?,
            Some(moved) => front_done += moved.front,
        }
    }
    Ok(())
}

pub(super) fn closed() -> LaneError {
    LaneError::PeerGone {
        what: "it closed the data connection",
        source: None,
    }
}
