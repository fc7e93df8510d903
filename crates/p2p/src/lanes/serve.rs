//! The holder's end of a data connection.

use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kvlane_cuda::{Communicator, DeviceCache};

use super::pairing::{Walk, check_blocks, check_layers};
use super::patience::Patience;
use super::tcp::{STAGED_BYTES, closed, gather_parts, prepare, send_all};
use super::wire::{Answer, REQUEST_BYTES, Request, TAKE_BYTES, decode_prompt, encode_lease};
use super::{Cut, LaneError, Lease, LocalCache, Pairing, PostedPrompt, RemoteCache};
use crate::raw::{Interest, LocalRanges, receive};
use crate::shape::{CacheShape, Slice};

/// Bytes of one call. Fewer wake the receiver more often than it has something to do; of more, it waits for the first
/// ones while the last are still being sent (measured over loopback, 64 KiB to 4 MiB).
const PIECE_BYTES: usize = 1 << 20;

/// How often a waiting thread looks whether it should stop.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What a data connection was used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Fetches answered with bytes.
    pub fetches: u64,
    /// Payload bytes sent.
    pub bytes: u64,
}

/// What the serving end knows of leases. A function that says whether a lease is held is enough.
pub trait Leases {
    /// Whether a lease is held. It is asked before a block is read, now and then meanwhile, and after the last byte was. It
    /// may be slow, and must stop saying yes before a block of the lease is written by others.
    fn is_held(&self, lease: Lease) -> bool;

    /// A prompt that is computed whole, by the hash of its key and its digest.
    fn find_posted(&self, _key: &[u8; 32], _digest: &[u8; 32]) -> Option<PostedPrompt> {
        None
    }
}

impl<F: Fn(Lease) -> bool> Leases for F {
    fn is_held(&self, lease: Lease) -> bool {
        self(lease)
    }
}

/// Answers the fetches, checks, joins and transmits of one peer until it closes the connection or `stop` is set, which is seen within a
/// tenth of a second; shutting the connection down ends it at once. Blocks the thread.
///
/// A peer whose blocks differ asks for units of these; it can if their `shape` is known.
///
/// A request must be complete within `timeout` after its first byte, and so must its answer. An error closes the
/// connection: the peer broke the protocol or asked for what the cache does not have, a lease lapsed while its blocks were
/// on their way, time ran out, or the peer is gone.
pub fn serve(
    socket: TcpStream,
    cache: impl Into<LocalCache>,
    shape: Option<&CacheShape>,
    leases: impl Leases,
    stop: &AtomicBool,
    timeout: Duration,
) -> Result<Served, LaneError> {
    let cache = cache.into();
    let mut server = Server {
        ranges: match &cache {
            LocalCache::Host(cache) => LocalRanges::new(Arc::clone(cache)),
            LocalCache::Device(_) => LocalRanges::none(),
        },
        // The walk over a cache paired with itself is the order in which the peer expects the bytes.
        pairing: Arc::new(Pairing::new(cache.clone(), RemoteCache::of(cache.map())?)?),
        shape,
        leases,
        socket,
        served: Served::default(),
        blocks: Vec::new(),
        block_bytes: Vec::new(),
        communicator: None,
    };
    let result = server.run(stop, timeout);
    // Also where somebody else has a copy of the descriptor. Fails only where the connection is gone already.
    let _ = server.socket.shutdown(Shutdown::Both);
    result.map(|()| server.served)
}

struct Server<'a, L> {
    socket: TcpStream,
    pairing: Arc<Pairing>,
    shape: Option<&'a CacheShape>,
    ranges: LocalRanges,
    leases: L,
    served: Served,
    blocks: Vec<u32>,
    block_bytes: Vec<u8>,
    /// Of the lane `nccl`.
    communicator: Option<Communicator>,
}

mod nccl;

