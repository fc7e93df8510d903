//! The lane over NCCL: the peer sends from its device, this side receives into staging of its own device and scatters that into
//! its blocks. No byte passes the host's memory unless NCCL has no other way.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvlane_cuda::{
    Communicator, CommunicatorId, CudaError, DeviceCache, NcclInfo, NcclVersion, Patience as DevicePatience,
    Rank,
};

use super::pairing::Walk;
use super::patience::Patience;
use super::tcp::{closed, patience};
use super::watch::{is_hung_up, is_refused};
use super::wire::{Answer, MAX_FETCH_BLOCKS, Request};
use super::{Lane, LaneError, Lease, LocalCache, Pairing, Span, TcpLane};

/// Longest time for one group of sends. Its kernels occupy a part of both devices until then, so a peer that has stopped must
/// not keep them for as long as a transfer may take.
pub(super) const GROUP_MAX: Duration = Duration::from_secs(5);

/// Longest time for making a communicator; NCCL looks for its ways, and the first time loads its kernels.
pub(super) const JOIN_MAX: Duration = Duration::from_secs(20);

/// Most bytes of staging that a peer may ask for; a decode server asks for as many.
pub(super) const STAGING_BYTES_MAX: u64 = 64 << 20;

/// Most parts that are handed to the device at a time.
const LOT_PARTS: usize = 1 << 16;

/// NCCL says that its connection broke somewhat before the peer's end of the data connection is seen, or after it.
const LOOK_FOR_END: Duration = Duration::from_millis(100);

/// Receives over a communicator of two, in requests of about as many bytes as its staging has.
///
/// - A request names blocks that the peer has said are readable, so its kernels do not wait for prefill's. The receive of a
///   group is started when the peer says that it starts the sends.
/// - NCCL writes the staging only, which belongs to the communicator. The bytes are copied from there into the blocks once all
///   of a group have come, and those copies are waited for as in [`CudaLane`](super::CudaLane): when an error ends the
///   communicator, what NCCL may still write is memory that nobody else gets.
/// - Requests, the lease and the end of the peer are the data connection's matter: a [`TcpLane`], on which the bytes do not go.
/// - A communicator is bound to both processes' place in the protocol, so any error but a lapsed lease ends it and closes the
///   lane.
pub struct NcclLane {
    line: TcpLane,
    local: Arc<DeviceCache>,
    /// Taken when it is of no use any more.
    communicator: Option<Communicator>,
}

