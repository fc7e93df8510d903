//! A peer that holds blocks: in this process, or in a child that is told what to do line by line.

#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kvlane_core::{Device, PagedMemory, Run};
use kvlane_cuda::{CacheOffer, DeviceCache, DeviceTensors, SharedAllocation, SharedCache};
use kvlane_fs::HostCache;
use kvlane_p2p::lanes::{
    CudaLane, EpochTable, Lane, LaneError, LocalCache, NcclLane, Pairing, PeerMemory, ProbeToken,
    RemoteCache, RemoteRegion, ShmLane, TcpLane, serve,
};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::fixture::{Form, cache, map};

/// The variable that makes a program a holder: form, layers, blocks, bytes of a block in a layer, whether on a device.
const CHILD_VARIABLE: &str = "KVLANE_P2P_TEST_HOLDER";
pub(crate) const SLOTS: u32 = 64;

/// The layout of a cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) form: Form,
    pub(crate) layers: usize,
    pub(crate) blocks: u32,
    pub(crate) layer_bytes: usize,
}

impl Layout {
    pub(crate) fn cache(self) -> Arc<HostCache> {
        cache(self.form, self.layers, self.blocks, self.layer_bytes)
    }

    /// A cache in which every block of every layer has bytes of its own.
    pub(crate) fn filled(self, seed: usize) -> Arc<HostCache> {
        let cache = self.cache();
        self.fill(&*cache, seed);
        cache
    }

    fn fill(self, cache: &impl PagedMemory, seed: usize) {
        for layer in 0..self.layers {
            for block in 0..self.blocks {
                cache.write_layer(layer, block, &content(seed, layer, block, self.layer_bytes));
            }
        }
    }

    /// A cache on the stand-in's device, for lanes with NCCL's stand-in too.
    pub(crate) fn device_cache(self) -> Arc<DeviceCache> {
        let stand_in = kvlane_cuda_stand_in::load();
        kvlane_nccl_stand_in::load();
        let bytes = self.blocks as usize * self.layer_bytes;
        let addresses: Vec<u64> = (0..self.layers).map(|_| stand_in.allocate(bytes)).collect();
        let map = map(
            self.form,
            self.blocks,
            self.layer_bytes,
            &addresses,
            Device::Cuda(0),
        );
        // SAFETY: as many bytes as the tensors have were allocated on that device, for as long as the process lives.
        let tensors = unsafe { DeviceTensors::from_map(map, Arc::new(())) };
        Arc::new(DeviceCache::open(tensors, STAGING_BUFFERS).unwrap())
    }
}

const STAGING_BUFFERS: usize = 4;

/// Of a communicator: no multiple of anything.
pub(crate) const STAGING_BYTES: usize = (3 << 20) + 11;

/// For what a test waits for on a device.
pub(crate) fn patient() -> kvlane_cuda::Patience<'static> {
    kvlane_cuda::Patience {
        deadline: Instant::now() + Duration::from_secs(20),
        cancelled: &|| false,
    }
}

/// Nothing was done on the stand-in that a device would punish.
#[track_caller]
pub(crate) fn check_device(cache: &LocalCache) {
    if let LocalCache::Device(_) = cache {
        assert_eq!(kvlane_cuda_stand_in::load().violations(), Vec::<String>::new());
    }
}

/// The bytes of a block.
pub(crate) fn content(seed: usize, layer: usize, block: u32, len: usize) -> Vec<u8> {
    let first = seed * 101 + layer * 31 + block as usize * 7;
    (0..len)
        .map(|index| (first + index * 13 + index / 251) as u8)
        .collect()
}

/// What a HELLO would say.
#[derive(Debug)]
pub(crate) struct Hello {
    pub(crate) memory: PeerMemory,
    pub(crate) port: u16,
    pub(crate) cache: RemoteCache,
    /// Only of a holder whose cache is on a device.
    pub(crate) offer: Option<CacheOffer>,
}

/// The holder's half of a test.
struct Parts {
    cache: LocalCache,
    shared: Option<SharedCache>,
    epochs: Arc<EpochTable>,
    token: ProbeToken,
    port: u16,
}

impl Parts {
    fn new(layout: Layout, kind: Kind) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (cache, epochs) = (kind.filled(layout, 1), Arc::new(EpochTable::new(SLOTS)));
        let (served, held) = (cache.clone(), Arc::clone(&epochs));
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                let (served, held) = (served.clone(), Arc::clone(&held));
                std::thread::spawn(move || serve_one(socket.unwrap(), &served, &held));
            }
        });
        let token = ProbeToken::new().unwrap();
        let shared = match &cache {
            LocalCache::Device(cache) => Some(cache.share(token.bytes(), &patient()).unwrap()),
            LocalCache::Host(_) => None,
        };
        Parts {
            cache,
            shared,
            epochs,
            token,
            port,
        }
    }

    fn hello(&self) -> Hello {
        Hello {
            memory: PeerMemory {
                pid: std::process::id(),
                token_address: self.token.address(),
                token: self.token.bytes(),
                epochs_address: self.epochs.address(),
                epoch_slots: SLOTS,
                board_address: 0,
                board_entries: 0,
            },
            port: self.port,
            cache: RemoteCache::of(self.cache.map()).unwrap(),
            offer: self.shared.as_ref().map(|shared| shared.offer().clone()),
        }
    }
}

