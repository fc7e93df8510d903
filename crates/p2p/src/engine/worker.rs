//! The worker: holds blocks for others, pulls blocks of others.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvlane_core::{BlockMap, NamespaceId};
use kvlane_cuda::{DeviceCache, Mark, NcclInfo, Patience, SharedCache, StreamHandle};

use super::address::PeerAddress;
use super::asker::identity;
use super::connections::Core;
use super::copies::CopyPool;
use super::exchange::{Exchange, PeerState};
use super::machine::NetConfig;
use super::marks::{Deed, Marks, Waited};
use super::net::{Net, Shared};
use super::options::{LaneChoice, WorkerOptions};
use super::peers::host_id;
use super::results::Results;
use crate::error::{Error, Result};
use crate::key::{Prompt, TransferKey};
use crate::lanes::{EpochTable, LocalCache, OfferBoard, ProbeToken, RemoteCache, TakeLine};
use crate::proto::{
    CacheLayout, Channel, DenyReason, DeviceMemory, EndReason, Hello, Holder, Offer, Probe, Progress,
    PullRequest, PullResult, Role,
};

/// Blocks to pull.
#[derive(Clone, Debug)]
pub struct PullOrder {
    /// Where a prefill worker listens that has these layers and some of the heads.
    pub address: PeerAddress,
    /// Names the transfer on both sides.
    pub key: TransferKey,
    /// What it must be of.
    pub prompt: Prompt,
    /// Index in the prompt of the first block.
    pub first_block: u32,
    /// Own blocks that receive them, without repeats.
    pub targets: Vec<u32>,
    /// Ranks of this engine that the worker there hears of: with as many heads on both sides, one.
    pub readers: u32,
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
    /// Pulls whose blocks were taken in one exchange.
    pub takes: u64,
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
    net: Net<Exchange>,
    results: Arc<Results>,
    takes_running: Arc<AtomicUsize>,
    options: WorkerOptions,
    block_count: u32,
    last_job: Mutex<u64>,
    /// Only with a cache on a device.
    device: Option<(Arc<DeviceCache>, Marks)>,
}