impl NcclLane {
    /// Makes a communicator with the peer at the other end of `line`, over `staging_bytes` of device memory on either side. Waits
    /// for it, which may take seconds.
    pub fn open(
        mut line: TcpLane,
        staging_bytes: usize,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<Self, LaneError> {
        let LocalCache::Device(local) = line.pairing().local() else {
            return Err(LaneError::Layout(
                "the local cache is in host memory; allowed: on a device".to_owned(),
            ));
        };
        let local = Arc::clone(local);
        let version = NcclInfo::find().map_err(unavailable)?.version;
        let deadline = deadline.min(Instant::now() + JOIN_MAX);
        let patience = patience(deadline, cancelled);
        patience.check(0)?;
        let place = local.communicator_place().map_err(unavailable)?;
        let request = Request::Join {
            version,
            staging_bytes: staging_bytes as u64,
        };
        line.send_request(&request, &[], &patience)?;
        match line.receive_answer(&patience)? {
            Answer::Id => {}
            answer => return Err(refusal(&mut line, answer, &patience)),
        }
        let mut id = [0; CommunicatorId::LEN_BYTES];
        line.receive_exactly(&mut id, &patience, 0)?;
        let socket = line.socket();
        let joined = local.join(
            place,
            &CommunicatorId::from_bytes(id),
            Rank::Receiver,
            staging_bytes,
            &DevicePatience {
                deadline,
                cancelled: &|| {
                    cancelled.load(Ordering::Relaxed)
                        || is_hung_up(socket, Duration::ZERO)
                        || is_refused(socket)
                },
            },
        );
        if let Err(error) = &joined
            && !is_refused(socket)
        {
            return Err(match sorted(error.clone(), socket, cancelled, 0) {
                LaneError::Device(error) => unavailable(error),
                error => error,
            });
        }
        match line.receive_answer(&patience)? {
            Answer::Joined => {}
            answer => return Err(refusal(&mut line, answer, &patience)),
        }
        Ok(Self {
            line,
            local,
            communicator: Some(joined.map_err(unavailable)?),
        })
    }
}

/// Why two servers with these versions have no communicator.
pub(crate) fn other_version(prefill: NcclVersion, decode: NcclVersion) -> String {
    format!(
        "NCCL {prefill} on the prefill server and {decode} on the decode server: install the same version of PyTorch, or of its \
         package nvidia-nccl, on both"
    )
}

/// Why the peer does not take part.
fn refusal(line: &mut TcpLane, answer: Answer, patience: &Patience<'_>) -> LaneError {
    let Answer::Refused { len_bytes } = answer else {
        return LaneError::Protocol(format!("{answer:?} as the answer to a join"));
    };
    let mut sentence = vec![0; len_bytes];
    match line.receive_exactly(&mut sentence, patience, 0) {
        Ok(()) => LaneError::Unavailable(format!(
            "the peer says: {}",
            String::from_utf8_lossy(&sentence)
                .chars()
                .filter(|letter| !letter.is_control())
                .collect::<String>()
        )),
        Err(error) => error,
    }
}

fn unavailable(error: CudaError) -> LaneError {
    LaneError::Unavailable(error.to_string())
}

/// What an error of a communicator was: the caller's wish, the end of the peer, or NCCL's own.
fn sorted(
    error: CudaError,
    socket: &std::net::TcpStream,
    cancelled: &AtomicBool,
    done_bytes: u64,
) -> LaneError {
    let look_for = match &error {
        CudaError::Cancelled { .. } if !cancelled.load(Ordering::Relaxed) => Duration::ZERO,
        error if error.may_be_the_peers() => LOOK_FOR_END,
        _ => return LaneError::of_device(error, done_bytes),
    };
    if is_hung_up(socket, look_for) {
        closed()
    } else {
        LaneError::of_device(error, done_bytes)
    }
}

/// One copy: what it is of, and how far it is.
struct Copying<'a> {
    line: &'a mut TcpLane,
    local: &'a DeviceCache,
    communicator: &'a mut Communicator,
    lease: Lease,
    deadline: Instant,
    cancelled: &'a AtomicBool,
    done_bytes: u64,
}

