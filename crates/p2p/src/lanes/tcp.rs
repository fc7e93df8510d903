//! The lane over a connection: the peer's [`serve`](super::serve) sends from its runs, this side receives into its own.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kvlane_cuda::{DeviceCache, RunPart};

use super::pairing::Walk;
use super::patience::Patience;
use super::wire::{ANSWER_BYTES, Answer, MAX_FETCH_BLOCKS, Request};
use super::{Lane, LaneError, Lease, LocalCache, Pairing, Span};
use crate::raw::{Interest, LocalRanges, keep_alive, receive, send, send_unpaced};

/// Most bytes that one call receives.
const WINDOW_BYTES: usize = 1 << 20;

/// Most bytes, and most parts of runs, between pinned memory and a device at a time.
pub(super) const STAGED_BYTES: usize = 1 << 20;
const PARTS_MAX: usize = 1024;

/// How often a waiting lane looks whether it was cancelled.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Pulls blocks over one data connection, on which nothing else is sent. On any doubt the connection is closed: bytes that
/// come late find nobody who would write them anywhere.
pub struct TcpLane {
    socket: TcpStream,
    pairing: Arc<Pairing>,
    local: LocalRanges,
    request: Vec<u8>,
    /// Whether the other end knows what is meant by blocks: units, where the two sides' differ.
    knows_units: bool,
    is_open: bool,
}

impl TcpLane {
    /// Takes a connection on whose other end [`serve`](super::serve) runs, over the cache that `pairing` has as the remote
    /// one.
    pub fn new(socket: TcpStream, pairing: Arc<Pairing>) -> Result<Self, LaneError> {
        prepare(&socket)?;
        Ok(Self {
            socket,
            local: match pairing.local() {
                LocalCache::Host(cache) => LocalRanges::new(Arc::clone(cache)),
                LocalCache::Device(_) => LocalRanges::none(),
            },
            knows_units: pairing.remote_slice().is_none(),
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
        self.send_request(&request, remote, patience)?;

        let pairing = Arc::clone(&self.pairing);
        let expected = pairing.payload_bytes(layers, remote.len());
        let mut walk = pairing.walk(layers, remote, local);
        if let LocalCache::Device(cache) = pairing.local() {
            return self.receive_on_device(cache, walk, expected, lease, patience, done_bytes);
        }
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
            answer => Err(LaneError::Protocol(format!("{answer:?} behind the bytes"))),
        }
    }

    /// Receives the answer to a fetch through pinned memory.
    fn receive_on_device(
        &mut self,
        cache: &DeviceCache,
        mut walk: Walk<'_>,
        expected: u64,
        lease: Lease,
        patience: &Patience<'_>,
        done_bytes: &mut u64,
    ) -> Result<(), LaneError> {
        match self.receive_answer(patience)? {
            Answer::Data { len_bytes } if len_bytes == expected => {}
            Answer::Lapsed => return Err(lease.lapsed()),
            answer => {
                return Err(LaneError::Protocol(format!(
                    "{answer:?} where {expected} bytes should come"
                )));
            }
        }
        let mut kept = None;
        let mut parts = Vec::new();
        while !walk.is_done() {
            let mut staging = match kept.take() {
                Some(staging) => staging,
                None => patience.on_device(*done_bytes, |patience| cache.staging(patience))?,
            };
            let len = gather_parts(&mut walk, staging.len().min(STAGED_BYTES), &mut parts);
            self.receive_exactly(&mut staging[..len], patience, *done_bytes)?;
            // Waits for the end of the copies, so nothing is on its way when this function returns.
            kept =
                Some(patience.on_device(*done_bytes, |patience| cache.scatter(&parts, staging, patience))?);
            *done_bytes += len as u64;
        }
        drop(kept);
        match self.receive_answer(patience)? {
            Answer::Held => Ok(()),
            Answer::Lapsed => Err(lease.lapsed()),
            answer => Err(LaneError::Protocol(format!("{answer:?} behind the bytes"))),
        }
    }

    pub(super) fn receive_answer(&mut self, patience: &Patience<'_>) -> Result<Answer, LaneError> {
        let mut answer = [0; ANSWER_BYTES];
        self.receive_exactly(&mut answer, patience, 0)?;
        Answer::decode(&answer)
    }

    /// Fills a buffer. There are no local ranges.
    pub(super) fn receive_exactly(
        &mut self,
        bytes: &mut [u8],
        patience: &Patience<'_>,
        done_bytes: u64,
    ) -> Result<(), LaneError> {
        let mut done = 0;
        while done < bytes.len() {
            patience.check(done_bytes)?;
            match receive(&self.socket, &mut bytes[done..], &mut self.local, &mut [])
                .map_err(|error| LaneError::of_socket("recvmsg", error))?
            {
                None => patience.wait(&self.socket, Interest::Readable)?,
                Some(moved) if moved.total() == 0 => return Err(closed()),
                Some(moved) => done += moved.front,
            }
        }
        Ok(())
    }

    fn ask(&mut self, lease: Lease, patience: &Patience<'_>) -> Result<bool, LaneError> {
        self.send_request(&Request::Check { lease }, &[], patience)?;
        match self.receive_answer(patience)? {
            Answer::Held => Ok(true),
            Answer::Lapsed => Ok(false),
            answer => Err(LaneError::Protocol(format!(
                "{answer:?} as the answer to a check"
            ))),
        }
    }

    /// Sends a request, and the blocks that belong to it.
    pub(super) fn send_request(
        &mut self,
        request: &Request,
        blocks: &[u32],
        patience: &Patience<'_>,
    ) -> Result<(), LaneError> {
        self.request.clear();
        if let Some(slice) = self.pairing.remote_slice()
            && !std::mem::replace(&mut self.knows_units, true)
        {
            self.request.extend_from_slice(&Request::Cut(slice).encode());
        }
        self.request.extend_from_slice(&request.encode());
        for block in blocks {
            self.request.extend_from_slice(&block.to_le_bytes());
        }
        self.local.clear();
        send_all(&self.socket, &self.request, &mut self.local, patience, 0)
    }

    /// The connection, for who only looks at it.
    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    pub(super) fn pairing(&self) -> &Arc<Pairing> {
        &self.pairing
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
    pub(super) fn guard<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, LaneError>,
    ) -> Result<T, LaneError> {
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

pub(super) fn patience(deadline: Instant, cancelled: &AtomicBool) -> Patience<'_> {
    Patience {
        deadline: Some(deadline),
        stop: cancelled,
        look_every: LOOK_EVERY,
    }
}

/// Takes as many parts off a walk as have up to `most_bytes`; returns how many they have.
pub(super) fn gather_parts(walk: &mut Walk<'_>, most_bytes: usize, parts: &mut Vec<RunPart>) -> usize {
    parts.clear();
    let mut len_bytes = 0;
    while parts.len() < PARTS_MAX
        && let Some(part) = walk.next(most_bytes - len_bytes)
    {
        len_bytes += part.len;
        parts.push(part.local());
    }
    len_bytes
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
