//! Takes, as decode begins and ends them, and what prefill's end of a data connection asks about leases.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use super::super::peers::Way;
use super::super::takes::{TAKE_BYTES_MAX, TakeDone};
use super::{Exchange, PeerState};
use crate::lanes::{
    EpochTable, Lease, Leases, LocalCache, OfferBoard, POSTED_BLOCKS_MAX, PostedPrompt, TakeLine,
};
use crate::proto::{ConnectionId, PullRequest, PullerAction};

impl Exchange {
    /// How many takes run.
    pub(in super::super) fn takes_running(&self) -> &Arc<AtomicUsize> {
        self.takes.running()
    }

    /// Whether a pull is best begun by taking its blocks.
    pub(in super::super) fn may_take(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        request: &PullRequest,
    ) -> bool {
        let Some(PeerState::Usable(peer)) = self.peers.get(&connection) else {
            return false;
        };
        let are_alike = peer.units.is_none() && matches!(self.cache, LocalCache::Host(_));
        let layers = 0..self.cache.map().layer_count();
        let bytes = peer.pairing.payload_bytes(&layers, request.targets.len());
        let blocks = request.prompt.block_count(self.options.block_tokens) as usize;
        let is_small = bytes <= TAKE_BYTES_MAX && blocks <= POSTED_BLOCKS_MAX;
        if !are_alike || !matches!(peer.way, Way::Tcp) || !is_small {
            return false;
        }
        self.takes.is_free(now, connection).unwrap_or_else(|| {
            // For the next one.
            self.copies.open_line(connection, peer);
            false
        })
    }

    /// A data connection for takes was made, if the peer's blocks can be taken.
    pub(in super::super) fn line_opened(&mut self, connection: ConnectionId, line: TakeLine) {
        if matches!(self.peers.get(&connection), Some(PeerState::Usable(_))) {
            self.takes.add(connection, line);
        }
    }

    /// Looks whether takes have ended.
    pub(in super::super) fn progress_takes(&mut self) {
        for done in self.takes.progress_all() {
            self.took(&done);
        }
    }

    pub(super) fn took(&mut self, done: &TakeDone) {
        if done.lease.is_some() {
            *self.stats.pulled_bytes.entry(Way::Tcp.name()).or_default() += done.bytes;
            *self.stats.pull_time.entry(Way::Tcp.name()).or_default() += done.elapsed;
            self.stats.takes += 1;
        }
        let lease = done.lease.map(|lease| (lease.slot, lease.epoch));
        self.puller.took(done.transfer, lease);
    }

    pub(super) fn start_take(&mut self, action: PullerAction) {
        let PullerAction::Take {
            transfer,
            connection,
            key,
            prompt,
            first_block,
            targets,
        } = action
        else {
            return;
        };
        let layers = 0..self.cache.map().layer_count();
        let bytes = match self.peers.get(&connection) {
            Some(PeerState::Usable(peer)) => peer.pairing.payload_bytes(&layers, targets.len()),
            _ => 0,
        };
        let began = self.takes.begin(
            connection,
            transfer,
            (&key, &prompt),
            (first_block, &targets),
            bytes,
        );
        if !began {
            self.puller.took(transfer, None);
        }
    }
}

/// What the serving end of a data connection asks.
pub(super) struct HeldLeases {
    pub(super) table: Arc<EpochTable>,
    pub(super) board: Arc<OfferBoard>,
}

impl Leases for HeldLeases {
    fn is_held(&self, lease: Lease) -> bool {
        lease.slot < self.table.slot_count() && self.table.get(lease.slot) == lease.epoch
    }

    fn find_posted(&self, key: &[u8; 32], digest: &[u8; 32]) -> Option<PostedPrompt> {
        self.board.find(key, digest)
    }
}