impl Copying<'_> {
    fn copy_all(&mut self, span: &Span) -> Result<(), LaneError> {
        let pairing = Arc::clone(self.line.pairing());
        let mut requests = Requests::new(&pairing, span, self.communicator.staging_bytes());
        let mut next = requests.next();
        if let Some(first) = &next {
            self.ask(first)?;
        }
        while let Some(request) = next.take() {
            let mut walk = pairing.walk(&request.layers, request.remote, request.local);
            let mut left = pairing.payload_bytes(&request.layers, request.local.len());
            while left > 0 {
                let len = self.receive_group(left)?;
                left -= len as u64;
                if left == 0 {
                    self.check_held()?;
                    next = requests.next();
                    // The peer gathers the next bytes while these are scattered.
                    if let Some(next) = &next {
                        self.ask(next)?;
                    }
                }
                self.scatter(&mut walk, len)?;
            }
        }
        Ok(())
    }

    fn ask(&mut self, wanted: &Wanted<'_>) -> Result<(), LaneError> {
        let patience = patience(self.deadline, self.cancelled);
        patience.check(self.done_bytes)?;
        let request = Request::Transmit {
            lease: self.lease,
            layers: wanted.layers.clone(),
            block_count: wanted.remote.len(),
        };
        self.line.send_request(&request, wanted.remote, &patience)
    }

    /// Receives the next group into the staging: how many bytes, of which `left` are to come.
    fn receive_group(&mut self, left: u64) -> Result<usize, LaneError> {
        let patience = patience(self.deadline, self.cancelled);
        let sends = match self.receive_answer(&patience)? {
            Answer::Group { sends } => sends,
            Answer::Lapsed => return Err(self.lease.lapsed()),
            answer => {
                return Err(LaneError::Protocol(format!(
                    "{answer:?} where {left} bytes should come"
                )));
            }
        };
        let mut bytes = vec![0; 4 * sends];
        self.line
            .receive_exactly(&mut bytes, &patience, self.done_bytes)?;
        let lens: Vec<usize> = bytes
            .chunks_exact(4)
            .map(|len| u32::from_le_bytes(len.try_into().expect("four bytes")) as usize)
            .collect();
        let total: u64 = lens.iter().map(|&len| len as u64).sum();
        let most = left.min(self.communicator.staging_bytes() as u64);
        if lens.contains(&0) || total > most {
            return Err(LaneError::Protocol(format!(
                "a group of {sends} sends with {total} bytes; allowed: at most {most} bytes, none empty"
            )));
        }
        let socket = self.line.socket();
        let received = self.communicator.receive(
            &lens,
            &DevicePatience {
                deadline: self.deadline.min(Instant::now() + GROUP_MAX),
                cancelled: &|| self.cancelled.load(Ordering::Relaxed) || is_hung_up(socket, Duration::ZERO),
            },
        );
        received.map_err(|error| sorted(error, socket, self.cancelled, self.done_bytes))?;
        Ok(total as usize)
    }

    /// Copies `len` received bytes to where they belong.
    fn scatter(&mut self, walk: &mut Walk<'_>, len: usize) -> Result<(), LaneError> {
        let patience = DevicePatience {
            deadline: self.deadline,
            cancelled: &|| self.cancelled.load(Ordering::Relaxed),
        };
        let mut left = len;
        while left > 0 {
            let mut parts = Vec::new();
            while parts.len() < LOT_PARTS
                && let Some(part) = walk.next(left)
            {
                left -= part.len;
                parts.push(part.local());
            }
            match self.local.scatter_received(self.communicator, &parts, &patience) {
                Ok(bytes) => self.done_bytes += bytes,
                Err(failed) => {
                    return Err(LaneError::of_device(
                        failed.error,
                        self.done_bytes + failed.done_bytes,
                    ));
                }
            }
        }
        Ok(())
    }

    /// The answer behind the last byte.
    fn check_held(&mut self) -> Result<(), LaneError> {
        let patience = patience(self.deadline, self.cancelled);
        match self.receive_answer(&patience)? {
            Answer::Held => Ok(()),
            Answer::Lapsed => Err(self.lease.lapsed()),
            answer => Err(LaneError::Protocol(format!("{answer:?} behind the bytes"))),
        }
    }

    fn receive_answer(&mut self, patience: &Patience<'_>) -> Result<Answer, LaneError> {
        // For the text of an error: what has come so far.
        patience.check(self.done_bytes)?;
        match self.line.receive_answer(patience) {
            Err(LaneError::TimedOut { .. }) => Err(LaneError::TimedOut {
                done_bytes: self.done_bytes,
            }),
            Err(LaneError::Cancelled { .. }) => Err(LaneError::Cancelled {
                done_bytes: self.done_bytes,
            }),
            answer => answer,
        }
    }
}

/// What one request is for.
struct Wanted<'a> {
    layers: Range<usize>,
    remote: &'a [u32],
    local: &'a [u32],
}

/// A span in requests of at most so many bytes, unless one block of one layer has more: whole layers where they fit.
struct Requests<'a> {
    pairing: &'a Pairing,
    span: &'a Span,
    most_bytes: u64,
    layer: usize,
    /// In the layer.
    position: usize,
}

impl<'a> Requests<'a> {
    fn new(pairing: &'a Pairing, span: &'a Span, most_bytes: usize) -> Self {
        Self {
            pairing,
            span,
            most_bytes: most_bytes as u64,
            layer: span.layers.start,
            position: 0,
        }
    }
}

impl<'a> Iterator for Requests<'a> {
    type Item = Wanted<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let blocks = self.span.local.len();
        if self.layer >= self.span.layers.end || blocks == 0 {
            return None;
        }
        let first = self.layer;
        let bytes = |layers: Range<usize>, blocks| self.pairing.payload_bytes(&layers, blocks);
        if self.position == 0
            && blocks <= MAX_FETCH_BLOCKS
            && bytes(first..first + 1, blocks) <= self.most_bytes
        {
            let mut end = first + 1;
            while end < self.span.layers.end && bytes(first..end + 1, blocks) <= self.most_bytes {
                end += 1;
            }
            self.layer = end;
            return Some(Wanted {
                layers: first..end,
                remote: &self.span.remote,
                local: &self.span.local,
            });
        }
        let block_bytes = bytes(first..first + 1, 1).max(1);
        let count = usize::try_from(self.most_bytes / block_bytes)
            .unwrap_or(usize::MAX)
            .clamp(1, MAX_FETCH_BLOCKS)
            .min(blocks - self.position);
        let wanted = self.position..self.position + count;
        self.position = wanted.end;
        if self.position == blocks {
            self.position = 0;
            self.layer += 1;
        }
        Some(Wanted {
            layers: first..first + 1,
            remote: &self.span.remote[wanted.clone()],
            local: &self.span.local[wanted],
        })
    }
}

