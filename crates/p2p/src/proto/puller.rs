//! Decode's worker side: gets blocks granted, has them copied, and makes sure afterwards that they were right.
//!
//! A pull ends only when none of its copies is running any more: until then a copy could still write into blocks that
//! the engine would give to another request.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::time::Instant;

use super::ConnectionId;
use super::message::{DenyReason, Message, Progress};
use crate::key::{Prompt, TransferKey};

mod copies;
mod endings;
mod units;

use units::Scale;
pub use units::Units;

/// Bounds of a puller.
#[derive(Clone, Copy, Debug)]
pub struct PullerLimits {
    /// Most pulls at a time.
    pub pulls: usize,
    /// Layers of the cache.
    pub layers: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Blocks of the holders' caches never have a number from here on; their own HELLO says how many they have.
    pub block_count_max: u32,
    /// Most parts that a span is copied in at the same time.
    pub parts: u32,
    /// Fewest pieces, each of one block in one layer, of a part.
    pub part_pieces_min: u32,
}

/// Blocks to get.
#[derive(Clone, Debug)]
pub struct PullRequest {
    /// The caller's number, never used again.
    pub job: u64,
    /// Names the transfer on both sides.
    pub key: TransferKey,
    /// What it must be of.
    pub prompt: Prompt,
    /// Index in the prompt of the first block to get.
    pub first_block: u32,
    /// Own cache blocks that receive them.
    pub targets: Vec<u32>,
    /// Ranks of this engine that the holder hears of; it may let go when all of them have what they need.
    pub readers: u32,
    /// When to give up.
    pub deadline: Instant,
}

/// What a reader of the holder's memory found there of a pull's blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostedBlocks {
    /// Place of the lease in the holder's table.
    pub slot: u32,
    /// What the table must hold for bytes to be right.
    pub epoch: u64,
    /// The holder's blocks, from the first one that the pull needs to the last.
    pub blocks: Vec<u32>,
}

/// How a pull ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PullResult {
    /// Every block is there and was right when it was copied.
    Done,
    /// The holder does not have it, or not for this prompt.
    Denied(DenyReason),
    /// The lease ended while blocks were copied.
    Lapsed,
    /// The deadline passed.
    TimedOut,
    /// The caller did not want it any more.
    Cancelled,
    /// The connection broke.
    Unreachable,
    /// Copying failed.
    Failed,
    /// The holder said something that cannot be.
    Misbehaved,
    /// Too many pulls.
    Busy,
}

/// Some layers of some blocks, or of units where the two sides' blocks differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Layers to copy.
    pub layers: Range<u32>,
    /// The holder's blocks.
    pub remote: Vec<u32>,
    /// Own blocks, one for each.
    pub local: Vec<u32>,
}

/// What became of the copying of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// All bytes were copied and the lease was held behind the last of them.
    Held,
    /// All bytes were copied and the lease had ended by then.
    Lapsed,
    /// All bytes were copied; the lane cannot see the lease.
    Unchecked,
    /// Not all bytes were copied before the deadline.
    Late,
    /// Not all bytes were copied.
    Failed,
}

/// What whoever drives a puller has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PullerAction {
    /// Send this.
    Send(ConnectionId, Message),
    /// Copy this, then call [`Puller::copied`]; exactly once, whatever happens.
    Copy {
        /// The transfer.
        transfer: u64,
        /// Over which connection it was granted.
        connection: ConnectionId,
        /// The lease, for lanes that see it.
        slot: u32,
        /// See `slot`.
        epoch: u64,
        /// What to copy.
        span: Span,
        /// When to stop.
        deadline: Instant,
    },
    /// Get these blocks without a grant, if the holder has the prompt posted, then call [`Puller::took`]; exactly once,
    /// whatever happens. One [`StopCopies`](Self::StopCopies) ends it early.
    Take {
        /// The transfer.
        transfer: u64,
        /// To whom.
        connection: ConnectionId,
        /// Names the transfer on both sides.
        key: TransferKey,
        /// What it must be of.
        prompt: Prompt,
        /// Index in the prompt of the first block.
        first_block: u32,
        /// Own blocks.
        targets: Vec<u32>,
    },
    /// Running copies of this transfer are of no use any more.
    StopCopies {
        /// The transfer.
        transfer: u64,
    },
    /// The pull has ended, and no copy of it runs.
    Ended {
        /// The caller's number.
        job: u64,
        /// The transfer, zero if it never became one.
        transfer: u64,
        /// How.
        result: PullResult,
    },
}

