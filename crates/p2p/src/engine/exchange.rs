//! What happens behind the lock of a worker: messages of peers, blocks that are held, copies that begin and end.

use std::collections::{HashMap, HashSet};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvlane_core::BlockMap;
use kvlane_cuda::SharedCache;

use super::address::PeerAddress;
use super::copies::{CopyDone, CopyJob, CopyPool, copy_here};
use super::machine::Machine;
use super::options::WorkerOptions;
use super::peers::{Peer, Way, differences};
use super::results::Results;
use super::takes::Takes;
use super::worker::{Ended, WorkerStats};
use crate::lanes::{
    EpochTable, Lane, Lease, LocalCache, OfferBoard, POSTED_BLOCKS_MAX, PostedPrompt, ProbeToken, ShmLane,
    Span, serve,
};
use crate::proto::{
    ConnectionId, Copied, EndReason, Hello, Holder, HolderAction, HolderLimits, Link, Message, Offer,
    PostedBlocks, Progress, PullRequest, PullResult, Puller, PullerAction, PullerLimits, Role,
};

mod taking;

use taking::HeldLeases;

/// Most pulls at a time.
const PULLS_MAX: usize = 4096;
/// Most data connections that are served at a time.
const SERVED_MAX: usize = 256;
/// Longest time that a reader may take; the longest transfer_timeout_ms. Its connection's heartbeat ends it sooner if it is
/// gone.
const READING_MAX: Duration = Duration::from_secs(600);
/// How long a want waits for its request, of which another rank has said that it has begun.
const WANT_WAIT: Duration = Duration::from_secs(2);
/// Longest time for one answer on a data connection.
const SERVE_TIMEOUT: Duration = READING_MAX;
/// Spans of fewer bytes out of a peer's memory are copied by the thread that learns of them, which may be the engine's.
const COPY_HERE_BYTES: u64 = 64 << 10;
/// A part of a span that another thread copies meanwhile has at least so many bytes: some milliseconds of copying.
const PART_BYTES_MIN: usize = 8 << 20;

/// What a worker's threads do with messages, holds and copies.
pub(super) struct Exchange {
    pub(super) holder: Option<Holder>,
    pub(super) puller: Puller,
    /// Shows peers that they read the right process. It goes first: who reads it behind an epoch, or with an entry of the
    /// board, knows that those were still there.
    _token: ProbeToken,
    table: Arc<EpochTable>,
    board: Arc<OfferBoard>,
    cache: LocalCache,
    /// Keeps what peers map.
    _shared: Option<SharedCache>,
    /// The offer of each hold that has not ended, by number: a name may be used again.
    offers: HashMap<Arc<str>, u64>,
    last_offer: u64,
    /// Pulls that wait for the compute stream.
    pub(super) waiting: HashSet<u64>,
    own_hello: Hello,
    options: WorkerOptions,
    copies: CopyPool,
    pub(super) peers: HashMap<ConnectionId, PeerState>,
    /// For what is read on the thread that needs it.
    lanes_here: HashMap<ConnectionId, ShmLane>,
    /// Connections of peers that pull from here; whether their namespace is ours.
    readers: HashMap<ConnectionId, bool>,
    stops: HashMap<u64, Arc<AtomicBool>>,
    takes: Takes,
    served: Arc<AtomicUsize>,
    is_closing: Arc<AtomicBool>,
    results: Arc<Results>,
    pub(super) stats: WorkerStats,
}

/// A prefill worker behind a connection, or why nothing comes from there.
pub(super) enum PeerState {
    Usable(Arc<Peer>),
    Refused,
}

impl Exchange {
    pub(super) fn new(
        (cache, shared): (LocalCache, Option<SharedCache>),
        own_hello: Hello,
        (table, token, board): (Arc<EpochTable>, ProbeToken, OfferBoard),
        options: &WorkerOptions,
        copies: CopyPool,
        results: Arc<Results>,
    ) -> Self {
        Self {
            holder: options.can_offer.then(|| Holder::new(holder_limits(options))),
            puller: Puller::new(PullerLimits {
                pulls: PULLS_MAX,
                layers: cache.map().layer_count() as u32,
                block_tokens: options.block_tokens,
                block_count_max: u32::MAX,
                parts: options.copy_threads as u32,
                part_pieces_min: part_pieces_min(cache.map()),
            }),
            table,
            board: Arc::new(board),
            _token: token,
            cache,
            _shared: shared,
            offers: HashMap::new(),
            last_offer: 0,
            waiting: HashSet::new(),
            own_hello,
            options: options.clone(),
            copies,
            peers: HashMap::new(),
            lanes_here: HashMap::new(),
            readers: HashMap::new(),
            stops: HashMap::new(),
            takes: Takes::default(),
            served: Arc::default(),
            is_closing: Arc::default(),
            results,
            stats: WorkerStats::default(),
        }
    }

