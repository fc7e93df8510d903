//! Readers: what they want, what they are told, and that they leave.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::{BLOCKS_PER_MESSAGE, EarlyRelease, EndReason, Hold, Holder, Reader, Revoked, Wanted};
use crate::key::{Prompt, TransferKey};
use crate::proto::ConnectionId;
use crate::proto::message::{DenyReason, Message, Progress};

impl Holder {
    /// The blocks of this side that hold so many blocks of a reader. A range behind the prompt's end stays one.
    pub(super) fn own_blocks(
        &self,
        prompt: &Prompt,
        block_tokens: u32,
        first_block: u32,
        block_count: u32,
    ) -> std::ops::Range<u32> {
        let end_block = first_block.saturating_add(block_count);
        let own_tokens = self.limits.block_tokens;
        if block_tokens == own_tokens || block_count == 0 {
            return first_block..end_block;
        }
        if end_block > prompt.block_count(block_tokens) {
            return 0..u32::MAX;
        }
        let wanted = u64::from(first_block)..u64::from(end_block);
        let blocks = prompt.blocks_of_other_size(wanted, block_tokens, own_tokens);
        // Both are blocks of the prompt, of which there are fewer than tokens.
        blocks.start as u32..blocks.end as u32
    }

    pub(super) fn wanted(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        is_compatible: bool,
        transfer: u64,
        key: TransferKey,
        wanted: Wanted,
    ) -> Result<(), &'static str> {
        let id = (connection, transfer);
        let (prompt, range) = (wanted.prompt, wanted.blocks.clone());
        if self.readers.contains_key(&id) || self.waiting_wants.contains(id) {
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
        let may_come = reason == Some(DenyReason::Gone) && !self.is_closed && !self.is_gone(now, &key);
        if may_come && !range.is_empty() && self.waiting_wants.len() < self.limits.questions {
            let deadline = now + self.limits.want_wait;
            self.waiting_wants.add(id, key, wanted, deadline);
            return Ok(());
        }
        if reason == Some(DenyReason::Gone) && range.is_empty() {
            // Decode may be faster than prefill, where both were called at once.
            self.release_early(now, key, &wanted);
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
        if !range.is_empty()
            && lease.readers.is_empty()
            && lease.released_early >= lease.needed.max(wanted.readers)
        {
            // A client's second try: the first one's early release does not end the lease under this one.
            lease.released = lease.released.saturating_sub(lease.released_early);
            lease.released_early = 0;
        }
        lease.readers.push(id);
        lease.needed = lease.needed.max(wanted.readers);
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

    /// A rank needs nothing of a request that is not here yet.
    pub(super) fn release_early(&mut self, now: Instant, key: TransferKey, wanted: &Wanted) {
        let early = self.early_releases.get_or_insert_mut(key, || EarlyRelease {
            prompt: wanted.prompt,
            ranks: 0,
            readers: 0,
            told: now,
        });
        early.ranks += 1;
        early.readers = early.readers.max(wanted.readers);
        early.told = now;
    }

    /// What a rank has of a hold that was revoked before this was heard. It will be, or has been, offered again, and that
    /// rank does not come for it.
    pub(super) fn release_late(&mut self, now: Instant, revoked: Revoked) {
        let Revoked { key, prompt, readers } = revoked;
        let Some(id) = self.keys.get(&key).cloned() else {
            if !self.is_gone(now, &key) {
                let blocks = 0..0;
                self.release_early(
                    now,
                    key,
                    &Wanted {
                        prompt,
                        blocks,
                        readers,
                    },
                );
            }
            return;
        };
        let is_again = |hold: &&mut Hold| hold.prompt.digest == prompt.digest;
        if let Some(hold) = self.holds.get_mut(&id).filter(is_again)
            && let Some(lease) = &mut hold.lease
        {
            lease.released_early += 1;
            self.released(now, &id, readers);
        }
    }

    /// A rank has what it found posted under a lease. Of another request's lease of that key it has nothing.
    pub(super) fn taken(&mut self, now: Instant, key: &TransferKey, slot: u32, epoch: u64, readers: u32) {
        // Not forgotten with the first one: every rank may have taken it.
        if let Some(revoked) = self.revoked_posts.get(&(slot, epoch)).cloned()
            && revoked.key == *key
        {
            return self.release_late(now, Revoked { readers, ..revoked });
        }
        let Some(id) = self.keys.get(key).cloned() else {
            return;
        };
        let lease = self.holds.get(&id).and_then(|hold| hold.lease.as_ref());
        if lease.is_some_and(|lease| lease.slot == slot && self.epochs.get(slot as usize) == Some(&epoch)) {
            self.released(now, &id, readers);
        }
    }

    /// One rank more needs nothing of a hold, of so many that must say so.
    fn released(&mut self, now: Instant, id: &Arc<str>, readers: u32) {
        let Some(hold) = self.holds.get_mut(id) else {
            return;
        };
        let Some(lease) = &mut hold.lease else { return };
        if !std::mem::replace(&mut lease.is_claimed, true) && hold.is_finished {
            self.unclaimed_blocks -= hold.blocks.len();
        }
        lease.needed = lease.needed.max(readers);
        lease.released += 1;
        if hold.is_finished && lease.released >= lease.needed {
            self.end(now, id, EndReason::Released);
        }
    }

    /// Takes up the wants that waited for a key: it was offered, or will not be.
    pub(super) fn grant_waiting(&mut self, now: Instant, key: &TransferKey) {
        for ((connection, transfer), wanted) in self.waiting_wants.take(key) {
            // It was compatible when it began to wait.
            let taken = self.wanted(now, connection, true, transfer, key.clone(), wanted);
            debug_assert!(taken.is_ok(), "its number was free");
        }
    }

    /// Names blocks and progress that a reader does not know yet.
    pub(super) fn tell(&mut self, id: (ConnectionId, u64)) {
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
    pub(super) fn reader_left(&mut self, now: Instant, id: (ConnectionId, u64)) {
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
        if hold.is_finished && lease.released >= lease.needed {
            self.end(now, &reader.hold, EndReason::Released);
        }
    }
}