/// The state machine. Time and connections come from outside.
#[derive(Debug)]
pub struct Puller {
    limits: PullerLimits,
    pulls: HashMap<u64, Pull>,
    by_job: HashMap<u64, u64>,
    last_transfer: u64,
    actions: VecDeque<PullerAction>,
    /// Pulls of posted blocks that the holder has not been asked for yet.
    unasked: VecDeque<u64>,
    /// Holders whose blocks are not like those of this side.
    units: HashMap<ConnectionId, Units>,
}

#[derive(Debug)]
struct Pull {
    connection: ConnectionId,
    job: u64,
    key: TransferKey,
    prompt: Prompt,
    first_block: u32,
    targets: Vec<u32>,
    readers: u32,
    deadline: Instant,
    is_asked: bool,
    posted: Posted,
    posted_lease: (u32, u64),
    lease: Option<(u32, u64)>,
    /// The holder's blocks, as far as they were named.
    sources: Vec<u32>,
    progress: Progress,
    /// Positions below this one are copied, or being copied, in all layers.
    copied_blocks: usize,
    /// Positions from `copied_blocks` to this one are in the layers below `wave_layers`.
    wave_blocks: usize,
    wave_layers: u32,
    running: u32,
    unchecked: bool,
    is_checking: bool,
    end: Option<PullResult>,
}

/// No lease has epoch zero.
const NO_LEASE: (u32, u64) = (0, 0);

/// Whether blocks are copied that the holder has posted, and not named to this pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Posted {
    No,
    Copying,
    /// A copy of them failed; others run.
    Failed,
}

impl Pull {
    fn want(&self, transfer: u64, block_tokens: u32) -> Message {
        Message::Want {
            transfer,
            key: self.key.clone(),
            prompt: self.prompt,
            first_block: self.first_block,
            block_count: self.targets.len() as u32,
            block_tokens,
            readers: self.readers,
        }
    }

    /// Of a lease that was found posted and not granted to this pull.
    fn taken(&self) -> Message {
        let (slot, epoch) = self.posted_lease;
        Message::Taken {
            key: self.key.clone(),
            slot,
            epoch,
            readers: self.readers,
        }
    }
}

impl Puller {
    /// Without pulls.
    pub fn new(limits: PullerLimits) -> Self {
        Self {
            limits,
            pulls: HashMap::new(),
            by_job: HashMap::new(),
            last_transfer: 0,
            actions: VecDeque::new(),
            unasked: VecDeque::new(),
            units: HashMap::new(),
        }
    }

    /// The blocks of the holder behind a connection are not like those of this side. Said before its first message.
    pub fn meet(&mut self, connection: ConnectionId, units: Units) {
        self.units.insert(connection, units);
    }

    /// Begins a pull over a connection that is ready, or will be: messages wait there.
    ///
    /// With `posted`, copying begins at once. The holder is asked all the same, unless the copies are over by then: a
    /// lease that is claimed is kept for longer, and if it ends under the copies, another may be granted.
    pub fn pull(&mut self, connection: ConnectionId, request: PullRequest, posted: Option<PostedBlocks>) {
        let Some(transfer) = self.open(connection, request) else {
            return;
        };
        if posted.is_some_and(|posted| self.copy_posted(transfer, &posted)) {
            // Behind the copies: small ones may be over by then.
            self.unasked.push_back(transfer);
        } else {
            self.ask(transfer);
        }
    }

    /// Begins a pull over a connection that is ready, by taking the blocks without a grant. If that fails, the holder is asked
    /// as in [`pull`](Self::pull). For few blocks: until it has ended, their lease is not claimed.
    pub fn take(&mut self, connection: ConnectionId, request: PullRequest) {
        let Some(transfer) = self.open(connection, request) else {
            return;
        };
        let Some(pull) = self.pulls.get_mut(&transfer) else {
            return;
        };
        pull.posted = Posted::Copying;
        pull.running = 1;
        self.actions.push_back(PullerAction::Take {
            transfer,
            connection,
            key: pull.key.clone(),
            prompt: pull.prompt,
            first_block: pull.first_block,
            targets: pull.targets.clone(),
        });
    }