impl P2pWorker {
    /// Starts its threads, and listens if it may offer.
    ///
    /// With a cache on a device, [`progress_after`](Self::progress_after) and [`pull_after`](Self::pull_after) take the
    /// place of [`progress`](Self::progress) and [`pull`](Self::pull), which are refused.
    pub fn open(
        cache: impl Into<LocalCache>,
        namespace: NamespaceId,
        options: WorkerOptions,
    ) -> Result<Self> {
        let cache = cache.into();
        options.check()?;
        let failed = |source| Error::Io {
            context: "asking the system for random bytes",
            source,
        };
        RemoteCache::of(cache.map()).map_err(|error| Error::InvalidArgument {
            argument: "cache",
            found: error.to_string(),
            allowed: "a layout that peers accept".to_owned(),
        })?;
        check_shape(cache.map(), &options)?;
        let table = Arc::new(EpochTable::new(options.holds));
        // Like the holder's own list.
        (0..options.holds).for_each(|slot| table.set(slot, 1));
        let token = ProbeToken::new().map_err(failed)?;
        // Only memory of the host is read.
        let is_posted = options.can_offer && matches!(cache, LocalCache::Host(_));
        let board = OfferBoard::new(if is_posted {
            options.holds.min(BOARD_ENTRIES_MAX)
        } else {
            0
        });
        let own_hello = Hello {
            channel: Channel::Control,
            namespace: *namespace.as_bytes(),
            facts: options.facts.clone(),
            block_tokens: options.block_tokens,
            cache: None,
            probe: None,
            device: None,
            nccl: match &cache {
                LocalCache::Device(_) if options.lane.allows(LaneChoice::Nccl) => nccl_version(),
                _ => None,
            },
        };
        let shared = match &cache {
            LocalCache::Device(cache) if options.can_offer && options.lane.allows(LaneChoice::Cuda) => {
                share(cache, token.bytes())
            }
            _ => None,
        };
        let accept_hello = Hello {
            cache: Some(CacheLayout {
                shape: options.shape.clone(),
                ..CacheLayout::from(cache.map())
            }),
            // Who does not know where memory is cannot read it.
            probe: options.lane.allows(LaneChoice::Shm).then(|| Probe {
                pid: std::process::id(),
                address: token.address(),
                token: token.bytes(),
                epochs_address: table.address(),
                slot_count: table.slot_count(),
                board_address: board.address(),
                board_entries: board.entry_count(),
            }),
            device: shared
                .as_ref()
                .map(|shared| DeviceMemory::new(shared.offer(), host_id())),
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
        let device = match &cache {
            LocalCache::Device(cache) => Some(Arc::clone(cache)),
            LocalCache::Host(_) => None,
        };
        let exchange = Exchange::new(
            (cache, shared),
            own_hello,
            (table, token, board),
            &options,
            copies,
            Arc::clone(&results),
        );
        let listen = options
            .can_offer
            .then(|| SocketAddr::new(options.host, options.port));
        let takes_running = Arc::clone(exchange.takes_running());
        let net_config = config.clone();
        let net = Net::start(config, listen, exchange)?;
        if options.can_pull {
            // The threads end when the net, and with it the pool, is dropped.
            let shared = Arc::downgrade(net.shared());
            let opening = shared.clone();
            let copied = move |done| {
                if let Some(shared) = shared.upgrade() {
                    shared.with(|core, _| core.machine.copied(&done));
                }
            };
            let opened = move |connection, line: TakeLine| {
                if let Some(shared) = opening.upgrade() {
                    shared.with(|core, _| match core.watch_data(connection, line.socket()) {
                        Ok(()) => core.machine.line_opened(connection, line),
                        Err(error) => tracing::warn!(%error, "a data connection cannot be watched"),
                    });
                }
            };
            queue.start(options.copy_threads, &Arc::new(net_config), copied, opened)?;
        }
        let device = match device {
            Some(cache) => Some((cache, marks(net.shared())?)),
            None => None,
        };
        Ok(Self {
            device,
            net,
            results,
            takes_running,
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
        self.net
            .shared()
            .with(|core, now| core.machine.offer(now, offer))
            .ok_or(Error::Role("offer"))
    }

    /// Appends blocks that were allocated for later chunks. An unknown hold is ignored.
    pub fn extend(&self, hold: &str, blocks: &[u32]) -> Result<()> {
        self.check_blocks(blocks)?;
        self.with_holder(|holder, _| holder.extend(hold, blocks))
    }

    /// Says how far the computation of each hold is. An unknown one is ignored.
    pub fn progress(&self, progressed: &[(&str, Progress)]) -> Result<()> {
        self.check_on_host()?;
        self.with_holder(|holder, _| {
            for &(hold, progress) in progressed {
                holder.progress(hold, progress);
            }
        })
    }

    /// As [`progress`](Self::progress) of each, once what is on `stream` now has been done. Does not wait.
    pub fn progress_after(&self, progressed: &[(&str, Progress)], stream: StreamHandle) -> Result<()> {
        let Some((cache, marks)) = &self.device else {
            return self.progress(progressed);
        };
        let offered = self.net.shared().with(|core, _| {
            let deeds = progressed.iter().filter_map(|&(hold, progress)| {
                let offer = core.machine.offer_of(hold)?;
                let hold = hold.into();
                Some(Deed::Progress {
                    hold,
                    offer,
                    progress,
                })
            });
            deeds.collect::<Vec<Deed>>()
        });
        if offered.is_empty() {
            return Ok(());
        }
        // One point in the stream for all of them.
        let mark = mark(cache, stream)?;
        let pushed = offered.into_iter().map(|deed| marks.push(mark.clone(), deed));
        if pushed.filter(|is_pushed| !is_pushed).count() > 0 {
            tracing::warn!("the device is far behind, so decode servers are not told what is computed");
        }
        Ok(())
    }

    /// The request has ended, and the engine keeps its blocks until [`ended_holds`](Self::ended_holds) names it.
    pub fn finish(&self, hold: &Arc<str>) -> Result<()> {
        self.with_holder(|holder, now| holder.finish(now, hold))
    }

    /// The engine needs the blocks: others may write them as soon as this returns, and no end of the hold is told any more.
    /// An offer may follow. False: the hold is unknown.
    pub fn revoke(&self, hold: &str) -> Result<bool> {
        let is_known = self.net.shared().with(|core, now| core.machine.revoke(now, hold));
        let is_known = is_known.ok_or(Error::Role("offer"))?;
        self.results.forget_hold(hold);
        Ok(is_known)
    }

    /// Nothing will be offered under this key, so nobody shall wait for it.
    pub fn give_up(&self, key: &TransferKey) -> Result<()> {
        self.with_holder(|holder, now| holder.give_up(now, key))
    }

    /// Finished requests whose blocks are the engine's own again; each once.
    pub fn ended_holds(&self) -> Vec<(Arc<str>, EndReason)> {
        self.results.take_holds()
    }

    // ---- decode

    /// Begins a pull.
    pub fn pull(&self, order: PullOrder) -> Result<u64> {
        self.check_on_host()?;
        self.start_pull(order, None)
    }

    /// As [`pull`](Self::pull), once what is on `stream` now has been done: a step that runs may still write the blocks.
    /// Does not wait.
    pub fn pull_after(&self, order: PullOrder, stream: StreamHandle) -> Result<u64> {
        let mark = match &self.device {
            Some((cache, _)) => Some(mark(cache, stream)?),
            None => None,
        };
        self.start_pull(order, mark)
    }

    fn start_pull(&self, order: PullOrder, after: Option<Mark>) -> Result<u64> {
        if !self.options.can_pull {
            return Err(Error::Role("pull"));
        }
        self.check_targets(&order)?;
        let job = {
            let mut last = self.last_job.lock().unwrap_or_else(PoisonError::into_inner);
            *last += 1;
            *last
        };
        self.results.open(job);
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
            let deadline = now + order.timeout;
            match (after, &self.device) {
                (Some(mark), Some((_, marks))) => {
                    core.machine.waiting.insert(job);
                    if !marks.push(mark, Deed::Pull { job, order, deadline }) {
                        core.machine.waiting.remove(&job);
                        core.machine.end(job, PullResult::Busy);
                    }
                }
                _ => begin_pull(shared, core, now, job, order, deadline),
            }
        });
        Ok(job)
    }

    /// Tells prefill that this rank, one of `readers`, has everything itself. Best effort.
    pub fn release(&self, address: &PeerAddress, key: TransferKey, prompt: Prompt, readers: u32) {
        if !self.options.can_pull || !self.options.peer.allows(address.host()) {
            return;
        }
        let shared = self.net.shared();
        shared.with(|core, now| {
            if let Some(connection) = shared.connection(core, now, address) {
                core.machine.puller.release(connection, key, prompt, readers);
            }
        });
    }

    /// Asks for the end of a pull; it still is delivered. An unknown job is ignored.
    pub fn cancel(&self, job: u64) {
        self.net.shared().with(|core, _| {
            if core.machine.waiting.remove(&job) {
                core.machine.end(job, PullResult::Cancelled);
            } else {
                core.machine.puller.cancel(job);
            }
        });
    }

    /// Pulls that have ended, each once. Two atomic loads when none runs.
    pub fn poll(&self) -> Vec<Ended> {
        if self.takes_running.load(Ordering::Relaxed) > 0 {
            // The thread of the connections would see it too, somewhat later.
            self.net.shared().with(|core, _| core.machine.progress_takes());
        }
        self.results.take_pulls()
    }

    /// Waits for the end of one pull, at most until `deadline`.
    pub fn wait(&self, job: u64, deadline: Instant) -> Result<Option<PullResult>> {
        self.results.wait(job, deadline)
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

    /// Without a stream, KV of a step that has not run yet would be taken for computed.
    fn check_on_host(&self) -> Result<()> {
        match self.device {
            None => Ok(()),
            Some(_) => Err(Error::InvalidArgument {
                argument: "stream",
                found: "none".to_owned(),
                allowed: "the compute stream, since the cache is on a CUDA device".to_owned(),
            }),
        }
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

/// What is told to peers of the blocks must be true.
fn check_shape(map: &BlockMap, options: &WorkerOptions) -> Result<()> {
    let Some(shape) = &options.shape else {
        return Ok(());
    };
    let runs = map.regions().iter().map(|region| region.runs.as_slice());
    let checked = shape.check(runs).and_then(|()| {
        let is_whole = shape.block_tokens == options.block_tokens;
        is_whole
            .then_some(())
            .ok_or_else(|| format!("blocks of {} tokens", shape.block_tokens))
    });
    checked.map_err(|found| Error::InvalidArgument {
        argument: "shape",
        found,
        allowed: format!(
            "the shape of the cache, whose blocks have {} tokens",
            options.block_tokens
        ),
    })
}

/// The version of NCCL, if there is one that can be used.
fn nccl_version() -> Option<u32> {
    match NcclInfo::find() {
        Ok(nccl) => {
            tracing::info!(version = %nccl.version, library = nccl.library, "NCCL is there");
            Some(nccl.version.code())
        }
        // Who needs it is told again.
        Err(reason) => {
            tracing::info!(%reason, "lane nccl is not possible here");
            None
        }
    }
}

/// Most entries of the board of posted prompts, of two KiB each. A key that shares its place with a later one is asked for.
const BOARD_ENTRIES_MAX: u32 = 512;
/// Longest wait for a buffer while the cache is shared.
const SHARE_MAX: Duration = Duration::from_secs(5);

/// Lets peers map the cache, if the driver can.
fn share(cache: &DeviceCache, token: [u8; 16]) -> Option<SharedCache> {
    let patience = Patience {
        deadline: Instant::now() + SHARE_MAX,
        cancelled: &|| false,
    };
    match cache.share(token, &patience) {
        Ok(shared) => Some(shared),
        Err(reason) => {
            tracing::warn!(%reason, "lane cuda is not offered: the KV cache cannot be shared with other processes");
            None
        }
    }
}

fn mark(cache: &DeviceCache, stream: StreamHandle) -> Result<Mark> {
    cache.mark(stream).map_err(Error::Device)
}

/// Starts the thread that waits for the compute stream. It ends when the worker is dropped.
fn marks(shared: &Arc<Shared<Exchange>>) -> Result<Marks> {
    let shared = Arc::downgrade(shared);
    let mut is_lost = false;
    Marks::start(move |deed, waited| {
        let Some(shared) = shared.upgrade() else { return };
        if let Waited::Lost(error) = &waited
            && !std::mem::replace(&mut is_lost, true)
        {
            tracing::error!(%error, "the CUDA device is lost for KV transfer");
        }
        shared.with(|core, now| match (deed, waited) {
            (
                Deed::Progress {
                    hold,
                    offer,
                    progress,
                },
                Waited::Reached,
            ) => {
                core.machine.late_progress(&hold, offer, progress);
            }
            // Nobody knows what is computed, so nobody is told.
            (Deed::Progress { .. }, _) => {}
            (Deed::Pull { job, order, deadline }, waited) => {
                if !core.machine.waiting.remove(&job) {
                    return; // it was cancelled
                }
                match waited {
                    Waited::Reached => begin_pull(&shared, core, now, job, order, deadline),
                    Waited::TimedOut => core.machine.end(job, PullResult::TimedOut),
                    Waited::Lost(_) => core.machine.end(job, PullResult::Failed),
                }
            }
        });
    })
}

/// Asks the peer for the blocks of a pull.
fn begin_pull(
    shared: &Arc<Shared<Exchange>>,
    core: &mut Core<Exchange>,
    now: Instant,
    job: u64,
    order: PullOrder,
    deadline: Instant,
) {
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
        readers: order.readers,
        deadline,
    };
    match core.machine.posted(connection, &request) {
        None if core.machine.may_take(now, connection, &request) => {
            core.machine.puller.take(connection, request)
        }
        posted => core.machine.puller.pull(connection, request, posted),
    }
}

impl Drop for P2pWorker {
    fn drop(&mut self) {
        self.close();
    }
}