    pub(super) fn end(&mut self, job: u64, result: PullResult) {
        *self.stats.pulls.entry(result).or_default() += 1;
        self.results.add(Ended { job, result });
    }

    /// Begins to hold a request, if there is a holder.
    pub(super) fn offer(&mut self, now: Instant, offer: Offer) -> Option<bool> {
        let hold = Arc::clone(&offer.hold);
        let is_taken = self.holder.as_mut()?.offer(now, offer);
        if is_taken {
            self.last_offer += 1;
            self.offers.insert(hold, self.last_offer);
        }
        Some(is_taken)
    }

    /// Ends a hold at once, if there is a holder.
    pub(super) fn revoke(&mut self, now: Instant, hold: &str) -> Option<bool> {
        self.offers.remove(hold);
        let is_known = self.holder.as_mut()?.revoke(now, hold);
        if is_known {
            *self.stats.holds.entry(EndReason::Revoked).or_default() += 1;
        }
        Some(is_known)
    }

    /// The number of a hold's offer.
    pub(super) fn offer_of(&self, hold: &str) -> Option<u64> {
        self.offers.get(hold).copied()
    }

    /// Progress that was seen some time ago: it is that of one offer, and of none that came later under the same name.
    pub(super) fn late_progress(&mut self, hold: &str, offer: u64, progress: Progress) {
        if self.offer_of(hold) == Some(offer)
            && let Some(holder) = &mut self.holder
        {
            holder.progress(hold, progress);
        }
    }

    /// Takes the result of a span.
    pub(super) fn copied(&mut self, done: &CopyDone) {
        if done.copied == Copied::Held {
            *self.stats.pulled_bytes.entry(done.lane).or_default() += done.bytes;
            *self.stats.pull_time.entry(done.lane).or_default() += done.elapsed;
        }
        self.puller.copied(done.transfer, done.copied);
    }

    fn apply(&mut self, action: HolderAction) -> Option<(ConnectionId, Message)> {
        match action {
            HolderAction::SetEpoch { slot, epoch } => self.table.set(slot, epoch),
            HolderAction::Ended { hold, reason } => {
                self.offers.remove(&hold);
                *self.stats.holds.entry(reason).or_default() += 1;
                self.results.add_hold(hold, reason);
            }
            HolderAction::Post {
                key,
                prompt,
                slot,
                epoch,
                blocks,
            } => {
                let lease = Lease { slot, epoch };
                self.board.post(&key, &prompt, &PostedPrompt { lease, blocks });
            }
            HolderAction::Send(connection, message) => return Some((connection, message)),
        }
        None
    }

    /// The wanted blocks, if the peer's memory can be read and has the prompt posted.
    pub(super) fn posted(&mut self, connection: ConnectionId, request: &PullRequest) -> Option<PostedBlocks> {
        // Whatever is wrong shows when it is asked for.
        let lane = self.lane_here(connection)?;
        let posted = lane.find_posted(&request.key, &request.prompt).ok()??;
        let PeerState::Usable(peer) = self.peers.get(&connection)? else {
            return None;
        };
        let wanted = peer.blocks_of(request, self.options.block_tokens);
        Some(PostedBlocks {
            slot: posted.lease.slot,
            epoch: posted.lease.epoch,
            blocks: posted.blocks.get(wanted)?.to_vec(),
        })
    }

    /// `None`: the peer's memory cannot be read from here.
    fn lane_here(&mut self, connection: ConnectionId) -> Option<&mut ShmLane> {
        let PeerState::Usable(peer) = self.peers.get(&connection)? else {
            return None;
        };
        let Way::Shm(memory) = peer.way else { return None };
        if !self.lanes_here.get(&connection).is_some_and(Lane::is_open) {
            let lane = ShmLane::open(memory, Arc::clone(&peer.pairing)).ok()?;
            self.lanes_here.insert(connection, lane);
        }
        self.lanes_here.get_mut(&connection)
    }

