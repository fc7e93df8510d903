//! Prefill's side: leases of computed blocks, answers to questions, grants to readers.
//!
//! A *hold* is one request of this engine, whose blocks stay as they are until the hold ends. It ends once: released by
//! its readers, expired, dropped for room, or revoked because the engine needs the blocks. Whatever the reason, the
//! first thing that happens is that its slot in the table of epochs gets another number: from then on no reader takes
//! bytes for right that it copied out of these blocks.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;

use super::ConnectionId;
use super::message::{DenyReason, Message, Progress, READERS_MAX, Verdict};
use super::waiting::Waiting;
use crate::key::{Prompt, TransferKey};

mod leases;
mod questions;
mod readers;

/// Most blocks that one message names: more would not fit into a frame.
const BLOCKS_PER_MESSAGE: usize = 1 << 16;

/// Bounds of a holder.
#[derive(Clone, Copy, Debug)]
pub struct HolderLimits {
    /// Tokens per block.
    pub block_tokens: u32,
    /// Most holds at a time: slots of the table.
    pub slots: u32,
    /// How long blocks are kept behind the end of their request or of the last want, whichever comes last.
    pub lease: Duration,
    /// How long a reader may take from its want on, if that is longer: the lease does not end under it.
    pub reading: Duration,
    /// Fewest ranks of decode that must release a hold; a reader may say that there are more.
    pub readers: u32,
    /// Most blocks that are kept for requests that have ended and that nobody has claimed.
    pub unclaimed_blocks: usize,
    /// Most questions that wait for their prompt, as many wants, and the longest that a question waits.
    pub questions: usize,
    /// See `questions`.
    pub question_wait: Duration,
    /// The longest that a want waits: ranks of an engine begin a request at nearly the same time, and only one of them was
    /// asked whether it did.
    pub want_wait: Duration,
    /// Most transfers that a connection has open.
    pub transfers_per_connection: usize,
    /// Most blocks of a prompt that is posted.
    pub posted_blocks: u32,
}

/// A request whose blocks can be read.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The engine's own name of the request. Offered anew, it ends what it named before.
    pub hold: Arc<str>,
    /// Its name on both servers.
    pub key: TransferKey,
    /// What its KV is computed from.
    pub prompt: Prompt,
    /// Blocks of the cache, in the order of the prompt, as far as they are allocated.
    pub blocks: Vec<u32>,
}

/// Why a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EndReason {
    /// All ranks of decode have what they wanted.
    Released,
    /// Nobody came, or did not say that it was done.
    Expired,
    /// There was no room for unclaimed blocks.
    Dropped,
    /// The engine needs the blocks: preempted or aborted.
    Revoked,
    /// Another request has the same key.
    Replaced,
    /// This side ends, or cannot hear its peers any more.
    Closed,
}

/// What whoever drives a holder has to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HolderAction {
    /// Put the number into the table, before anything that follows.
    SetEpoch {
        /// Place in the table.
        slot: u32,
        /// The number.
        epoch: u64,
    },
    /// Let peers find a prompt that is computed whole without asking. Nothing takes it back: the slot's epoch says when it
    /// is over.
    Post {
        /// Its name on both servers.
        key: TransferKey,
        /// What its KV is computed from.
        prompt: Prompt,
        /// Place of the lease in the table.
        slot: u32,
        /// What the table holds as long as the lease does.
        epoch: u64,
        /// All blocks of the prompt.
        blocks: Vec<u32>,
    },
    /// Send this.
    Send(ConnectionId, Message),
    /// Tell the engine that the blocks of a finished request are its own again.
    Ended {
        /// The request.
        hold: Arc<str>,
        /// Why.
        reason: EndReason,
    },
}

/// The state machine. Time and connections come from outside.
#[derive(Debug)]
pub struct Holder {
    limits: HolderLimits,
    holds: HashMap<Arc<str>, Hold>,
    keys: HashMap<TransferKey, Arc<str>>,
    /// Keys whose hold ended and will not come back: a question for them need not wait.
    gone: LruCache<TransferKey, Instant>,
    /// Ranks that said that they need nothing, before the request was here, and when the last of them did.
    early_releases: LruCache<TransferKey, EarlyRelease>,
    /// Who read a hold when it was revoked: it may have been done just before, which is heard later.
    revoked_readers: LruCache<(ConnectionId, u64), Revoked>,
    /// By slot and epoch the holds that were posted and revoked: somebody may have taken them just before.
    revoked_posts: LruCache<(u32, u64), Revoked>,
    free_slots: Vec<u32>,
    epochs: Vec<u64>,
    readers: HashMap<(ConnectionId, u64), Reader>,
    transfers: HashMap<ConnectionId, HashSet<u64>>,
    expiries: BTreeSet<(Instant, Arc<str>)>,
    unclaimed_blocks: usize,
    waiting: Waiting<Prompt>,
    waiting_wants: Waiting<Wanted>,
    is_closed: bool,
    actions: VecDeque<HolderAction>,
}