impl Lane for NcclLane {
    fn name(&self) -> &'static str {
        "nccl"
    }

    fn is_open(&self) -> bool {
        self.communicator.is_some() && self.line.is_open()
    }

    fn copy(
        &mut self,
        span: &Span,
        lease: Lease,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), LaneError> {
        self.line.pairing().check(span)?;
        // Nothing was sent yet, so this does not close the lane.
        patience(deadline, cancelled).check(0)?;
        if span.layers.is_empty() || span.local.is_empty() {
            return self.line.copy(span, lease, deadline, cancelled);
        }
        let Self {
            line,
            local,
            communicator: made,
        } = self;
        let Some(communicator) = made else {
            return Err(LaneError::Closed);
        };
        let result = line.guard(|line| {
            let mut copying = Copying {
                line,
                local,
                communicator,
                lease,
                deadline,
                cancelled,
                done_bytes: 0,
            };
            copying.copy_all(span)
        });
        if !self.line.is_open() {
            self.communicator = None;
        }
        result
    }

    fn is_held(
        &mut self,
        lease: Lease,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<bool, LaneError> {
        if !self.is_open() {
            return Err(LaneError::Closed);
        }
        self.line.is_held(lease, deadline, cancelled)
    }
}

impl std::fmt::Debug for NcclLane {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("NcclLane")
            .field("line", &self.line)
            .field("communicator", &self.communicator)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::RemoteCache;
    use super::super::fixture::{Form, cache};
    use super::*;

    fn cut(layers: usize, blocks: u32, layer_bytes: usize, most_bytes: usize) -> Vec<(Range<usize>, usize)> {
        let theirs = cache(Form::BlockMajor, layers, blocks, layer_bytes);
        let pairing = Pairing::new(
            &theirs,
            RemoteCache::of(kvlane_core::PagedMemory::map(&*theirs)).unwrap(),
        )
        .unwrap();
        let all: Vec<u32> = (0..blocks).collect();
        let span = Span {
            layers: 0..layers,
            remote: all.clone(),
            local: all,
        };
        Requests::new(&pairing, &span, most_bytes)
            .map(|wanted| {
                assert_eq!(wanted.remote, wanted.local);
                (wanted.layers, wanted.local.len())
            })
            .collect()
    }

    #[test]
    fn requests_have_whole_layers_where_they_fit_and_pieces_of_one_where_not() {
        assert_eq!(cut(5, 4, 10, 80), [(0..2, 4), (2..4, 4), (4..5, 4)]);
        assert_eq!(
            cut(2, 5, 10, 20),
            [(0..1, 2), (0..1, 2), (0..1, 1), (1..2, 2), (1..2, 2), (1..2, 1)]
        );
        // One block alone is more: the groups of its answer are smaller then.
        assert_eq!(cut(1, 2, 100, 30), [(0..1, 1), (0..1, 1)]);
        let most = MAX_FETCH_BLOCKS;
        assert_eq!(cut(1, most as u32 + 3, 2, usize::MAX), [(0..1, most), (0..1, 3)]);
    }

    #[test]
    fn no_layers_and_no_blocks_are_no_request() {
        let theirs = cache(Form::BlockMajor, 2, 2, 10);
        let pairing = Pairing::new(
            &theirs,
            RemoteCache::of(kvlane_core::PagedMemory::map(&*theirs)).unwrap(),
        )
        .unwrap();
        for span in [
            Span {
                layers: 1..1,
                remote: vec![0],
                local: vec![0],
            },
            Span {
                layers: 0..2,
                ..Span::default()
            },
        ] {
            assert!(Requests::new(&pairing, &span, 100).next().is_none());
        }
    }
}
