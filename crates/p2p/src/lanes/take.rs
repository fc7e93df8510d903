//! Small prompts over a data connection in one exchange: asked for and answered, without a lease that was granted before.
//!
//! The holder looks among its posted prompts. Nobody waits here: whoever has a moment looks whether something has come.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;

use super::offer_board::key_hash;
use super::tcp::{closed, prepare};
use super::wire::{ANSWER_BYTES, Answer, LEASE_BYTES, Request, decode_lease, encode_prompt};
use super::{LaneError, Lease, LocalCache, Pairing};
use crate::key::{Prompt, TransferKey};
use crate::raw::{LocalRanges, receive, send};

const HEAD_BYTES: usize = ANSWER_BYTES + LEASE_BYTES;

/// One data connection for takes, one at a time. On any doubt it is dropped, which closes it: bytes that come late find nobody
/// who would write them anywhere.
pub struct TakeLine {
    socket: TcpStream,
    pairing: Arc<Pairing>,
    local: LocalRanges,
    /// For calls that move nothing of a cache.
    nothing: LocalRanges,
    head: [u8; HEAD_BYTES],
    tail: [u8; ANSWER_BYTES],
    head_done: usize,
    tail_done: usize,
    /// Payload bytes of the take that runs. None: none does.
    expected: Option<u64>,
}

/// What came of a take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Every byte is there, and the lease was held after the last one was read.
    Found(Lease),
    /// It is not posted, or was not held any more.
    Absent,
}

impl TakeLine {
    /// Takes a connection on whose other end [`serve`](super::serve) runs. `None`: of these caches nothing can be taken; they
    /// are on a device or have other blocks.
    pub fn new(socket: TcpStream, pairing: Arc<Pairing>) -> Result<Option<Self>, LaneError> {
        let LocalCache::Host(cache) = pairing.local() else {
            return Ok(None);
        };
        if pairing.remote_slice().is_some() {
            return Ok(None);
        }
        prepare(&socket)?;
        Ok(Some(Self {
            local: LocalRanges::new(Arc::clone(cache)),
            nothing: LocalRanges::none(),
            socket,
            pairing,
            head: [0; HEAD_BYTES],
            tail: [0; ANSWER_BYTES],
            head_done: 0,
            tail_done: 0,
            expected: None,
        }))
    }

    /// Asks for all layers of blocks of a prompt, from `first_block` on. False: not now, and nothing was sent; a take runs, or
    /// the blocks are in too many pieces.
    pub fn begin(
        &mut self,
        key: &TransferKey,
        prompt: &Prompt,
        first_block: u32,
        targets: &[u32],
    ) -> Result<bool, LaneError> {
        if self.expected.is_some() || targets.iter().any(|&block| block >= self.pairing.local_units()) {
            return Ok(false);
        }
        let layers = 0..self.pairing.local().map().layer_count();
        // Where the peer's blocks are is its own affair.
        let remote = vec![0; targets.len()];
        let mut walk = self.pairing.walk(&layers, &remote, targets);
        self.local.clear();
        while self.local.count() < LocalRanges::MAX
            && let Some(part) = walk.next(usize::MAX)
        {
            self.local
                .push(part.layer, part.block, part.run, part.offset, part.len);
        }
        if !walk.is_done() {
            return Ok(false);
        }
        let request = Request::Take {
            layers: layers.clone(),
            first_block,
            block_count: targets.len(),
        };
        let bytes = [
            request.encode().as_slice(),
            &encode_prompt(&key_hash(key), &prompt.digest),
        ]
        .concat();
        let sent = send(&self.socket, &bytes, &mut self.nothing)
            .map_err(|error| LaneError::of_socket("sendmsg", error))?;
        // Nothing else is under way there, so there is room for so little.
        if sent.is_none_or(|sent| sent.front < bytes.len()) {
            return Err(closed());
        }
        (self.head_done, self.tail_done) = (0, 0);
        self.expected = Some(self.pairing.payload_bytes(&layers, targets.len()));
        Ok(true)
    }

    /// Takes what has come. `None`: more will. After an error the line must be dropped.
    pub fn progress(&mut self) -> Result<Option<Taken>, LaneError> {
        let Some(expected) = self.expected else {
            return self.check_idle().map(|()| None);
        };
        loop {
            let received = receive(
                &self.socket,
                &mut self.head[self.head_done..],
                &mut self.local,
                &mut self.tail[self.tail_done..],
            )
            .map_err(|error| LaneError::of_socket("recvmsg", error))?;
            let Some(moved) = received else { return Ok(None) };
            if moved.total() == 0 {
                return Err(closed());
            }
            self.head_done += moved.front;
            self.tail_done += moved.back;
            if self.head_done < ANSWER_BYTES {
                continue;
            }
            let (answer, lease) = self.head.split_at(ANSWER_BYTES);
            match Answer::decode(answer.try_into().expect("the front of the head"))? {
                Answer::Absent if self.head_done == ANSWER_BYTES => {
                    self.end();
                    return Ok(Some(Taken::Absent));
                }
                Answer::Found { len_bytes } if len_bytes == expected => {}
                answer => {
                    return Err(LaneError::Protocol(format!(
                        "{answer:?} where {expected} bytes should come"
                    )));
                }
            }
            if self.tail_done < ANSWER_BYTES {
                continue;
            }
            let lease = decode_lease(lease.try_into().expect("the rest of the head"));
            let taken = match Answer::decode(&self.tail)? {
                Answer::Held => Taken::Found(lease),
                Answer::Lapsed => Taken::Absent,
                answer => return Err(LaneError::Protocol(format!("{answer:?} behind the bytes"))),
            };
            self.end();
            return Ok(Some(taken));
        }
    }

    /// The connection, for who waits for it.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    fn end(&mut self) {
        self.expected = None;
        self.local.clear();
    }

    /// Between two takes nothing comes but the end of the connection.
    fn check_idle(&mut self) -> Result<(), LaneError> {
        let received = receive(&self.socket, &mut self.head, &mut self.nothing, &mut [])
            .map_err(|error| LaneError::of_socket("recvmsg", error))?;
        match received {
            None => Ok(()),
            Some(moved) if moved.total() == 0 => Err(closed()),
            Some(moved) => Err(LaneError::Protocol(format!(
                "{} bytes that nobody asked for",
                moved.total()
            ))),
        }
    }
}

impl Drop for TakeLine {
    /// Also where a child of this process has a copy of the descriptor.
    fn drop(&mut self) {
        // Fails only where the connection is gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl std::fmt::Debug for TakeLine {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("TakeLine")
            .field("socket", &self.socket)
            .field("is_busy", &self.expected.is_some())
            .finish_non_exhaustive()
    }
}