fn serve_one(socket: TcpStream, cache: &LocalCache, epochs: &EpochTable) {
    let is_held = |lease: kvlane_p2p::lanes::Lease| {
        lease.slot < SLOTS && lease.epoch != 0 && epochs.get(lease.slot) == lease.epoch
    };
    // A peer that ends in the middle is what some tests are about.
    let _ = serve(
        socket,
        cache,
        None,
        is_held,
        &AtomicBool::new(false),
        Duration::from_secs(20),
    );
}

/// A peer that holds blocks.
pub(crate) struct Holder {
    pub(crate) hello: Hello,
    place: Place,
}

enum Place {
    Here(Parts),
    Child {
        child: Child,
        input: ChildStdin,
        output: BufReader<ChildStdout>,
    },
}

impl Holder {
    pub(crate) fn here(layout: Layout, kind: Kind) -> Self {
        let parts = Parts::new(layout, kind);
        Holder {
            hello: parts.hello(),
            place: Place::Here(parts),
        }
    }

    /// A child of this program; `arguments` lead it to [`be_a_holder`].
    pub(crate) fn child(layout: Layout, kind: Kind, arguments: &[&str], settings: &[(&str, &str)]) -> Self {
        let variable = format!(
            "{} {} {} {} {}",
            u8::from(layout.form == Form::KvOuter),
            layout.layers,
            layout.blocks,
            layout.layer_bytes,
            u8::from(kind.is_on_device()),
        );
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(arguments)
            .env(CHILD_VARIABLE, variable)
            .envs(settings.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let hello = parse_hello(&answer(&mut output));
        Holder {
            hello,
            place: Place::Child { child, input, output },
        }
    }

    /// Gives a slot an epoch.
    pub(crate) fn set(&mut self, slot: u32, epoch: u64) {
        match &mut self.place {
            Place::Here(parts) => parts.epochs.set(slot, epoch),
            Place::Child { input, output, .. } => {
                writeln!(input, "{slot} {epoch}").unwrap();
                assert_eq!(answer(output).trim(), "set");
            }
        }
    }

    /// Sends a signal to the child, and waits until it has ended or stopped if that is what the signal does.
    pub(crate) fn signal(&mut self, signal: Signal) {
        let Place::Child { child, .. } = &mut self.place else {
            panic!("only a child gets signals");
        };
        kill_process(Pid::from_child(child), signal).unwrap();
        if signal == Signal::KILL {
            child.wait().unwrap();
        } else if signal == Signal::STOP {
            let stopped = waitpid(Some(Pid::from_child(child)), WaitOptions::UNTRACED).unwrap();
            assert!(stopped.unwrap().1.stopped());
        }
    }

    pub(crate) fn connect(&self) -> TcpStream {
        TcpStream::connect((Ipv4Addr::LOCALHOST, self.hello.port)).unwrap()
    }

    /// A lane to this holder.
    pub(crate) fn lane(&self, kind: Kind, local: impl Into<LocalCache>) -> Box<dyn Lane> {
        let local = local.into();
        let pairing = Arc::new(Pairing::new(local.clone(), self.hello.cache.clone()).unwrap());
        let tcp = || TcpLane::new(self.connect(), Arc::clone(&pairing)).unwrap();
        match (kind, local) {
            (Kind::Shm, _) => Box::new(ShmLane::open(self.hello.memory, pairing).unwrap()),
            (Kind::Nccl, local) => {
                Box::new(self.nccl_lane(&local, STAGING_BYTES, patient().deadline).unwrap())
            }
            (Kind::Cuda, LocalCache::Device(local)) => {
                let offer = self.hello.offer.as_ref().unwrap();
                let peer = local.map_peer(offer, &patient()).unwrap();
                Box::new(CudaLane::new(peer, Arc::clone(&pairing), Box::new(tcp())).unwrap())
            }
            _ => Box::new(tcp()),
        }
    }
}

impl Holder {
    /// A lane to this holder over a communicator, or why there is none.
    pub(crate) fn nccl_lane(
        &self,
        local: &LocalCache,
        staging_bytes: usize,
        deadline: Instant,
    ) -> Result<NcclLane, LaneError> {
        let pairing = Arc::new(Pairing::new(local, self.hello.cache.clone()).unwrap());
        let line = TcpLane::new(self.connect(), pairing).unwrap();
        NcclLane::open(line, staging_bytes, deadline, &AtomicBool::new(false))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Place::Child { child, .. } = &mut self.place {
            // Fails only for one that has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Which lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Shm,
    Tcp,
    /// Between caches on the stand-in's device.
    Cuda,
    /// Between caches on the stand-in's device, over a communicator of NCCL's stand-in.
    Nccl,
    /// Between caches on the stand-in's device, over a connection.
    TcpDevice,
}

impl Kind {
    pub(crate) fn is_on_device(self) -> bool {
        matches!(self, Kind::Cuda | Kind::Nccl | Kind::TcpDevice)
    }

    /// A cache where the lane needs it.
    pub(crate) fn cache(self, layout: Layout) -> LocalCache {
        if self.is_on_device() {
            layout.device_cache().into()
        } else {
            layout.cache().into()
        }
    }

    /// As [`Layout::filled`].
    pub(crate) fn filled(self, layout: Layout, seed: usize) -> LocalCache {
        let cache = self.cache(layout);
        layout.fill(&cache, seed);
        cache
    }
}

/// In a child of [`Holder::child`]: prepares its cache and holds blocks until standard input ends, and returns then. Elsewhere:
/// returns at once.
pub(crate) fn be_a_holder(prepare: impl FnOnce(&HostCache)) {
    let Ok(variable) = std::env::var(CHILD_VARIABLE) else {
        return;
    };
    let numbers: Vec<usize> = variable
        .split(' ')
        .map(|number| number.parse().unwrap())
        .collect();
    let layout = Layout {
        form: if numbers[0] == 1 {
            Form::KvOuter
        } else {
            Form::BlockMajor
        },
        layers: numbers[1],
        blocks: numbers[2] as u32,
        layer_bytes: numbers[3],
    };
    let kind = if numbers[4] == 1 { Kind::Cuda } else { Kind::Shm };
    let parts = Parts::new(layout, kind);
    if let LocalCache::Host(cache) = &parts.cache {
        prepare(cache);
    }
    say(&print_hello(&parts.hello()));
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (slot, epoch) = line.split_once(' ').unwrap();
        parts.epochs.set(slot.parse().unwrap(), epoch.parse().unwrap());
        check_device(&parts.cache);
        say("set");
    }
}

/// Marks a line among those that the test program prints.
const MARK: &str = "holder: ";

fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "\n{MARK}{line}").unwrap();
    output.flush().unwrap();
}

