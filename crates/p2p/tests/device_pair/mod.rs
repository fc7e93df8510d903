//! A prefill and a decode worker whose caches are on a device of the stand-in, in two processes or one.

use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::{BlockMap, Device, NamespaceId, PagedMemory, TensorView};
use kvlane_cuda::{DeviceCache, DeviceTensors, StreamHandle};
use kvlane_p2p::proto::{Offer, Progress, PullResult};
use kvlane_p2p::{LaneChoice, P2pWorker, PeerAddress, Prompt, PullOrder, TransferKey, WorkerOptions};

const LAYERS: usize = 3;
pub(crate) const BLOCKS: u32 = 12;
const LAYER_BYTES: usize = 3000;
const BLOCK_TOKENS: u32 = 16;
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How long the kernels take: long against everything that does not wait for them.
pub(crate) const KERNEL: Duration = Duration::from_millis(150);
/// The variable that makes this program a prefill server: milliseconds that its kernel takes.
const CHILD_VARIABLE: &str = "KVLANE_P2P_TEST_PREFILL";
/// A kernel that still runs when decode has connected and asked.
pub(crate) const LONG_KERNEL: Duration = Duration::from_millis(1500);
/// The variable that gives it NCCL's stand-in.
pub(crate) const NCCL_VARIABLE: &str = "KVLANE_P2P_TEST_NCCL";

pub(crate) struct Gpu {
    cache: Arc<DeviceCache>,
    addresses: Vec<u64>,
    stream: u64,
}

impl Gpu {
    pub(crate) fn new() -> Self {
        let stand_in = kvlane_cuda_stand_in::load();
        let bytes = BLOCKS as usize * LAYER_BYTES;
        let addresses: Vec<u64> = (0..LAYERS).map(|_| stand_in.allocate(bytes)).collect();
        let views = addresses.iter().enumerate().map(|(layer, &address)| TensorView {
            name: format!("layer.{layer}"),
            address,
            device: Device::Cuda(0),
            element_bytes: 1,
            shape: vec![u64::from(BLOCKS), LAYER_BYTES as u64],
            strides: vec![LAYER_BYTES as i64, 1],
        });
        let map = BlockMap::from_tensors(views, BLOCKS, Some(0)).expect("accepted");
        // SAFETY: as many bytes as the tensors have were allocated on that device, for as long as the process lives.
        let tensors = unsafe { DeviceTensors::from_map(map, Arc::new(())) };
        Self {
            cache: Arc::new(DeviceCache::open(tensors, 4).expect("accepted")),
            addresses,
            stream: stand_in.compute_stream(),
        }
    }

    pub(crate) fn stream(&self) -> StreamHandle {
        // SAFETY: a stream of the stand-in, which lives as long as the process.
        unsafe { StreamHandle::from_raw(self.stream) }
    }

    /// A step that takes a while and then writes all blocks.
    pub(crate) fn compute(&self, seed: u8) {
        self.compute_for(seed, KERNEL);
    }

    pub(crate) fn compute_for(&self, seed: u8, kernel: Duration) {
        for (layer, &address) in self.addresses.iter().enumerate() {
            let duration = if layer == 0 { kernel } else { Duration::ZERO };
            let bytes: Vec<u8> = (0..BLOCKS)
                .flat_map(|block| content(seed, layer, block))
                .collect();
            kvlane_cuda_stand_in::load().write(self.stream, address, &bytes, duration);
        }
    }

    pub(crate) fn has(&self, block: u32, seed: u8, source: u32) -> bool {
        let mut bytes = vec![0; LAYER_BYTES];
        (0..LAYERS).all(|layer| {
            self.cache.read_layer(layer, block, &mut bytes);
            bytes == content(seed, layer, source)
        })
    }
}

fn content(seed: u8, layer: usize, block: u32) -> Vec<u8> {
    let first = usize::from(seed) * 89 + layer * 31 + block as usize * 7;
    (0..LAYER_BYTES)
        .map(|index| (first + index * 13 + index / 251) as u8)
        .collect()
}

pub(crate) fn key() -> TransferKey {
    TransferKey::new("request").expect("accepted")
}

pub(crate) fn prompt(blocks: u32) -> Prompt {
    Prompt {
        tokens: blocks * BLOCK_TOKENS,
        digest: [5; 32],
    }
}

pub(crate) fn offer(blocks: &[u32]) -> Offer {
    Offer {
        hold: "hold".into(),
        key: key(),
        prompt: prompt(blocks.len() as u32),
        blocks: blocks.to_vec(),
    }
}

pub(crate) fn done(blocks: u32) -> Progress {
    Progress {
        done_blocks: blocks,
        wave_blocks: blocks,
        wave_layers: 0,
    }
}