#[derive(Debug)]
struct Hold {
    key: TransferKey,
    prompt: Prompt,
    block_count: u32,
    blocks: Vec<u32>,
    progress: Progress,
    /// None: ended, but the engine still has to finish or revoke it.
    lease: Option<Lease>,
    is_posted: bool,
    is_finished: bool,
    end_reason: EndReason,
}

/// What a rank of decode wants of a prompt.
#[derive(Clone, Debug)]
struct Wanted {
    prompt: Prompt,
    /// In blocks of this side.
    blocks: Range<u32>,
    /// Ranks of its engine that must release the hold.
    readers: u32,
}

/// What ranks said before the request was here.
#[derive(Clone, Copy, Debug)]
struct EarlyRelease {
    prompt: Prompt,
    /// How many have said that they need nothing.
    ranks: u32,
    /// How many must.
    readers: u32,
    /// When the last of them did.
    told: Instant,
}

/// A hold that was revoked.
#[derive(Clone, Debug)]
struct Revoked {
    key: TransferKey,
    prompt: Prompt,
    /// Ranks that had to release it.
    readers: u32,
}

#[derive(Debug)]
struct Lease {
    slot: u32,
    readers: Vec<(ConnectionId, u64)>,
    /// Ranks that must release it.
    needed: u32,
    released: u32,
    /// Of those, the ranks that said so before the request was here.
    released_early: u32,
    is_claimed: bool,
    last_want: Option<Instant>,
    expires: Option<Instant>,
}

#[derive(Debug)]
struct Reader {
    hold: Arc<str>,
    first_block: u32,
    end_block: u32,
    /// Blocks in front of this one were named to the reader.
    named_until: u32,
    told: Progress,
}

impl Holder {
    /// Without holds. The table of epochs starts with ones.
    pub fn new(limits: HolderLimits) -> Self {
        let remembered = NonZeroUsize::new(limits.slots as usize).unwrap_or(NonZeroUsize::MIN);
        Self {
            limits,
            holds: HashMap::new(),
            keys: HashMap::new(),
            gone: LruCache::new(remembered),
            early_releases: LruCache::new(remembered),
            revoked_readers: LruCache::new(remembered),
            revoked_posts: LruCache::new(remembered),
            free_slots: (0..limits.slots).rev().collect(),
            epochs: vec![1; limits.slots as usize],
            readers: HashMap::new(),
            transfers: HashMap::new(),
            expiries: BTreeSet::new(),
            unclaimed_blocks: 0,
            waiting: Waiting::default(),
            waiting_wants: Waiting::default(),
            is_closed: false,
            actions: VecDeque::new(),
        }
    }

    // ---- the engine's side

    /// Begins a hold. False: all slots are taken or the holder is closed, and nobody can read this request.
    pub fn offer(&mut self, now: Instant, offer: Offer) -> bool {
        if self.is_closed {
            return false;
        }
        if self.holds.get(&offer.hold).is_some_and(|known| known.is_finished) {
            self.end(now, &offer.hold, EndReason::Replaced);
        } else {
            self.revoke(now, &offer.hold);
        }
        if let Some(older) = self.keys.get(&offer.key).cloned() {
            self.end(now, &older, EndReason::Replaced);
        }
        let Some(slot) = self.free_slots.pop() else {
            self.give_up(now, &offer.key);
            return false;
        };
        self.gone.pop(&offer.key);
        let (released, readers) = match self.early_releases.pop(&offer.key) {
            Some(early)
                if early.prompt.digest == offer.prompt.digest && now < early.told + self.limits.lease =>
            {
                (early.ranks, early.readers)
            }
            _ => (0, 0),
        };
        let hold = Hold {
            key: offer.key.clone(),
            prompt: offer.prompt,
            block_count: offer.prompt.block_count(self.limits.block_tokens),
            blocks: offer.blocks,
            progress: Progress::default(),
            lease: Some(Lease {
                slot,
                readers: Vec::new(),
                needed: readers.max(self.limits.readers),
                released,
                released_early: released,
                is_claimed: released > 0,
                last_want: None,
                expires: None,
            }),
            is_posted: false,
            is_finished: false,
            end_reason: EndReason::Revoked,
        };
        self.keys.insert(offer.key.clone(), Arc::clone(&offer.hold));
        self.holds.insert(offer.hold, hold);
        let prompt = offer.prompt;
        self.grant_waiting(now, &offer.key);
        self.answer_waiting(&offer.key, |asked| {
            if asked == prompt {
                Verdict::Started
            } else {
                Verdict::Mismatch
            }
        });
        true
    }