    /// Takes the result of a [`PullerAction::Take`]: the lease that was held behind the last byte, or none.
    pub fn took(&mut self, transfer: u64, lease: Option<(u32, u64)>) {
        if let (Some(lease), Some(pull)) = (lease, self.pulls.get_mut(&transfer)) {
            pull.posted_lease = lease;
        }
        let copied = if lease.is_some() {
            Copied::Held
        } else {
            Copied::Failed
        };
        self.copied(transfer, copied);
    }

    /// A pull without messages and copies. `None`: there are too many, and it has ended.
    fn open(&mut self, connection: ConnectionId, request: PullRequest) -> Option<u64> {
        if self.pulls.len() >= self.limits.pulls {
            self.actions.push_back(PullerAction::Ended {
                job: request.job,
                transfer: 0,
                result: PullResult::Busy,
            });
            return None;
        }
        self.last_transfer += 1;
        let transfer = self.last_transfer;
        self.by_job.insert(request.job, transfer);
        let pull = Pull {
            connection,
            job: request.job,
            key: request.key,
            prompt: request.prompt,
            first_block: request.first_block,
            targets: request.targets,
            readers: request.readers,
            deadline: request.deadline,
            is_asked: false,
            posted: Posted::No,
            posted_lease: NO_LEASE,
            lease: None,
            sources: Vec::new(),
            progress: Progress::default(),
            copied_blocks: 0,
            wave_blocks: 0,
            wave_layers: 0,
            running: 0,
            unchecked: false,
            is_checking: false,
            end: None,
        };
        self.pulls.insert(transfer, pull);
        Some(transfer)
    }

    /// Tells the holder that this rank has the whole prompt already.
    pub fn release(&mut self, connection: ConnectionId, key: TransferKey, prompt: Prompt, readers: u32) {
        self.last_transfer += 1;
        let want = Message::Want {
            transfer: self.last_transfer,
            key,
            prompt,
            first_block: 0,
            block_count: 0,
            block_tokens: self.limits.block_tokens,
            readers,
        };
        self.actions.push_back(PullerAction::Send(connection, want));
    }

    /// Asks for the end of a pull. An unknown or ended one is ignored.
    pub fn cancel(&mut self, job: u64) {
        if let Some(&transfer) = self.by_job.get(&job) {
            self.fail(transfer, PullResult::Cancelled);
        }
    }

