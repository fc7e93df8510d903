//! Prefill's side: leases of computed blocks, answers to questions, grants to readers.
//!
//! A *hold* is one request of this engine, whose blocks stay as they are until the hold ends. It ends once: released by
//! its readers, expired, dropped for room, or revoked because the engine needs the blocks. Whatever the reason, the
//! first thing that happens is that its slot in the table of epochs gets another number: from then on no reader takes
//! bytes for right that it copied out of these blocks.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;

use super::ConnectionId;
use super::message::{DenyReason, Message, Progress, Verdict};
use super::waiting::WaitingQuestions;
use crate::key::{Prompt, TransferKey};

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
    /// Ranks of decode that must release a hold.
    pub readers: u32,
    /// Most blocks that are kept for requests that have ended and that nobody has claimed.
    pub unclaimed_blocks: usize,
    /// Most questions that wait for their prompt, and the longest that one waits.
    pub questions: usize,
    /// See `questions`.
    pub question_wait: Duration,
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
    early_releases: LruCache<TransferKey, (Prompt, u32, Instant)>,
    free_slots: Vec<u32>,
    epochs: Vec<u64>,
    readers: HashMap<(ConnectionId, u64), Reader>,
    transfers: HashMap<ConnectionId, HashSet<u64>>,
    expiries: BTreeSet<(Instant, Arc<str>)>,
    unclaimed_blocks: usize,
    waiting: WaitingQuestions,
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