fn answer(output: &mut impl BufRead) -> String {
    let mut line = String::new();
    loop {
        line.clear();
        assert!(output.read_line(&mut line).unwrap() > 0, "the child has ended");
        if let Some(answer) = line.strip_prefix(MARK) {
            return answer.to_owned();
        }
    }
}

fn print_hello(hello: &Hello) -> String {
    let memory = &hello.memory;
    let token = u128::from_le_bytes(memory.token);
    let mut text = format!(
        "{} {} {token} {} {} {} {}",
        memory.pid,
        memory.token_address,
        memory.epochs_address,
        memory.epoch_slots,
        hello.port,
        hello.cache.block_count()
    );
    for region in hello.cache.regions() {
        text += &format!(
            ",{} {} {}",
            region.address, region.block_stride_bytes, region.extent_bytes
        );
        for run in &region.runs {
            text += &format!(" {} {}", run.offset_bytes, run.len_bytes);
        }
    }
    if let Some(offer) = &hello.offer {
        text += &format!("|{} {}", offer.token_address, u128::from_le_bytes(offer.token));
        for one in &offer.allocations {
            text += &format!(",{} {}", one.address, one.len_bytes);
            for part in one.handle.as_chunks::<16>().0 {
                text += &format!(" {}", u128::from_le_bytes(*part));
            }
        }
    }
    text
}

fn parse_offer(text: &str) -> CacheOffer {
    let mut parts = text.split(',').map(numbers);
    let head = parts.next().unwrap();
    let allocations = parts.map(|numbers| {
        let mut handle = [0; 64];
        for (place, part) in handle.as_chunks_mut::<16>().0.iter_mut().zip(&numbers[2..]) {
            *place = part.to_le_bytes();
        }
        SharedAllocation {
            handle,
            address: numbers[0] as u64,
            len_bytes: numbers[1] as u64,
        }
    });
    CacheOffer {
        allocations: allocations.collect(),
        token_address: head[0] as u64,
        token: head[1].to_le_bytes(),
    }
}

fn numbers(part: &str) -> Vec<u128> {
    part.split(' ').map(|number| number.parse().unwrap()).collect()
}

fn parse_hello(line: &str) -> Hello {
    let (cache, offer) = match line.trim().split_once('|') {
        Some((cache, offer)) => (cache, Some(parse_offer(offer))),
        None => (line.trim(), None),
    };
    let mut parts = cache.split(',').map(numbers);
    let head = parts.next().unwrap();
    let regions = parts.map(|numbers| RemoteRegion {
        address: numbers[0] as u64,
        block_stride_bytes: numbers[1] as u64,
        extent_bytes: numbers[2] as u64,
        runs: numbers[3..]
            .chunks_exact(2)
            .map(|run| Run {
                offset_bytes: run[0] as usize,
                len_bytes: run[1] as usize,
            })
            .collect(),
    });
    Hello {
        memory: PeerMemory {
            pid: head[0] as u32,
            token_address: head[1] as u64,
            token: head[2].to_le_bytes(),
            epochs_address: head[3] as u64,
            epoch_slots: head[4] as u32,
            board_address: 0,
            board_entries: 0,
        },
        port: head[5] as u16,
        cache: RemoteCache::new(regions.collect(), head[6] as u32).unwrap(),
        offer,
    }
}