pub(crate) fn prefill(gpu: &Gpu) -> P2pWorker {
    prefill_with(gpu, LaneChoice::Auto)
}

pub(crate) fn prefill_with(gpu: &Gpu, lane: LaneChoice) -> P2pWorker {
    let mut options = WorkerOptions::new("prefill", BLOCK_TOKENS);
    options.host = IpAddr::from([127, 0, 0, 1]);
    options.can_pull = false;
    options.lane = lane;
    P2pWorker::open(Arc::clone(&gpu.cache), NamespaceId([7; 32]), options).expect("accepted")
}

pub(crate) fn decode(gpu: &Gpu, lane: LaneChoice) -> P2pWorker {
    let mut options = WorkerOptions::new("decode", BLOCK_TOKENS);
    options.can_offer = false;
    options.lane = lane;
    P2pWorker::open(Arc::clone(&gpu.cache), NamespaceId([7; 32]), options).expect("accepted")
}

pub(crate) fn order(port: u16, targets: &[u32]) -> PullOrder {
    PullOrder {
        address: PeerAddress::new("127.0.0.1", port).expect("accepted"),
        key: key(),
        prompt: prompt(targets.len() as u32),
        first_block: 0,
        targets: targets.to_vec(),
        readers: 1,
        timeout: PATIENCE,
    }
}

pub(crate) fn wait(decode: &P2pWorker, job: u64) -> PullResult {
    let ended = decode.wait(job, Instant::now() + 2 * PATIENCE).expect("accepted");
    ended.expect("the pull ends")
}

pub(crate) const SOURCES: [u32; 4] = [3, 9, 4, 10];
pub(crate) const TARGETS: [u32; 4] = [7, 1, 2, 5];

/// Not a test of its own: a prefill server in a process of its own, until its standard input ends.
#[test]
fn the_prefill_server_of_a_child_process() {
    let Ok(kernel_ms) = std::env::var(CHILD_VARIABLE) else {
        return;
    };
    if std::env::var_os(NCCL_VARIABLE).is_some() {
        kvlane_cuda_stand_in::load();
        kvlane_nccl_stand_in::load();
    }
    let gpu = Gpu::new();
    let prefill = prefill(&gpu);
    assert!(prefill.offer(offer(&SOURCES)).expect("accepted"));
    gpu.compute_for(1, Duration::from_millis(kernel_ms.parse().expect("a number")));
    // Before any of it has been computed.
    prefill
        .progress_after(&[("hold", done(4))], gpu.stream())
        .expect("accepted");
    println!("\nport: {}", prefill.port().expect("it listens"));
    let _ = std::io::stdin().lines().count();
    let violations = kvlane_cuda_stand_in::load().violations();
    assert!(violations.is_empty(), "{violations:?}");
}

pub(crate) struct Prefill {
    pub(crate) child: Child,
    pub(crate) port: u16,
}

impl Prefill {
    pub(crate) fn start(settings: &[(&str, &str)]) -> Self {
        Self::start_with(KERNEL, settings)
    }

    pub(crate) fn start_with(kernel: Duration, settings: &[(&str, &str)]) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("a path"))
            .args([
                "--exact",
                "device_pair::the_prefill_server_of_a_child_process",
                "--nocapture",
            ])
            .env(CHILD_VARIABLE, kernel.as_millis().to_string())
            .envs(settings.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let mut lines = output.lines().map(|line| line.expect("readable"));
        let port = lines.find_map(|line| line.strip_prefix("port: ").map(str::to_owned));
        let port = port.expect("it says its port").parse().expect("a number");
        // Whatever else it prints must not stop it.
        std::thread::spawn(move || lines.count());
        Self { child, port }
    }

    pub(crate) fn end(mut self) {
        let mut input = self.child.stdin.take().expect("piped");
        let _ = input.flush();
        drop(input);
        assert!(self.child.wait().expect("it ends").success());
    }
}

/// Pulls all blocks of a prefill server while decode's own stream still writes them; the lane that was used.
pub(crate) fn pull(port: u16, lane: LaneChoice) -> (PullResult, Vec<&'static str>) {
    let gpu = Gpu::new();
    let decode = decode(&gpu, lane);
    // A step that was given to the stream before the blocks were freed.
    gpu.compute(2);
    let job = decode
        .pull_after(order(port, &TARGETS), gpu.stream())
        .expect("accepted");
    let result = wait(&decode, job);
    if result == PullResult::Done {
        for block in 0..BLOCKS {
            let place = TARGETS.iter().position(|&target| target == block);
            let (seed, source) = place.map_or((2, block), |place| (1, SOURCES[place]));
            assert!(gpu.has(block, seed, source), "{lane:?}: block {block}");
        }
    }
    let stats = decode.stats();
    (result, stats.pulled_bytes.keys().copied().collect())
}