    /// Appends blocks that were allocated for later chunks. An unknown hold is ignored.
    pub fn extend(&mut self, hold: &str, blocks: &[u32]) {
        if let Some(known) = self.holds.get_mut(hold)
            && !known.is_finished
        {
            known.blocks.extend_from_slice(blocks);
        }
    }

    /// Says how far the computation is; it never goes back. An unknown hold is ignored.
    pub fn progress(&mut self, hold: &str, progress: Progress) {
        let Some(known) = self.holds.get_mut(hold) else {
            return;
        };
        let limit = known.block_count.min(known.blocks.len() as u32);
        let done_blocks = progress.done_blocks.min(limit).max(known.progress.done_blocks);
        known.progress = Progress {
            done_blocks,
            wave_blocks: progress.wave_blocks.min(limit).max(done_blocks),
            wave_layers: progress.wave_layers,
        };
        let Some(lease) = &known.lease else { return };
        let is_whole = done_blocks >= known.block_count && known.block_count <= self.limits.posted_blocks;
        if is_whole && !std::mem::replace(&mut known.is_posted, true) {
            self.actions.push_back(HolderAction::Post {
                key: known.key.clone(),
                prompt: known.prompt,
                slot: lease.slot,
                epoch: self.epochs[lease.slot as usize],
                blocks: known.blocks[..known.block_count as usize].to_vec(),
            });
        }
        for reader in lease.readers.clone() {
            self.tell(reader);
        }
    }

    /// The request has ended, and the engine keeps its blocks until [`HolderAction::Ended`] names it.
    pub fn finish(&mut self, now: Instant, hold: &Arc<str>) {
        let Some(known) = self.holds.get_mut(hold) else {
            let reason = EndReason::Dropped;
            self.actions.push_back(HolderAction::Ended {
                hold: Arc::clone(hold),
                reason,
            });
            return;
        };
        known.is_finished = true;
        let Some(lease) = &mut known.lease else {
            let reason = known.end_reason;
            self.holds.remove(hold);
            self.actions.push_back(HolderAction::Ended {
                hold: Arc::clone(hold),
                reason,
            });
            return;
        };
        if lease.released >= lease.needed {
            self.end(now, hold, EndReason::Released);
            return;
        }
        if !lease.is_claimed {
            self.unclaimed_blocks += known.blocks.len();
        }
        self.renew(now, hold);
        self.make_room(now);
    }

    /// The engine takes the blocks back; whatever reads them finds out. An offer may follow: questions wait for it.
    /// False: the hold is unknown.
    pub fn revoke(&mut self, now: Instant, hold: &str) -> bool {
        let Some((hold, _)) = self.holds.get_key_value(hold) else {
            return false;
        };
        let hold = Arc::clone(hold);
        if let Some(known) = self.holds.get(&hold)
            && let Some(lease) = &known.lease
        {
            let (key, prompt, readers) = (known.key.clone(), known.prompt, lease.needed);
            if lease.released > 0 {
                // Offered again, as behind a preemption, it is still nothing to the ranks that have it.
                let early = EarlyRelease {
                    prompt,
                    ranks: lease.released,
                    readers,
                    told: now,
                };
                self.early_releases.put(key.clone(), early);
            }
            let revoked = Revoked { key, prompt, readers };
            for &reader in &lease.readers {
                self.revoked_readers.put(reader, revoked.clone());
            }
            if known.is_posted {
                let epoch = self.epochs[lease.slot as usize];
                self.revoked_posts.put((lease.slot, epoch), revoked);
            }
        }
        self.close(&hold, EndReason::Revoked);
        self.holds.remove(&hold);
        true
    }

    /// Nothing will be offered under this key: whoever waits for it need not wait any longer.
    pub fn give_up(&mut self, now: Instant, key: &TransferKey) {
        if !self.keys.contains_key(key) {
            // What was said of this one is not about the next one with its key.
            self.early_releases.pop(key);
            forget_of(key, &mut self.revoked_readers);
            forget_of(key, &mut self.revoked_posts);
            self.gone.put(key.clone(), now);
            self.answer_waiting(key, |_| Verdict::None);
            self.grant_waiting(now, key);
        }
    }

    /// Ends all holds, and takes no more: nobody would notice any more that their time is over.
    pub fn close_all(&mut self, now: Instant) {
        self.is_closed = true;
        let holds: Vec<Arc<str>> = self.holds.keys().cloned().collect();
        for hold in holds {
            self.end(now, &hold, EndReason::Closed);
        }
        for (connection, transfer) in self.waiting_wants.take_all() {
            let reason = DenyReason::Gone;
            self.send(connection, Message::Deny { transfer, reason });
        }
    }

    // ---- the peers' side

