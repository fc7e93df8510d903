//! The lane to a process of the same machine: its memory is read by system call, straight into the local runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Instant;

use super::offer_board::{ENTRY_BYTES, PostedPrompt, entry_offset, entry_stride_bytes, parse};
use super::pairing::Walk;
use super::{Lane, LaneError, Lease, LocalCache, Pairing, Span};
use crate::key::{Prompt, TransferKey};
use crate::raw::{LocalRanges, RemoteRanges, read_process, read_process_bytes};

/// Most bytes between two looks at the clock and the caller's flag: about a millisecond of copying. More ranges in a call
/// than eight change nothing.
const WINDOW_BYTES: usize = 4 << 20;

/// What a peer says about its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerMemory {
    /// Its process, as it sees itself.
    pub pid: u32,
    /// Where [`ProbeToken::address`](super::ProbeToken::address) says.
    pub token_address: u64,
    /// What is there.
    pub token: [u8; 16],
    /// Where [`EpochTable::address`](super::EpochTable::address) says.
    pub epochs_address: u64,
    /// Number of slots of the table.
    pub epoch_slots: u32,
    /// Where [`OfferBoard::address`](super::OfferBoard::address) says.
    pub board_address: u64,
    /// Number of entries of the board; none: it has no board.
    pub board_entries: u32,
}

/// Copies by `process_vm_readv`, which needs nothing of the peer but that its process lives: not even that it runs.
///
/// Any number of lanes to one peer may copy at the same time, and two threads copy nearly twice as fast as one: half of the
/// time goes into the kernel's finding and holding the peer's pages, unless
/// [these are huge](super::prefer_huge_pages), which is not what memory limits.
pub struct ShmLane {
    peer: PeerMemory,
    pid: i32,
    pairing: Arc<Pairing>,
    local: LocalRanges,
    remote: RemoteRanges,
    is_open: bool,
}

impl ShmLane {
    /// Opens the lane if this process may read the peer's memory and finds its token there.
    pub fn open(peer: PeerMemory, pairing: Arc<Pairing>) -> Result<Self, LaneError> {
        let pid = i32::try_from(peer.pid)
            .ok()
            .filter(|&pid| pid > 0)
            .ok_or_else(|| LaneError::Layout(format!("no process has the number {}", peer.pid)))?;
        let table_bytes = 8 * u64::from(peer.epoch_slots);
        let board_bytes = entry_stride_bytes() * u64::from(peer.board_entries);
        let fits = |address: u64, len: u64| {
            address != 0 && address.checked_add(len).is_some_and(|end| end <= i64::MAX as u64)
        };
        if !fits(peer.token_address, 16) || !fits(peer.epochs_address, table_bytes) {
            return Err(LaneError::Layout(format!(
                "a token at {:#x} and {} epochs at {:#x} are no memory",
                peer.token_address, peer.epoch_slots, peer.epochs_address
            )));
        }
        if peer.board_entries > 0 && !fits(peer.board_address, board_bytes) {
            return Err(LaneError::Layout(format!(
                "a board of {} prompts at {:#x} is no memory",
                peer.board_entries, peer.board_address
            )));
        }
        let LocalCache::Host(local) = pairing.local() else {
            return Err(LaneError::Layout(
                "the local cache is on a device; allowed: in host memory".to_owned(),
            ));
        };
        let lane = Self {
            pid,
            peer,
            local: LocalRanges::new(Arc::clone(local)),
            remote: RemoteRanges::new(),
            pairing,
            is_open: true,
        };
        lane.probe()?;
        Ok(lane)
    }

    /// The prompt, if the peer has posted it. Needs nothing of the peer but that its process lives.
    pub fn find_posted(
        &mut self,
        key: &TransferKey,
        prompt: &Prompt,
    ) -> Result<Option<PostedPrompt>, LaneError> {
        let Some(offset) = entry_offset(key, self.peer.board_entries) else {
            return Ok(None);
        };
        let (mut token, mut entry) = ([0; 16], [0; ENTRY_BYTES]);
        let read = read_process_bytes(
            self.pid,
            [
                (&mut entry, self.peer.board_address + offset),
                (&mut token, self.peer.token_address),
            ],
        );
        // The blocks are read behind the entry that names them.
        fence(Ordering::SeqCst);
        let checked = match read {
            Ok(true) if token == self.peer.token => Ok(parse(&entry, key, prompt)),
            Ok(_) => Err(LaneError::WrongProcess { pid: self.pid }),
            Err(error) => Err(LaneError::of_process(self.pid, error)),
        };
        self.note(checked)
    }

