//! The worker: holds blocks for others, pulls blocks of others.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvlane_core::{NamespaceId, PagedMemory};
use kvlane_fs::HostCache;

use super::address::PeerAddress;
use super::asker::identity;
use super::copies::{CopyDone, CopyJob, CopyPool, copy_here};
use super::net::{Machine, Net, NetConfig};
use super::options::WorkerOptions;
use super::peers::Peer;
use crate::error::{Error, Result};
use crate::key::{Prompt, TransferKey};
use crate::lanes::{EpochTable, Lease, ProbeToken, Span, serve};
use crate::proto::{
    CacheLayout, Channel, ConnectionId, Copied, DenyReason, EndReason, Hello, Holder, HolderAction,
    HolderLimits, Link, Message, Offer, Probe, Progress, PullRequest, PullResult, Puller, PullerAction,
    PullerLimits, Role,
};

/// Most pulls at a time.
const PULLS_MAX: usize = 4096;
/// Most data connections that are served at a time.
const SERVED_MAX: usize = 256;
/// Longest time for one answer on a data connection.
const SERVE_TIMEOUT: Duration = Duration::from_secs(30);
/// Spans of fewer bytes out of a peer's memory are copied by the thread that learns of them.
const COPY_HERE_BYTES: u64 = 256 << 10;

/// Blocks to pull.
#[derive(Clone, Debug)]
pub struct PullOrder {
    /// Where the prefill worker of the same rank listens.
    pub address: PeerAddress,
    /// Names the transfer on both sides.
    pub key: TransferKey,
    /// What it must be of.
    pub prompt: Prompt,
    /// Index in the prompt of the first block.
    pub first_block: u32,
    /// Own blocks that receive them, without repeats.
    pub targets: Vec<u32>,
    /// How long it may take.
    pub timeout: Duration,
}

/// A pull that has ended. No thread writes its blocks any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The job.
    pub job: u64,
    /// How it ended.
    pub result: PullResult,
}

/// Totals since the start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkerStats {
    /// Bytes pulled, by lane.
    pub pulled_bytes: HashMap<&'static str, u64>,
    /// Time spent copying them, by lane.
    pub pull_time: HashMap<&'static str, Duration>,
    /// Ended pulls, by result.
    pub pulls: HashMap<PullResult, u64>,
    /// Ended holds, by reason.
    pub holds: HashMap<EndReason, u64>,
    /// Requests that are held now.
    pub held_requests: usize,
    /// Prefill workers with a usable connection.
    pub peers: usize,
}

/// One worker's part in the exchange of blocks.
pub struct P2pWorker {
    net: Net<Worker>,
    results: Arc<Results>,
    options: WorkerOptions,
    block_count: u32,
    last_job: Mutex<u64>,
}

/// Pulls and holds that have ended, until somebody asks.
#[derive(Default)]
struct Results {
    /// Entries of both lists.
    waiting: AtomicUsize,
    lists: Mutex<Lists>,
    changed: Condvar,
}

#[derive(Default)]
struct Lists {
    pulls: VecDeque<Ended>,
    /// Jobs given out whose end was not delivered.
    open: HashSet<u64>,
    holds: Vec<(Arc<str>, EndReason)>,
}

struct Worker {
    holder: Option<Holder>,
    puller: Puller,
    table: Arc<EpochTable>,
    /// Shows peers that they read the right process; lives as long as its address is out.
    _token: ProbeToken,
    cache: Arc<HostCache>,
    own_hello: Hello,
    options: WorkerOptions,
    copies: CopyPool,
    peers: HashMap<ConnectionId, PeerState>,
    /// Connections of peers that pull from here; whether their cache is like ours.
    readers: HashMap<ConnectionId, bool>,
    stops: HashMap<u64, Arc<AtomicBool>>,
    served: Arc<AtomicUsize>,
    is_closing: Arc<AtomicBool>,
    results: Arc<Results>,
    stats: WorkerStats,
}

enum PeerState {
    Usable(Arc<Peer>),
    Refused,
}