    /// Takes a message of a peer of our namespace, or of another (`is_compatible`). An error: the peer breaks
    /// the protocol, and its connection must end.
    pub fn receive(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        is_compatible: bool,
        message: Message,
    ) -> Result<(), &'static str> {
        match message {
            Message::Ask {
                question,
                key,
                prompt,
                patience_ms,
            } => self.asked(now, connection, question, key, prompt, patience_ms),
            Message::Forget { question } => {
                self.waiting.remove((connection, question));
                Ok(())
            }
            Message::Want {
                transfer,
                key,
                prompt,
                first_block,
                block_count,
                block_tokens,
                readers,
            } => {
                if block_tokens == 0 || !(1..=READERS_MAX).contains(&readers) {
                    return Err("a want of blocks without tokens, or for no or too many ranks");
                }
                let wanted = Wanted {
                    prompt,
                    blocks: self.own_blocks(&prompt, block_tokens, first_block, block_count),
                    readers,
                };
                self.wanted(now, connection, is_compatible, transfer, key, wanted)
            }
            Message::Check { transfer, epoch } => {
                let slot = self
                    .readers
                    .get(&(connection, transfer))
                    .and_then(|reader| Some(self.holds.get(&reader.hold)?.lease.as_ref()?.slot));
                let held = slot.is_some_and(|slot| self.epochs[slot as usize] == epoch);
                self.send(connection, Message::Checked { transfer, held });
                Ok(())
            }
            Message::Done { transfer } | Message::Cancel { transfer } => {
                if let Some((key, wanted)) = self.waiting_wants.remove((connection, transfer)) {
                    self.release_early(now, key, &wanted);
                }
                self.reader_left(now, (connection, transfer));
                if let Some(revoked) = self.revoked_readers.pop(&(connection, transfer)) {
                    self.release_late(now, revoked);
                }
                Ok(())
            }
            Message::Taken {
                key,
                slot,
                epoch,
                readers,
            } => {
                if !(1..=READERS_MAX).contains(&readers) {
                    return Err("blocks taken for no or too many ranks");
                }
                self.taken(now, &key, slot, epoch, readers);
                Ok(())
            }
            _ => Err("a message that only prefill sends"),
        }
    }

    /// A connection is no more: whoever read over it does not come back.
    pub fn closed(&mut self, now: Instant, connection: ConnectionId) {
        for transfer in self.transfers.remove(&connection).unwrap_or_default() {
            self.reader_left(now, (connection, transfer));
        }
        self.waiting.remove_of(connection);
        self.waiting_wants.remove_of(connection);
    }

    /// When [`tick`](Self::tick) must be called, at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        let lease = self.expiries.first().map(|(time, _)| *time);
        let waiting = [self.waiting.next_deadline(), self.waiting_wants.next_deadline()];
        waiting.into_iter().flatten().chain(lease).min()
    }

    /// Ends leases and questions whose time is over.
    pub fn tick(&mut self, now: Instant) {
        while let Some((time, hold)) = self.expiries.first().cloned()
            && time <= now
        {
            if !self.renew_for_readers(now, &hold) {
                self.end(now, &hold, EndReason::Expired);
            }
        }
        for ((connection, question), ..) in self.waiting.take_late(now) {
            let verdict = Verdict::None;
            self.send(connection, Message::Answer { question, verdict });
        }
        for ((connection, transfer), key, wanted) in self.waiting_wants.take_late(now) {
            let reason = DenyReason::Gone;
            self.send(connection, Message::Deny { transfer, reason });
            // It computes the prompt itself now.
            self.release_early(now, key, &wanted);
        }
    }

    /// The next thing to do.
    pub fn next_action(&mut self) -> Option<HolderAction> {
        self.actions.pop_front()
    }

    /// Whether `slot` holds `epoch`: the same answer as the table gives.
    pub fn is_held(&self, slot: u32, epoch: u64) -> bool {
        self.epochs.get(slot as usize) == Some(&epoch)
    }

    /// (holds, blocks of finished and unclaimed ones, waiting questions and wants, open transfers): all zero when nothing is
    /// held.
    pub fn load(&self) -> (usize, usize, usize, usize) {
        (
            self.holds.len(),
            self.unclaimed_blocks,
            self.waiting.len() + self.waiting_wants.len(),
            self.readers.len(),
        )
    }

    fn send(&mut self, connection: ConnectionId, message: Message) {
        self.actions.push_back(HolderAction::Send(connection, message));
    }
}

fn forget_of<K: Copy + Eq + std::hash::Hash>(key: &TransferKey, revoked: &mut LruCache<K, Revoked>) {
    let of_key: Vec<K> = revoked
        .iter()
        .filter(|(_, of)| of.key == *key)
        .map(|(&id, _)| id)
        .collect();
    for id in of_key {
        revoked.pop(&id);
    }
}

#[cfg(test)]
mod tests;