    fn start_copy(&mut self, action: PullerAction) {
        let PullerAction::Copy {
            transfer,
            connection,
            slot,
            epoch,
            span,
            deadline,
        } = action
        else {
            return;
        };
        let Some(PeerState::Usable(peer)) = self.peers.get(&connection) else {
            return self.puller.copied(transfer, Copied::Failed);
        };
        if span
            .remote
            .iter()
            .any(|&block| block >= peer.pairing.remote_units())
        {
            tracing::warn!(peer = %peer.address, "it granted blocks that it does not have");
            return self.puller.copied(transfer, Copied::Failed);
        }
        let layers = span.layers.start as usize..span.layers.end as usize;
        let bytes = peer.pairing.payload_bytes(&layers, span.local.len());
        let job = CopyJob {
            transfer,
            connection,
            peer: Arc::clone(peer),
            lease: Lease { slot, epoch },
            span: Span {
                layers,
                remote: span.remote,
                local: span.local,
            },
            deadline,
            is_stopped: Arc::clone(self.stops.entry(transfer).or_default()),
        };
        if bytes <= COPY_HERE_BYTES
            && let Some(lane) = self.lane_here(connection)
        {
            let done = copy_here(&job, lane);
            return self.copied(&done);
        }
        if !self.copies.push(job) {
            self.puller.copied(transfer, Copied::Failed);
        }
    }
}

impl Machine for Exchange {
    fn connected(
        &mut self,
        _: Instant,
        connection: ConnectionId,
        link: &Link,
        address: Option<&PeerAddress>,
    ) {
        let (Some(open), Some(hello)) = (link.peer(), link.peer_hello()) else {
            return;
        };
        let Some(address) = address else {
            // Whether and how its blocks and these fit, decode finds out.
            let is_compatible = hello.namespace == self.own_hello.namespace;
            if !is_compatible && open.role == Role::Puller {
                let reason = differences(&self.own_hello.facts, &hello.facts);
                tracing::warn!(
                    engine = open.engine_id,
                    reason,
                    "a decode server connected that gets nothing from here"
                );
            }
            self.readers.insert(connection, is_compatible);
            return;
        };
        let peer = Peer::new(
            address,
            open,
            hello,
            &self.own_hello,
            (&self.cache, self.options.shape.as_ref()),
            self.options.lane,
        );
        let state = match peer {
            Ok(peer) => {
                let peer = Arc::new(peer);
                let lane = peer.way.name();
                if let Some(units) = peer.units {
                    self.puller.meet(connection, units);
                    tracing::info!(
                        peer = %address, engine = open.engine_id, lane,
                        "connected to a prefill server whose blocks are not like ours: its have {} tokens, ours {}, and they are \
                         taken in units of {}",
                        units.holder_block_tokens,
                        self.options.block_tokens,
                        units.unit_tokens,
                    );
                } else {
                    tracing::info!(peer = %address, engine = open.engine_id, lane, "connected to a prefill server");
                }
                PeerState::Usable(peer)
            }
            Err(reason) => {
                tracing::warn!(
                    peer = %address, engine = open.engine_id, reason,
                    "nothing can be pulled from this prefill server; its prompts are computed here"
                );
                self.puller.refuse(connection);
                PeerState::Refused
            }
        };
        self.peers.insert(connection, state);
    }