impl P2pWorker {
    /// Starts its threads, and listens if it may offer.
    pub fn open(cache: Arc<HostCache>, namespace: NamespaceId, options: WorkerOptions) -> Result<Self> {
        options.check()?;
        let failed = |source| Error::Io {
            context: "asking the system for random bytes",
            source,
        };
        let table = Arc::new(EpochTable::new(options.holds));
        // Like the holder's own list.
        (0..options.holds).for_each(|slot| table.set(slot, 1));
        let token = ProbeToken::new().map_err(failed)?;
        let own_hello = Hello {
            channel: Channel::Control,
            namespace: *namespace.as_bytes(),
            block_tokens: options.block_tokens,
            cache: None,
            probe: None,
        };
        let accept_hello = Hello {
            cache: Some(CacheLayout::from(cache.map())),
            probe: Some(Probe {
                pid: std::process::id(),
                address: token.address(),
                token: token.bytes(),
                epochs_address: table.address(),
                slot_count: table.slot_count(),
            }),
            ..own_hello.clone()
        };
        let config = NetConfig {
            options: options.peer.clone(),
            identity: Arc::new(identity(&options.peer)?),
            dial_role: Role::Puller,
            dial_hello: own_hello.clone(),
            accept_hello,
        };
        let block_count = cache.map().block_count();
        let (copies, queue) = CopyPool::new();
        let results = Arc::<Results>::default();
        let worker = Worker {
            holder: options.can_offer.then(|| Holder::new(holder_limits(&options))),
            puller: Puller::new(PullerLimits {
                pulls: PULLS_MAX,
                layers: cache.map().layer_count() as u32,
                block_count_max: u32::MAX,
            }),
            table,
            _token: token,
            cache,
            own_hello,
            options: options.clone(),
            copies,
            peers: HashMap::new(),
            readers: HashMap::new(),
            stops: HashMap::new(),
            served: Arc::default(),
            is_closing: Arc::default(),
            results: Arc::clone(&results),
            stats: WorkerStats::default(),
        };
        let listen = options
            .can_offer
            .then(|| SocketAddr::new(options.host, options.port));
        let net_config = config.clone();
        let net = Net::start(config, listen, worker)?;
        if options.can_pull {
            // The threads end when the net, and with it the pool, is dropped.
            let shared = Arc::downgrade(net.shared());
            queue.start(options.copy_threads, &Arc::new(net_config), move |done| {
                if let Some(shared) = shared.upgrade() {
                    shared.with(|core, _| core.machine.copied(&done));
                }
            })?;
        }
        Ok(Self {
            net,
            results,
            options,
            block_count,
            last_job: Mutex::new(0),
        })
    }

    /// The port it listens on, if it does.
    pub fn port(&self) -> Option<u16> {
        self.net.address().map(|address| address.port())
    }

    // ---- prefill

    /// Begins to hold a request. False: too many are held, and nobody can read this one.
    pub fn offer(&self, offer: Offer) -> Result<bool> {
        self.check_blocks(&offer.blocks)?;
        self.with_holder(|holder, now| holder.offer(now, offer))
    }

    /// Appends blocks that were allocated for later chunks. An unknown hold is ignored.
    pub fn extend(&self, hold: &str, blocks: &[u32]) -> Result<()> {
        self.check_blocks(blocks)?;
        self.with_holder(|holder, _| holder.extend(hold, blocks))
    }

    /// Says how far the computation is. An unknown hold is ignored.
    pub fn progress(&self, hold: &str, progress: Progress) -> Result<()> {
        self.with_holder(|holder, _| holder.progress(hold, progress))
    }

    /// The request has ended, and the engine keeps its blocks until [`ended_holds`](Self::ended_holds) names it.
    pub fn finish(&self, hold: &Arc<str>) -> Result<()> {
        self.with_holder(|holder, now| holder.finish(now, hold))
    }

    /// The engine needs the blocks: others may write them as soon as this returns. An unknown hold is ignored.
    pub fn revoke(&self, hold: &str) -> Result<()> {
        self.with_holder(|holder, _| holder.revoke(hold))
    }

    /// Finished requests whose blocks are the engine's own again; each once.
    pub fn ended_holds(&self) -> Vec<(Arc<str>, EndReason)> {
        if self.results.is_empty() {
            return Vec::new();
        }
        let mut lists = self.results.lock();
        let holds = std::mem::take(&mut lists.holds);
        self.results.waiting.fetch_sub(holds.len(), Ordering::Release);
        holds
    }

    // ---- decode