impl<L: Leases> Server<'_, L> {
    fn run(&mut self, stop: &AtomicBool, timeout: Duration) -> Result<(), LaneError> {
        prepare(&self.socket)?;
        let mut patience = Patience {
            deadline: None,
            stop,
            look_every: LOOK_EVERY,
        };
        loop {
            patience.deadline = None;
            let mut request = [0; REQUEST_BYTES];
            let first = match self.receive_some(&mut request, &patience) {
                Ok(0) | Err(LaneError::Cancelled { .. }) => return Ok(()),
                first => first?,
            };
            patience.deadline = Instant::now().checked_add(timeout);
            self.receive_all(&mut request[first..], &patience)?;
            match Request::decode(&request)? {
                Request::Check { lease } => {
                    let answer = Answer::of_lease(self.leases.is_held(lease));
                    self.send(&answer.encode(), &patience)?;
                }
                Request::Fetch {
                    lease,
                    layers,
                    block_count,
                } => {
                    self.receive_blocks(block_count, &patience)?;
                    self.answer(lease, &layers, &patience)?;
                }
                Request::Join {
                    version,
                    staging_bytes,
                } => self.join(version, staging_bytes, &patience)?,
                Request::Transmit {
                    lease,
                    layers,
                    block_count,
                } => {
                    self.receive_blocks(block_count, &patience)?;
                    self.transmit(lease, &layers, &patience)?;
                }
                Request::Cut(slice) => self.cut(slice)?,
                Request::Take {
                    layers,
                    first_block,
                    block_count,
                } => self.take(&layers, first_block, block_count, &patience)?,
            }
        }
    }

    /// From here on blocks are units.
    fn cut(&mut self, slice: Slice) -> Result<(), LaneError> {
        let shape = self.shape.ok_or_else(|| {
            LaneError::Request("units of blocks, of which is not known what they hold".to_owned())
        })?;
        let cache = self.pairing.local().clone();
        let regions = cache.map().regions();
        let cut = Cut::new(shape, regions.iter().map(|region| region.runs.as_slice()), slice)?;
        let remote = self.pairing.remote().clone();
        self.pairing = Arc::new(Pairing::cut(cache.clone(), cut.clone(), remote, cut)?);
        Ok(())
    }

    /// The blocks of a fetch, whose number was found to be allowed.
    fn receive_blocks(&mut self, block_count: usize, patience: &Patience<'_>) -> Result<(), LaneError> {
        let mut bytes = std::mem::take(&mut self.block_bytes);
        bytes.resize(4 * block_count, 0);
        let received = self.receive_all(&mut bytes, patience);
        self.blocks.clear();
        self.blocks.extend(
            bytes
                .chunks_exact(4)
                .map(|block| u32::from_le_bytes(block.try_into().expect("four bytes"))),
        );
        self.block_bytes = bytes;
        received
    }

    fn answer(
        &mut self,
        lease: Lease,
        layers: &Range<usize>,
        patience: &Patience<'_>,
    ) -> Result<(), LaneError> {
        let map = self.pairing.local().map();
        check_layers(layers, map.layer_count())?;
        check_blocks("this", &self.blocks, self.pairing.local_units())?;
        if !self.leases.is_held(lease) {
            return self.send(&Answer::Lapsed.encode(), patience);
        }
        let len_bytes = self.pairing.payload_bytes(layers, self.blocks.len());
        let head = Answer::Data { len_bytes }.encode();
        self.send_blocks(lease, layers, &head, patience)
    }

    /// Answers with blocks of a prompt that nobody has granted, if it is posted.
    fn take(
        &mut self,
        layers: &Range<usize>,
        first_block: u32,
        block_count: usize,
        patience: &Patience<'_>,
    ) -> Result<(), LaneError> {
        let mut bytes = [0; TAKE_BYTES];
        self.receive_all(&mut bytes, patience)?;
        check_layers(layers, self.pairing.local().map().layer_count())?;
        if self.pairing.remote_slice().is_some() {
            return Err(LaneError::Protocol("a take of units".to_owned()));
        }
        let (key, digest) = decode_prompt(&bytes);
        let posted = self.leases.find_posted(&key, &digest);
        let wanted = first_block as usize..first_block as usize + block_count;
        let found = posted
            .as_ref()
            .and_then(|posted| Some((posted.lease, posted.blocks.get(wanted)?)));
        let Some((lease, blocks)) = found.filter(|(lease, _)| self.leases.is_held(*lease)) else {
            return self.send(&Answer::Absent.encode(), patience);
        };
        self.blocks.clear();
        self.blocks.extend_from_slice(blocks);
        check_blocks("this", &self.blocks, self.pairing.local_units())?;
        let len_bytes = self.pairing.payload_bytes(layers, self.blocks.len());
        let head = [
            Answer::Found { len_bytes }.encode().as_slice(),
            &encode_lease(lease),
        ]
        .concat();
        self.send_blocks(lease, layers, &head, patience)
    }

    /// Sends `head`, the blocks, and whether the lease was held until then.
    fn send_blocks(
        &mut self,
        lease: Lease,
        layers: &Range<usize>,
        head: &[u8],
        patience: &Patience<'_>,
    ) -> Result<(), LaneError> {
        if let LocalCache::Device(cache) = self.pairing.local() {
            let cache = Arc::clone(cache);
            return self.answer_from_device(&cache, layers, head, lease, patience);
        }
        let mut front = head;
        let mut done_bytes = 0;
        let mut walk = self.pairing.walk(layers, &self.blocks, &self.blocks);
        loop {
            self.ranges.clear();
            while self.ranges.count() < LocalRanges::MAX {
                let Some(part) = walk.next(PIECE_BYTES - self.ranges.len_bytes()) else {
                    break;
                };
                self.ranges
                    .push(part.layer, part.block, part.run, part.offset, part.len);
            }
            let piece_bytes = self.ranges.len_bytes() as u64;
            send_all(&self.socket, front, &mut self.ranges, patience, done_bytes)?;
            front = &[];
            done_bytes += piece_bytes;
            // The kernel has its copy of the bytes, so this is after the last one was read.
            let is_held = self.leases.is_held(lease);
            if walk.is_done() {
                self.served.fetches += 1;
                self.served.bytes += done_bytes;
                return self.send(&Answer::of_lease(is_held).encode(), patience);
            }
            if !is_held {
                return Err(lease.lapsed());
            }
        }
    }

    /// Sends through pinned memory.
    fn answer_from_device(
        &mut self,
        cache: &DeviceCache,
        layers: &Range<usize>,
        head: &[u8],
        lease: Lease,
        patience: &Patience<'_>,
    ) -> Result<(), LaneError> {
        let mut done_bytes = 0;
        let mut parts = Vec::new();
        let mut walk: Walk<'_> = self.pairing.walk(layers, &self.blocks, &self.blocks);
        send_all(&self.socket, head, &mut self.ranges, patience, 0)?;
        loop {
            let most_bytes = cache.buffer_bytes().min(STAGED_BYTES);
            let len = gather_parts(&mut walk, most_bytes, &mut parts);
            if len > 0 {
                let bytes = patience.on_device(done_bytes, |patience| cache.gather(&parts, patience))?;
                send_all(
                    &self.socket,
                    &bytes[..len],
                    &mut self.ranges,
                    patience,
                    done_bytes,
                )?;
                done_bytes += len as u64;
            }
            // The buffer had its copy before, so this is after the last byte was read.
            let is_held = self.leases.is_held(lease);
            if walk.is_done() {
                self.served.fetches += 1;
                self.served.bytes += done_bytes;
                return self.send(&Answer::of_lease(is_held).encode(), patience);
            }
            if !is_held {
                return Err(lease.lapsed());
            }
        }
    }

    fn send(&mut self, bytes: &[u8], patience: &Patience<'_>) -> Result<(), LaneError> {
        self.ranges.clear();
        send_all(&self.socket, bytes, &mut self.ranges, patience, 0)
    }

    fn receive_all(&mut self, bytes: &mut [u8], patience: &Patience<'_>) -> Result<(), LaneError> {
        let mut done = 0;
        while done < bytes.len() {
            match self.receive_some(&mut bytes[done..], patience)? {
                0 => return Err(closed()),
                more => done += more,
            }
        }
        Ok(())
    }

    /// At least one byte; none if the peer has closed.
    fn receive_some(&mut self, bytes: &mut [u8], patience: &Patience<'_>) -> Result<usize, LaneError> {
        self.ranges.clear();
        loop {
            patience.check(0)?;
            match receive(&self.socket, bytes, &mut self.ranges, &mut [])
                .map_err(|error| LaneError::of_socket("recvmsg", error))?
            {
                None => patience.wait(&self.socket, Interest::Readable)?,
                Some(moved) => return Ok(moved.front),
            }
        }
    }
}