    fn receive(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        message: Message,
    ) -> Result<(), &'static str> {
        if self.peers.contains_key(&connection) {
            return self.puller.receive(connection, message);
        }
        let is_compatible = self.readers.get(&connection).copied().unwrap_or(false);
        match &mut self.holder {
            Some(holder) => holder.receive(now, connection, is_compatible, message),
            None => Err("this server holds no blocks"),
        }
    }

    fn closed(&mut self, now: Instant, connection: ConnectionId) {
        if let Some(PeerState::Usable(peer)) = self.peers.remove(&connection) {
            peer.is_gone.store(true, Ordering::Relaxed);
            self.copies.drop_peer(peer);
        }
        self.lanes_here.remove(&connection);
        self.puller.closed(connection);
        if let Some(done) = self.takes.closed(connection) {
            self.took(&done);
        }
        self.readers.remove(&connection);
        if let Some(holder) = &mut self.holder {
            holder.closed(now, connection);
        }
    }

    fn close(&mut self, now: Instant) {
        self.is_closing.store(true, Ordering::Relaxed);
        for stop in self.stops.values() {
            stop.store(true, Ordering::Relaxed);
        }
        for job in std::mem::take(&mut self.waiting) {
            self.end(job, PullResult::Unreachable);
        }
        for done in self.takes.drop_all() {
            self.took(&done);
        }
        if let Some(holder) = &mut self.holder {
            holder.close_all(now);
        }
    }

    fn data_connection(&mut self, stream: TcpStream, early: Vec<u8>, link: &Link) {
        let peer = link
            .peer()
            .map_or_else(String::new, |open| open.engine_id.clone());
        let is_ours = link
            .peer_hello()
            .is_some_and(|hello| hello.namespace == self.own_hello.namespace);
        if !early.is_empty() || !is_ours || self.holder.is_none() {
            tracing::warn!(
                peer,
                "a data connection is refused: it does not fit this cache, or asked too early"
            );
            return;
        }
        if self.served.fetch_add(1, Ordering::Relaxed) >= SERVED_MAX {
            self.served.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(peer, "a data connection is refused: {SERVED_MAX} are open");
            return;
        }
        let leases = HeldLeases {
            table: Arc::clone(&self.table),
            board: Arc::clone(&self.board),
        };
        let cache = self.cache.clone();
        let shape = self.options.shape.clone();
        let (served, is_closing) = (Arc::clone(&self.served), Arc::clone(&self.is_closing));
        let started = std::thread::Builder::new()
            .name("kvlane-p2p-serve".to_owned())
            .spawn(move || {
                let result = serve(stream, cache, shape.as_ref(), leases, &is_closing, SERVE_TIMEOUT);
                served.fetch_sub(1, Ordering::Relaxed);
                if let Err(error) = result {
                    tracing::info!(peer, %error, "a data connection ended");
                }
            });
        if let Err(error) = started {
            self.served.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%error, "a data connection is refused: a thread could not be started");
        }
    }

    fn data_readable(&mut self, connection: ConnectionId) {
        if let Some(done) = self.takes.progress(connection) {
            self.took(&done);
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let holder = self.holder.as_ref().and_then(Holder::next_deadline);
        let takes = self.takes.next_deadline();
        holder
            .into_iter()
            .chain(self.puller.next_deadline())
            .chain(takes)
            .min()
    }

    fn tick(&mut self, now: Instant) {
        if let Some(holder) = &mut self.holder {
            holder.tick(now);
        }
        self.puller.tick(now);
        for done in self.takes.stop_late(now) {
            self.took(&done);
        }
    }

    fn next_message(&mut self) -> Option<(ConnectionId, Message)> {
        while let Some(action) = self.holder.as_mut().and_then(Holder::next_action) {
            if let Some(message) = self.apply(action) {
                return Some(message);
            }
        }
        while let Some(action) = self.puller.next_action() {
            match action {
                PullerAction::Send(connection, message) => return Some((connection, message)),
                PullerAction::StopCopies { transfer } => {
                    if let Some(stop) = self.stops.get(&transfer) {
                        stop.store(true, Ordering::Relaxed);
                    }
                    if let Some(done) = self.takes.stop(transfer) {
                        self.took(&done);
                    }
                }
                PullerAction::Ended {
                    job,
                    transfer,
                    result,
                } => {
                    self.stops.remove(&transfer);
                    self.end(job, result);
                }
                copy @ PullerAction::Copy { .. } => self.start_copy(copy),
                take @ PullerAction::Take { .. } => self.start_take(take),
            }
        }
        None
    }
}

/// Pieces, each of one block in one layer, that are worth a thread of their own.
fn part_pieces_min(map: &BlockMap) -> u32 {
    let piece_bytes = map.block_bytes() / map.layer_count().max(1);
    (PART_BYTES_MIN / piece_bytes.max(1)).max(1) as u32
}

fn holder_limits(options: &WorkerOptions) -> HolderLimits {
    HolderLimits {
        block_tokens: options.block_tokens,
        slots: options.holds,
        lease: options.lease,
        reading: READING_MAX,
        readers: options.readers,
        unclaimed_blocks: options.unclaimed_blocks,
        questions: 4096,
        question_wait: options.question_wait,
        want_wait: WANT_WAIT,
        transfers_per_connection: PULLS_MAX,
        posted_blocks: POSTED_BLOCKS_MAX as u32,
    }
}