    /// Begins a pull.
    pub fn pull(&self, order: PullOrder) -> Result<u64> {
        if !self.options.can_pull {
            return Err(Error::Role("pull"));
        }
        self.check_targets(&order)?;
        let job = {
            let mut last = self.last_job.lock().unwrap_or_else(PoisonError::into_inner);
            *last += 1;
            *last
        };
        self.results.lock().open.insert(job);
        if !self.options.peer.allows(order.address.host()) {
            tracing::warn!(peer = %order.address, "not among allowed_peers: nothing is pulled from there");
            self.results.add(Ended {
                job,
                result: PullResult::Unreachable,
            });
            return Ok(job);
        }
        let shared = self.net.shared();
        shared.with(|core, now| {
            let Some(connection) = shared.connection(core, now, &order.address) else {
                return core.machine.end(job, PullResult::Unreachable);
            };
            if matches!(core.machine.peers.get(&connection), Some(PeerState::Refused)) {
                return core.machine.end(job, PullResult::Denied(DenyReason::Namespace));
            }
            let request = PullRequest {
                job,
                key: order.key,
                prompt: order.prompt,
                first_block: order.first_block,
                targets: order.targets,
                deadline: now + order.timeout,
            };
            core.machine.puller.pull(connection, request);
        });
        Ok(job)
    }

    /// Tells prefill that this rank has everything itself. Best effort.
    pub fn release(&self, address: &PeerAddress, key: TransferKey, prompt: Prompt) {
        if !self.options.can_pull || !self.options.peer.allows(address.host()) {
            return;
        }
        let shared = self.net.shared();
        shared.with(|core, now| {
            if let Some(connection) = shared.connection(core, now, address) {
                core.machine.puller.release(connection, key, prompt);
            }
        });
    }

    /// Asks for the end of a pull; it still is delivered. An unknown job is ignored.
    pub fn cancel(&self, job: u64) {
        self.net.shared().with(|core, _| core.machine.puller.cancel(job));
    }

    /// Pulls that have ended, each once. One atomic load when there are none.
    pub fn poll(&self) -> Vec<Ended> {
        if self.results.is_empty() {
            return Vec::new();
        }
        let mut lists = self.results.lock();
        let ended: Vec<Ended> = lists.pulls.drain(..).collect();
        for pull in &ended {
            lists.open.remove(&pull.job);
        }
        self.results.waiting.fetch_sub(ended.len(), Ordering::Release);
        ended
    }

