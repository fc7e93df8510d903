//! The prefill server's engine: computes, preempts, gives blocks back, starts anew.

use std::sync::Arc;

use kvlane_p2p::proto::{ConnectionId, EndReason, Holder, HolderAction, Offer, PostedBlocks, Progress};
use rand::Rng;

use super::{BLOCKS, Content, Event, LAYERS, World, holder_limits, tokens_of};

impl World {
    pub(super) fn compute(&mut self, number: u64) {
        let now = self.instant();
        let Some(request) = self.requests.get(&number) else {
            return;
        };
        if !request.is_computing {
            return;
        }
        let (key, prompt, blocks) = (request.key.clone(), request.prompt, request.blocks);
        let Some(hold) = request.hold.clone() else {
            // Scheduled for the first time, or again: gets blocks.
            let count = if self.random.random_bool(0.5) { 1 } else { blocks };
            if self.source_free.len() < blocks as usize {
                return self.soon(30, Event::Compute(number));
            }
            let own: Vec<u32> = self.source_free.drain(..blocks as usize).collect();
            let hold: Arc<str> = format!("{number} at {}", self.now.as_micros()).into();
            let offer = Offer {
                hold: Arc::clone(&hold),
                key,
                prompt,
                blocks: own[..count as usize].to_vec(),
            };
            self.holder.offer(now, offer);
            for &block in &own {
                self.fill_source(block, None);
            }
            if let Some(request) = self.requests.get_mut(&number) {
                (request.hold, request.source) = (Some(hold), own);
                (request.computed, request.computed_layers) = (0, 0);
                request.allocated = count;
            }
            return self.soon(10, Event::Compute(number));
        };
        if self.hits(self.faults.preemptions) {
            // Its blocks go to somebody else at once.
            self.holder.revoke(now, &hold);
            self.apply_holder();
            let Some(request) = self.requests.get_mut(&number) else {
                return;
            };
            request.hold = None;
            let freed = std::mem::take(&mut request.source);
            for &block in &freed {
                self.fill_source(block, Some((u64::MAX, block)));
            }
            self.source_free.extend(freed);
            return self.soon(100, Event::Compute(number));
        }
        let chunk = self.random.random_range(1..=3);
        let Some(request) = self.requests.get_mut(&number) else {
            return;
        };
        let wave = (request.computed + chunk).min(blocks);
        // Blocks are allocated chunk by chunk.
        if wave > request.allocated {
            let late = &request.source[request.allocated as usize..wave as usize];
            self.holder.extend(&hold, late);
            request.allocated = wave;
        }
        let layer = request.computed_layers as usize;
        // All blocks of a wave have the same layers: it is as wide as it was at its first layer.
        for index in request.computed..wave {
            let tokens = tokens_of(request.source[index as usize], self.prefill_tokens);
            let first = index * self.prefill_tokens;
            for (token, content) in (first..).zip(&mut self.source[tokens]) {
                content[..=layer].fill(Some((number, token)));
            }
        }
        request.computed_layers += 1;
        let mut progress = Progress {
            done_blocks: request.computed,
            wave_blocks: wave,
            wave_layers: request.computed_layers,
        };
        if request.computed_layers == LAYERS {
            // The whole wave has been filled in the last layer only as far as it went just now.
            (request.computed, request.computed_layers) = (wave, 0);
            progress = Progress {
                done_blocks: wave,
                wave_blocks: wave,
                wave_layers: 0,
            };
        }
        let is_done = request.computed == blocks;
        self.holder.progress(&hold, progress);
        if !is_done {
            return self.soon(10, Event::Compute(number));
        }
        if let Some(request) = self.requests.get_mut(&number) {
            request.is_computing = false;
            let own = std::mem::take(&mut request.source);
            self.waiting_holds.insert(Arc::clone(&hold), own);
        }
        self.holder.finish(now, &hold);
    }

    pub(super) fn apply_holder(&mut self) {
        while let Some(action) = self.holder.next_action() {
            match action {
                HolderAction::SetEpoch { slot, epoch } => {
                    assert!(epoch > self.table[slot as usize], "an epoch goes back");
                    self.table[slot as usize] = epoch;
                }
                HolderAction::Post {
                    key,
                    prompt,
                    slot,
                    epoch,
                    blocks,
                } => {
                    let blocks = PostedBlocks { slot, epoch, blocks };
                    self.board.insert(key, (prompt, blocks));
                }
                HolderAction::Send(ConnectionId(connection), message) => {
                    self.send(connection, false, message)
                }
                HolderAction::Ended { hold, reason } => {
                    if reason == EndReason::Expired {
                        self.totals.expired += 1;
                    }
                    let freed = self
                        .waiting_holds
                        .remove(&hold)
                        .expect("an end is told once, of a finished request");
                    // Somebody else writes there from now on.
                    for &block in &freed {
                        self.fill_source(block, Some((u64::MAX, block)));
                    }
                    self.source_free.extend(freed);
                }
            }
        }
    }

    /// A new process at the same address: nothing of the old one is known, and its blocks hold other things.
    pub(super) fn restart_prefill(&mut self) {
        self.totals.restarts += 1;
        self.starts += 1;
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        ids.into_iter().for_each(|id| self.break_connection(id));
        while self.holder.next_action().is_some() {}
        self.holder = Holder::new(holder_limits(self.faults, self.prefill_tokens));
        // What a reader of the old process' memory would find.
        self.table = vec![0; 8];
        self.board.clear();
        self.source.fill([Some((u64::MAX, 0)); LAYERS as usize]);
        self.source_free = (0..BLOCKS).collect();
        self.waiting_holds.clear();
        for request in self.requests.values_mut() {
            (request.hold, request.is_computing) = (None, false);
            request.source.clear();
        }
        self.stop_all_copies();
        self.table = vec![1; 8];
    }

    fn fill_source(&mut self, block: u32, content: Content) {
        self.source[tokens_of(block, self.prefill_tokens)].fill([content; LAYERS as usize]);
    }

    /// Whoever reads a process that has ended gets an error.
    pub(super) fn stop_all_copies(&mut self) {
        self.copies.values_mut().for_each(|copy| copy.is_stopped = true);
    }
}