#[derive(Debug)]
struct Lease {
    slot: u32,
    readers: Vec<(ConnectionId, u64)>,
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
            free_slots: (0..limits.slots).rev().collect(),
            epochs: vec![1; limits.slots as usize],
            readers: HashMap::new(),
            transfers: HashMap::new(),
            expiries: BTreeSet::new(),
            unclaimed_blocks: 0,
            waiting: WaitingQuestions::default(),
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
            self.revoke(&offer.hold);
        }
        if let Some(older) = self.keys.get(&offer.key).cloned() {
            self.end(now, &older, EndReason::Replaced);
        }
        let Some(slot) = self.free_slots.pop() else {
            self.give_up(now, &offer.key);
            return false;
        };
        self.gone.pop(&offer.key);
        let released = match self.early_releases.pop(&offer.key) {
            Some((prompt, ranks, told))
                if prompt.digest == offer.prompt.digest && now < told + self.limits.lease =>
            {
                ranks
            }
            _ => 0,
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
        if lease.released >= self.limits.readers {
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
    pub fn revoke(&mut self, hold: &str) -> bool {
        let Some((hold, _)) = self.holds.get_key_value(hold) else {
            return false;
        };
        let hold = Arc::clone(hold);
        self.close(&hold, EndReason::Revoked);
        self.holds.remove(&hold);
        true
    }

    /// Nothing will be offered under this key: whoever waits for it need not wait any longer.
    pub fn give_up(&mut self, now: Instant, key: &TransferKey) {
        if !self.keys.contains_key(key) {
            // What was said of this one is not about the next one with its key.
            self.early_releases.pop(key);
            self.gone.put(key.clone(), now);
            self.answer_waiting(key, |_| Verdict::None);
        }
    }

    /// Ends all holds, and takes no more: nobody would notice any more that their time is over.
    pub fn close_all(&mut self, now: Instant) {
        self.is_closed = true;
        let holds: Vec<Arc<str>> = self.holds.keys().cloned().collect();
        for hold in holds {
            self.end(now, &hold, EndReason::Closed);
        }
    }

    // ---- the peers' side

    /// Takes a message of a peer whose blocks are the same as ours, or not (`is_compatible`). An error: the peer breaks
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
            } => {
                let range = first_block..first_block.saturating_add(block_count);
                self.wanted(now, connection, is_compatible, transfer, key, prompt, range)
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
                self.reader_left(now, (connection, transfer));
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
    }

    /// When [`tick`](Self::tick) must be called, at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        let lease = self.expiries.first().map(|(time, _)| *time);
        let question = self.waiting.next_deadline();
        lease.into_iter().chain(question).min()
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
        for (connection, question) in self.waiting.take_late(now) {
            let verdict = Verdict::None;
            self.send(connection, Message::Answer { question, verdict });
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

    /// (holds, blocks of finished and unclaimed ones, waiting questions, open transfers): all zero when nothing is held.
    pub fn load(&self) -> (usize, usize, usize, usize) {
        (
            self.holds.len(),
            self.unclaimed_blocks,
            self.waiting.len(),
            self.readers.len(),
        )
    }

    // ---- questions

    fn asked(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        question: u64,
        key: TransferKey,
        prompt: Prompt,
        patience_ms: u32,
    ) -> Result<(), &'static str> {
        if self.waiting.contains((connection, question)) {
            return Err("a question with the number of an open one");
        }
        let verdict = match self.hold_of(&key) {
            Some(hold) if hold.prompt != prompt => Some(Verdict::Mismatch),
            Some(hold) if hold.progress.done_blocks >= hold.block_count => Some(Verdict::Ready),
            Some(_) => Some(Verdict::Started),
            None if self.is_gone(now, &key) => Some(Verdict::None),
            None if self.waiting.len() >= self.limits.questions => Some(Verdict::Busy),
            None => None,
        };
        if let Some(verdict) = verdict {
            self.send(connection, Message::Answer { question, verdict });
            return Ok(());
        }
        let patience = Duration::from_millis(u64::from(patience_ms)).min(self.limits.question_wait);
        self.waiting
            .add((connection, question), key, prompt, now + patience);
        Ok(())
    }

    fn answer_waiting(&mut self, key: &TransferKey, verdict: impl Fn(Prompt) -> Verdict) {
        for ((connection, question), asked) in self.waiting.take(key) {
            let verdict = verdict(asked);
            self.send(connection, Message::Answer { question, verdict });
        }
    }

    fn is_gone(&self, now: Instant, key: &TransferKey) -> bool {
        // A client that tries again with the same key finds the new request, once prefill has it.
        self.gone
            .peek(key)
            .is_some_and(|ended| now < *ended + self.limits.lease)
    }

    // ---- readers

    #[allow(clippy::too_many_arguments, reason = "the fields of one message")]
    fn wanted(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        is_compatible: bool,
        transfer: u64,
        key: TransferKey,
        prompt: Prompt,
        range: std::ops::Range<u32>,
    ) -> Result<(), &'static str> {
        let id = (connection, transfer);
        if self.readers.contains_key(&id) {
            return Err("a transfer with the number of an open one");
        }
        let open = self.transfers.get(&connection).map_or(0, HashSet::len);
        let reason = match self.hold_of(&key) {
            _ if !is_compatible => Some(DenyReason::Namespace),
            _ if open >= self.limits.transfers_per_connection => Some(DenyReason::Busy),
            None => Some(DenyReason::Gone),
            // The digest is of the tokens too; their number is only there to be told.
            Some(hold) if hold.prompt.digest != prompt.digest => Some(DenyReason::Mismatch),
            Some(hold) if range.end > hold.block_count => Some(DenyReason::Range),
            Some(_) => None,
        };
        if reason == Some(DenyReason::Gone) && range.is_empty() {
            // Decode may be faster than prefill, where both were called at once.
            let (_, ranks, told) = self.early_releases.get_or_insert_mut(key, || (prompt, 0, now));
            (*ranks, *told) = (*ranks + 1, now);
            return Ok(());
        }
        if let Some(reason) = reason {
            self.send(connection, Message::Deny { transfer, reason });
            return Ok(());
        }
        let Some(hold_id) = self.keys.get(&key).cloned() else {
            return Ok(());
        };
        let Some(hold) = self.holds.get_mut(&hold_id) else {
            return Ok(());
        };
        let Some(lease) = &mut hold.lease else {
            return Ok(());
        };
        if !lease.is_claimed {
            lease.is_claimed = true;
            if hold.is_finished {
                self.unclaimed_blocks -= hold.blocks.len();
            }
        }
        if !range.is_empty() && lease.readers.is_empty() {
            // A client's second try: the first one's early release does not end the lease under this one.
            lease.released = lease.released.saturating_sub(lease.released_early);
            lease.released_early = 0;
        }
        lease.readers.push(id);
        lease.last_want = Some(now);
        let slot = lease.slot;
        self.transfers.entry(connection).or_default().insert(transfer);
        let reader = Reader {
            hold: Arc::clone(&hold_id),
            first_block: range.start,
            end_block: range.end,
            named_until: range.start,
            told: Progress::default(),
        };
        self.readers.insert(id, reader);
        if range.is_empty() {
            self.reader_left(now, id);
            return Ok(());
        }
        let epoch = self.epochs[slot as usize];
        self.send(
            connection,
            Message::Grant {
                transfer,
                slot,
                epoch,
            },
        );
        self.tell(id);
        self.renew(now, &hold_id);
        Ok(())
    }

    /// Names blocks and progress that a reader does not know yet.
    fn tell(&mut self, id: (ConnectionId, u64)) {
        let Some(reader) = self.readers.get_mut(&id) else {
            return;
        };
        let Some(hold) = self.holds.get(&reader.hold) else {
            return;
        };
        // A reader may want blocks that are not allocated yet: then there is nothing to name.
        let allocated = u32::try_from(hold.blocks.len()).unwrap_or(u32::MAX);
        let known_until = reader.end_block.min(allocated).max(reader.named_until);
        // A reader counts from the prompt's first block too, so progress needs no translation, only a cut: it is not
        // told of blocks that it does not want.
        let clip = |blocks: u32| blocks.clamp(reader.first_block, reader.end_block);
        let progress = Progress {
            done_blocks: clip(hold.progress.done_blocks),
            wave_blocks: clip(hold.progress.wave_blocks),
            wave_layers: hold.progress.wave_layers,
        };
        if known_until == reader.named_until && progress == reader.told {
            return;
        }
        let named = reader.named_until as usize..known_until as usize;
        let blocks = hold.blocks.get(named).unwrap_or_default();
        reader.named_until = known_until;
        reader.told = progress;
        let mut parts: Vec<Vec<u32>> = blocks.chunks(BLOCKS_PER_MESSAGE).map(<[u32]>::to_vec).collect();
        if parts.is_empty() {
            parts.push(Vec::new());
        }
        let transfer = id.1;
        for blocks in parts {
            let ready = Message::Ready {
                transfer,
                blocks,
                progress,
            };
            self.send(id.0, ready);
        }
    }

    /// A reader has what it wanted, or does not want it any more, or is no more.
    fn reader_left(&mut self, now: Instant, id: (ConnectionId, u64)) {
        let Some(reader) = self.readers.remove(&id) else {
            return;
        };
        if let Some(transfers) = self.transfers.get_mut(&id.0) {
            transfers.remove(&id.1);
            if transfers.is_empty() {
                self.transfers.remove(&id.0);
            }
        }
        let Some(hold) = self.holds.get_mut(&reader.hold) else {
            return;
        };
        let Some(lease) = &mut hold.lease else { return };
        lease.readers.retain(|other| *other != id);
        lease.released += 1;
        if hold.is_finished && lease.released >= self.limits.readers {
            self.end(now, &reader.hold, EndReason::Released);
        }
    }

    // ---- leases

    fn hold_of(&self, key: &TransferKey) -> Option<&Hold> {
        self.holds.get(self.keys.get(key)?)
    }

    fn renew(&mut self, now: Instant, id: &Arc<str>) {
        let Some(hold) = self.holds.get_mut(id) else {
            return;
        };
        let Some(lease) = &mut hold.lease else { return };
        if !hold.is_finished {
            return;
        }
        let expires = now + self.limits.lease;
        if let Some(earlier) = lease.expires.replace(expires) {
            self.expiries.remove(&(earlier, Arc::clone(id)));
        }
        self.expiries.insert((expires, Arc::clone(id)));
    }

    /// False: nobody reads it, or the time of its readers is over too.
    fn renew_for_readers(&mut self, now: Instant, id: &Arc<str>) -> bool {
        let reading = self.limits.reading;
        let lease = self.holds.get(id).and_then(|hold| hold.lease.as_ref());
        let is_read = lease.is_some_and(|lease| {
            !lease.readers.is_empty() && lease.last_want.is_some_and(|want| now < want + reading)
        });
        if is_read {
            self.renew(now, id);
        }
        is_read
    }

    /// Drops the oldest finished holds that nobody has claimed, until the rest fits.
    fn make_room(&mut self, now: Instant) {
        while self.unclaimed_blocks > self.limits.unclaimed_blocks {
            let is_unclaimed = |id: &Arc<str>| {
                let lease = self.holds.get(id).and_then(|hold| hold.lease.as_ref());
                lease.is_some_and(|lease| !lease.is_claimed)
            };
            let Some(oldest) = self
                .expiries
                .iter()
                .map(|(_, id)| id)
                .find(|id| is_unclaimed(id))
                .cloned()
            else {
                return;
            };
            self.end(now, &oldest, EndReason::Dropped);
        }
    }

    /// Ends a hold; the engine hears of it now or when it finishes the request.
    fn end(&mut self, now: Instant, id: &Arc<str>, reason: EndReason) {
        self.close(id, reason);
        let Some(hold) = self.holds.get_mut(id) else {
            return;
        };
        if reason != EndReason::Replaced {
            self.gone.put(hold.key.clone(), now);
        }
        hold.end_reason = reason;
        if hold.is_finished {
            self.holds.remove(id);
            self.actions.push_back(HolderAction::Ended {
                hold: Arc::clone(id),
                reason,
            });
        }
    }

    /// From here on nothing that is read out of the hold's blocks counts.
    fn close(&mut self, id: &Arc<str>, reason: EndReason) {
        let Some(hold) = self.holds.get_mut(id) else {
            return;
        };
        let Some(lease) = hold.lease.take() else {
            return;
        };
        let epoch = &mut self.epochs[lease.slot as usize];
        *epoch += 1;
        let action = HolderAction::SetEpoch {
            slot: lease.slot,
            epoch: *epoch,
        };
        self.actions.push_back(action);
        self.free_slots.push(lease.slot);
        if hold.is_finished && !lease.is_claimed {
            self.unclaimed_blocks -= hold.blocks.len();
        }
        if let Some(expires) = lease.expires {
            self.expiries.remove(&(expires, Arc::clone(id)));
        }
        if self.keys.get(&hold.key) == Some(id) {
            self.keys.remove(&hold.key);
        }
        for reader in lease.readers {
            self.readers.remove(&reader);
            if let Some(transfers) = self.transfers.get_mut(&reader.0) {
                transfers.remove(&reader.1);
                if transfers.is_empty() {
                    self.transfers.remove(&reader.0);
                }
            }
            debug_assert!(reason != EndReason::Released || self.limits.readers == 0 || lease.released > 0);
            let transfer = reader.1;
            self.send(reader.0, Message::Revoked { transfer });
        }
    }

    fn send(&mut self, connection: ConnectionId, message: Message) {
        self.actions.push_back(HolderAction::Send(connection, message));
    }
}

#[cfg(test)]
mod tests;