    /// Takes a message. An error: the holder breaks the protocol, and its connection must end.
    pub fn receive(&mut self, connection: ConnectionId, message: Message) -> Result<(), &'static str> {
        let transfer = match &message {
            Message::Grant { transfer, .. }
            | Message::Deny { transfer, .. }
            | Message::Ready { transfer, .. }
            | Message::Checked { transfer, .. }
            | Message::Revoked { transfer } => *transfer,
            _ => return Err("a message that only decode sends"),
        };
        let Some(pull) = self.pulls.get_mut(&transfer) else {
            return Ok(()); // it has ended here; what is on the way arrives late
        };
        if pull.connection != connection {
            return Err("a message about a transfer of another connection");
        }
        if pull.end.is_some() {
            return Ok(());
        }
        match message {
            Message::Grant { slot, epoch, .. } => {
                if pull.lease.replace((slot, epoch)).is_some() {
                    return Err("a second grant");
                }
                Ok(())
            }
            Message::Deny { reason, .. } => {
                self.fail(transfer, PullResult::Denied(reason));
                Ok(())
            }
            Message::Revoked { .. } => {
                self.fail(transfer, PullResult::Lapsed);
                Ok(())
            }
            Message::Ready { blocks, progress, .. } => self.more(connection, transfer, &blocks, progress),
            Message::Checked { held, .. } => {
                if !pull.is_checking {
                    return Err("an answer to a check that nobody asked for");
                }
                if held {
                    self.finish(transfer);
                } else {
                    self.fail(transfer, PullResult::Lapsed);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Takes the result of a [`PullerAction::Copy`].
    pub fn copied(&mut self, transfer: u64, copied: Copied) {
        let Some(pull) = self.pulls.get_mut(&transfer) else {
            debug_assert!(false, "a pull outlives its copies");
            return;
        };
        pull.running -= 1;
        if pull.end.is_some() {
            self.end_if_quiet(transfer);
            return;
        }
        match copied {
            _ if pull.posted != Posted::No => return self.posted_copied(transfer, copied),
            Copied::Held => {}
            Copied::Unchecked => pull.unchecked = true,
            Copied::Lapsed => return self.fail(transfer, PullResult::Lapsed),
            Copied::Late => return self.fail(transfer, PullResult::TimedOut),
            Copied::Failed => return self.fail(transfer, PullResult::Failed),
        }
        self.check_if_complete(transfer);
    }

    /// A connection is no more.
    pub fn closed(&mut self, connection: ConnectionId) {
        let broken: Vec<u64> = self.transfers(|pull| pull.connection == connection);
        for transfer in broken {
            self.fail(transfer, PullResult::Unreachable);
        }
        self.units.remove(&connection);
    }

    /// The peer behind a connection cannot exchange bytes with this cache.
    pub fn refuse(&mut self, connection: ConnectionId) {
        let broken: Vec<u64> = self.transfers(|pull| pull.connection == connection);
        for transfer in broken {
            // It may have been asked for already, and the holder sees nothing wrong with it.
            self.give_back(transfer);
            self.fail(transfer, PullResult::Denied(DenyReason::Namespace));
        }
    }

    /// When [`tick`](Self::tick) must be called, at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        let open = self.pulls.values().filter(|pull| pull.end.is_none());
        open.map(|pull| pull.deadline).min()
    }

    /// Gives up what takes too long.
    pub fn tick(&mut self, now: Instant) {
        let late: Vec<u64> = self.transfers(|pull| pull.end.is_none() && pull.deadline <= now);
        for transfer in late {
            self.fail(transfer, PullResult::TimedOut);
        }
    }

    /// The next thing to do.
    pub fn next_action(&mut self) -> Option<PullerAction> {
        while self.actions.is_empty() {
            let transfer = self.unasked.pop_front()?;
            self.ask(transfer);
        }
        self.actions.pop_front()
    }

    /// Number of pulls that have not ended.
    pub fn pull_count(&self) -> usize {
        self.pulls.len()
    }

    /// Asks for the blocks of a pull, unless it has ended or was asked for.
    fn ask(&mut self, transfer: u64) {
        if let Some(pull) = self.pulls.get_mut(&transfer)
            && pull.end.is_none()
            && !std::mem::replace(&mut pull.is_asked, true)
        {
            let want = pull.want(transfer, self.limits.block_tokens);
            self.actions.push_back(PullerAction::Send(pull.connection, want));
        }
    }

    fn transfers(&self, choose: impl Fn(&Pull) -> bool) -> Vec<u64> {
        let chosen = self.pulls.iter().filter(|(_, pull)| choose(pull));
        chosen.map(|(&transfer, _)| transfer).collect()
    }

    /// Takes up a notice, and has copied what it allows.
    fn more(
        &mut self,
        connection: ConnectionId,
        transfer: u64,
        blocks: &[u32],
        progress: Progress,
    ) -> Result<(), &'static str> {
        let limits = self.limits;
        let Some(pull) = self.pulls.get_mut(&transfer) else {
            return Ok(());
        };
        if pull.lease.is_none() {
            return Err("a notice before the grant");
        }
        let scale = Scale::of(&limits, self.units.get(&connection), pull);
        let end_block = scale.holder_end_block();
        let named = pull.sources.len() + blocks.len();
        let fits = named <= scale.holder_blocks
            && blocks.iter().all(|&block| block < limits.block_count_max)
            && progress.done_blocks <= progress.wave_blocks
            && u64::from(progress.wave_blocks) <= end_block
            && progress.wave_layers <= limits.layers;
        if !fits {
            self.fail(transfer, PullResult::Misbehaved);
            return Err("a notice about blocks or layers that do not exist");
        }
        pull.sources.extend_from_slice(blocks);
        pull.progress = progress;
        if pull.posted == Posted::No {
            self.copy_what_is_ready(transfer);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