    /// Waits for the end of one pull, at most until `deadline`.
    pub fn wait(&self, job: u64, deadline: Instant) -> Result<Option<PullResult>> {
        let mut lists = self.results.lock();
        loop {
            if let Some(place) = lists.pulls.iter().position(|ended| ended.job == job) {
                let ended = lists.pulls.remove(place);
                lists.open.remove(&job);
                self.results.waiting.fetch_sub(1, Ordering::Release);
                return Ok(ended.map(|ended| ended.result));
            }
            if !lists.open.contains(&job) {
                return Err(Error::UnknownJob(job));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let waited = self.results.changed.wait_timeout(lists, left);
            lists = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    // ---- both

    /// Totals since the start.
    pub fn stats(&self) -> WorkerStats {
        self.net.shared().with(|core, _| {
            let worker = &core.machine;
            let usable = worker
                .peers
                .values()
                .filter(|peer| matches!(peer, PeerState::Usable(_)));
            WorkerStats {
                held_requests: worker.holder.as_ref().map_or(0, |holder| holder.load().0),
                peers: usable.count(),
                ..worker.stats.clone()
            }
        })
    }

    /// Ends its threads and connections. Pulls that run end as unreachable; what peers are reading lapses.
    pub fn close(&self) {
        self.net.shared().with(|core, _| {
            core.machine.is_closing.store(true, Ordering::Relaxed);
            core.machine
                .stops
                .values()
                .for_each(|stop| stop.store(true, Ordering::Relaxed));
        });
        self.net.close();
    }

    fn with_holder<T>(&self, work: impl FnOnce(&mut Holder, Instant) -> T) -> Result<T> {
        self.net
            .shared()
            .with(|core, now| match &mut core.machine.holder {
                // Actions are carried out before `with` returns, the table of epochs first: the engine may write then.
                Some(holder) => Ok(work(holder, now)),
                None => Err(Error::Role("offer")),
            })
    }

    fn check_blocks(&self, blocks: &[u32]) -> Result<()> {
        match blocks.iter().find(|&&block| block >= self.block_count) {
            None => Ok(()),
            Some(block) => Err(Error::InvalidArgument {
                argument: "blocks",
                found: format!("block {block}"),
                allowed: format!("below {}", self.block_count),
            }),
        }
    }

    fn check_targets(&self, order: &PullOrder) -> Result<()> {
        self.check_blocks(&order.targets)?;
        let mut seen = HashSet::with_capacity(order.targets.len());
        if let Some(block) = order.targets.iter().find(|block| !seen.insert(**block)) {
            return Err(Error::InvalidArgument {
                argument: "targets",
                found: format!("block {block} twice"),
                allowed: "every block once".to_owned(),
            });
        }
        let count = order.prompt.block_count(self.options.block_tokens) as usize;
        if order.targets.is_empty() || order.first_block as usize + order.targets.len() > count {
            return Err(Error::InvalidArgument {
                argument: "targets",
                found: format!(
                    "{} blocks from block {} on",
                    order.targets.len(),
                    order.first_block
                ),
                allowed: format!("1 to the prompt's {count} blocks"),
            });
        }
        Ok(())
    }
}

impl Drop for P2pWorker {
    fn drop(&mut self) {
        self.close();
    }
}

impl Results {
    fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
    }

    fn lock(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, ended: Ended) {
        self.lock().pulls.push_back(ended);
        self.waiting.fetch_add(1, Ordering::Release);
        self.changed.notify_all();
    }

    fn add_hold(&self, hold: Arc<str>, reason: EndReason) {
        self.lock().holds.push((hold, reason));
        self.waiting.fetch_add(1, Ordering::Release);
    }
}

fn holder_limits(options: &WorkerOptions) -> HolderLimits {
    HolderLimits {
        block_tokens: options.block_tokens,
        slots: options.holds,
        lease: options.lease,
        readers: options.readers,
        unclaimed_blocks: options.unclaimed_blocks,
        questions: 4096,
        question_wait: options.question_wait,
        transfers_per_connection: PULLS_MAX,
    }
}

impl Worker {
    fn end(&mut self, job: u64, result: PullResult) {
        *self.stats.pulls.entry(result).or_default() += 1;
        self.results.add(Ended { job, result });
    }

    /// Takes the result of a span.
    fn copied(&mut self, done: &CopyDone) {
        if done.copied == Copied::Held {
            *self.stats.pulled_bytes.entry(done.way.name()).or_default() += done.bytes;
            *self.stats.pull_time.entry(done.way.name()).or_default() += done.elapsed;
        }
        self.puller.copied(done.transfer, done.copied);
    }

    fn apply(&mut self, action: HolderAction) -> Option<(ConnectionId, Message)> {
        match action {
            HolderAction::SetEpoch { slot, epoch } => self.table.set(slot, epoch),
            HolderAction::Ended { hold, reason } => {
                *self.stats.holds.entry(reason).or_default() += 1;
                self.results.add_hold(hold, reason);
            }
            HolderAction::Send(connection, message) => return Some((connection, message)),
        }
        None
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
        if span.remote.iter().any(|&block| block >= peer.block_count) {
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
            && let Some(done) = copy_here(&job)
        {
            return self.copied(&done);
        }
        if let Err(job) = self.copies.push(job) {
            self.puller.copied(job.transfer, Copied::Failed);
        }
    }
}

impl Machine for Worker {
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
            let is_compatible = hello.namespace == self.own_hello.namespace
                && hello.block_tokens == self.own_hello.block_tokens;
            self.readers.insert(connection, is_compatible);
            return;
        };
        let peer = Peer::new(
            address,
            open,
            hello,
            &self.own_hello,
            &self.cache,
            self.options.lane,
        );
        let state = match peer {
            Ok(peer) => {
                let lane = peer.way.name();
                tracing::info!(peer = %address, engine = open.engine_id, lane, "connected to a prefill server");
                PeerState::Usable(Arc::new(peer))
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
        }
        self.puller.closed(connection);
        self.readers.remove(&connection);
        if let Some(holder) = &mut self.holder {
            holder.closed(now, connection);
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
        let (cache, table) = (Arc::clone(&self.cache), Arc::clone(&self.table));
        let (served, is_closing) = (Arc::clone(&self.served), Arc::clone(&self.is_closing));
        let started = std::thread::Builder::new()
            .name("kvlane-p2p-serve".to_owned())
            .spawn(move || {
                let is_held =
                    |lease: Lease| lease.slot < table.slot_count() && table.get(lease.slot) == lease.epoch;
                let result = serve(stream, &cache, is_held, &is_closing, SERVE_TIMEOUT);
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

    fn next_deadline(&self) -> Option<Instant> {
        let holder = self.holder.as_ref().and_then(Holder::next_deadline);
        holder.into_iter().chain(self.puller.next_deadline()).min()
    }

    fn tick(&mut self, now: Instant) {
        if let Some(holder) = &mut self.holder {
            holder.tick(now);
        }
        self.puller.tick(now);
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
            }
        }
        None
    }
}