    /// Whether the process still is the one that gave the token.
    fn probe(&self) -> Result<(), LaneError> {
        let mut token = [0; 16];
        let whole = read_process_bytes(self.pid, [(&mut token, self.peer.token_address)])
            .map_err(|error| LaneError::of_process(self.pid, error))?;
        if whole && token == self.peer.token {
            Ok(())
        } else {
            Err(LaneError::WrongProcess { pid: self.pid })
        }
    }

    /// Reads a slot, and the token with it: a process that got the peer's number after its end does not have it.
    fn epoch(&self, slot: u32) -> Result<u64, LaneError> {
        let (mut token, mut epoch) = ([0; 16], [0; 8]);
        let address = self.peer.epochs_address + 8 * u64::from(slot);
        // The slot must be read after all bytes that were copied before.
        fence(Ordering::SeqCst);
        let whole = read_process_bytes(
            self.pid,
            [(&mut epoch, address), (&mut token, self.peer.token_address)],
        )
        .map_err(|error| LaneError::of_process(self.pid, error))?;
        if !whole || token != self.peer.token {
            return Err(LaneError::WrongProcess { pid: self.pid });
        }
        // The kernel may read the eight bytes one by one while the slot changes. They still look unchanged only if each
        // byte that changed was read before: that is a read of the whole slot before the change.
        Ok(u64::from_ne_bytes(epoch))
    }

    fn check_lease(&self, lease: Lease) -> Result<bool, LaneError> {
        if lease.slot >= self.peer.epoch_slots {
            return Err(LaneError::Request(format!(
                "slot {}; the peer has {}",
                lease.slot, self.peer.epoch_slots
            )));
        }
        Ok(lease.epoch != 0 && self.epoch(lease.slot)? == lease.epoch)
    }

    fn copy_all(&mut self, span: &Span, deadline: Instant, cancelled: &AtomicBool) -> Result<(), LaneError> {
        let pairing = Arc::clone(&self.pairing);
        let mut walk = pairing.walk(&span.layers, &span.remote, &span.local);
        let mut done_bytes = 0;
        loop {
            check_time(deadline, cancelled, done_bytes)?;
            if walk.is_done() {
                return Ok(());
            }
            self.fill(&mut walk);
            while self.local.len_bytes() > 0 {
                match read_process(self.pid, &mut self.local, &mut self.remote) {
                    Ok(0) => {
                        let nothing = std::io::Error::from_raw_os_error(libc::EFAULT);
                        return Err(LaneError::of_process(self.pid, nothing));
                    }
                    // Less than asked for: goes on behind it, and gets the reason as an error.
                    Ok(bytes) => done_bytes += bytes as u64,
                    Err(error) => return Err(LaneError::of_process(self.pid, error)),
                }
            }
        }
    }

    fn fill(&mut self, walk: &mut Walk<'_>) {
        self.local.clear();
        self.remote.clear();
        while self.local.count() < LocalRanges::MAX && self.remote.count() < RemoteRanges::MAX {
            let Some(part) = walk.next(WINDOW_BYTES - self.local.len_bytes()) else {
                break;
            };
            self.local
                .push(part.layer, part.block, part.run, part.offset, part.len);
            self.remote.push(part.address, part.len);
        }
    }

    /// Closes the lane unless the process may still be read.
    fn note<T>(&mut self, result: Result<T, LaneError>) -> Result<T, LaneError> {
        if let Err(
            LaneError::PeerGone { .. }
            | LaneError::NotPermitted { .. }
            | LaneError::BadAddress { .. }
            | LaneError::WrongProcess { .. }
            | LaneError::System { .. },
        ) = &result
        {
            self.is_open = false;
        }
        result
    }
}

impl Lane for ShmLane {
    fn name(&self) -> &'static str {
        "shm"
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
        if !self.is_open {
            return Err(LaneError::Closed);
        }
        self.pairing.check(span)?;
        let result = self.copy_all(span, deadline, cancelled);
        self.note(result)?;
        let is_held = self.check_lease(lease);
        if self.note(is_held)? {
            Ok(())
        } else {
            Err(lease.lapsed())
        }
    }

    fn is_held(
        &mut self,
        lease: Lease,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<bool, LaneError> {
        if !self.is_open {
            return Err(LaneError::Closed);
        }
        check_time(deadline, cancelled, 0)?;
        let is_held = self.check_lease(lease);
        self.note(is_held)
    }
}

impl std::fmt::Debug for ShmLane {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ShmLane")
            .field("pid", &self.pid)
            .field("is_open", &self.is_open)
            .finish_non_exhaustive()
    }
}

fn check_time(deadline: Instant, cancelled: &AtomicBool, done_bytes: u64) -> Result<(), LaneError> {
    if cancelled.load(Ordering::Relaxed) {
        return Err(LaneError::Cancelled { done_bytes });
    }
    if Instant::now() >= deadline {
        return Err(LaneError::TimedOut { done_bytes });
    }
    Ok(())
}
