//! Workers whose caches are on a device; there is none, the driver is a stand-in whose streams are late. The risks: blocks
//! are read before the compute stream has written them, or written while it still does; a lane that is not possible.

use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::{BlockMap, Device, NamespaceId, PagedMemory, TensorView};
use kvlane_cuda::{DeviceCache, DeviceTensors, StreamHandle};
use kvlane_p2p::proto::{DenyReason, Offer, Progress, PullResult};
use kvlane_p2p::{LaneChoice, P2pWorker, PeerAddress, Prompt, PullOrder, TransferKey, WorkerOptions};

const LAYERS: usize = 3;
const BLOCKS: u32 = 12;
const LAYER_BYTES: usize = 3000;
const BLOCK_TOKENS: u32 = 16;
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the kernels take: long against everything that does not wait for them.
const KERNEL: Duration = Duration::from_millis(150);
/// The variable that makes this program a prefill server: milliseconds that its kernel takes.
const CHILD_VARIABLE: &str = "KVLANE_P2P_TEST_PREFILL";
/// A kernel that still runs when decode has connected and asked.
const LONG_KERNEL: Duration = Duration::from_millis(1500);

struct Gpu {
    cache: Arc<DeviceCache>,
    addresses: Vec<u64>,
    stream: u64,
}

impl Gpu {
    fn new() -> Self {
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

    fn stream(&self) -> StreamHandle {
        // SAFETY: a stream of the stand-in, which lives as long as the process.
        unsafe { StreamHandle::from_raw(self.stream) }
    }

    /// A step that takes a while and then writes all blocks.
    fn compute(&self, seed: u8) {
        self.compute_for(seed, KERNEL);
    }

    fn compute_for(&self, seed: u8, kernel: Duration) {
        for (layer, &address) in self.addresses.iter().enumerate() {
            let duration = if layer == 0 { kernel } else { Duration::ZERO };
            let bytes: Vec<u8> = (0..BLOCKS)
                .flat_map(|block| content(seed, layer, block))
                .collect();
            kvlane_cuda_stand_in::load().write(self.stream, address, &bytes, duration);
        }
    }

    fn has(&self, block: u32, seed: u8, source: u32) -> bool {
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

fn key() -> TransferKey {
    TransferKey::new("request").expect("accepted")
}

fn prompt(blocks: u32) -> Prompt {
    Prompt {
        tokens: blocks * BLOCK_TOKENS,
        digest: [5; 32],
    }
}

fn offer(blocks: &[u32]) -> Offer {
    Offer {
        hold: "hold".into(),
        key: key(),
        prompt: prompt(blocks.len() as u32),
        blocks: blocks.to_vec(),
    }
}

fn done(blocks: u32) -> Progress {
    Progress {
        done_blocks: blocks,
        wave_blocks: blocks,
        wave_layers: 0,
    }
}

fn prefill(gpu: &Gpu) -> P2pWorker {
    prefill_with(gpu, LaneChoice::Auto)
}

fn prefill_with(gpu: &Gpu, lane: LaneChoice) -> P2pWorker {
    let mut options = WorkerOptions::new("prefill", BLOCK_TOKENS);
    options.host = IpAddr::from([127, 0, 0, 1]);
    options.can_pull = false;
    options.lane = lane;
    P2pWorker::open(Arc::clone(&gpu.cache), NamespaceId([7; 32]), options).expect("accepted")
}

fn decode(gpu: &Gpu, lane: LaneChoice) -> P2pWorker {
    let mut options = WorkerOptions::new("decode", BLOCK_TOKENS);
    options.can_offer = false;
    options.lane = lane;
    P2pWorker::open(Arc::clone(&gpu.cache), NamespaceId([7; 32]), options).expect("accepted")
}

fn order(port: u16, targets: &[u32]) -> PullOrder {
    PullOrder {
        address: PeerAddress::new("127.0.0.1", port).expect("accepted"),
        key: key(),
        prompt: prompt(targets.len() as u32),
        first_block: 0,
        targets: targets.to_vec(),
        timeout: PATIENCE,
    }
}

fn wait(decode: &P2pWorker, job: u64) -> PullResult {
    let ended = decode.wait(job, Instant::now() + 2 * PATIENCE).expect("accepted");
    ended.expect("the pull ends")
}

const SOURCES: [u32; 4] = [3, 9, 4, 10];
const TARGETS: [u32; 4] = [7, 1, 2, 5];

/// Not a test of its own: a prefill server in a process of its own, until its standard input ends.
#[test]
fn the_prefill_server_of_a_child_process() {
    let Ok(kernel_ms) = std::env::var(CHILD_VARIABLE) else {
        return;
    };
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

struct Prefill {
    child: Child,
    port: u16,
}

impl Prefill {
    fn start(settings: &[(&str, &str)]) -> Self {
        Self::start_with(KERNEL, settings)
    }

    fn start_with(kernel: Duration, settings: &[(&str, &str)]) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("a path"))
            .args(["--exact", "the_prefill_server_of_a_child_process", "--nocapture"])
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

    fn end(mut self) {
        let mut input = self.child.stdin.take().expect("piped");
        let _ = input.flush();
        drop(input);
        assert!(self.child.wait().expect("it ends").success());
    }
}

/// Pulls all blocks of a prefill server while decode's own stream still writes them; the lane that was used.
fn pull(port: u16, lane: LaneChoice) -> (PullResult, Vec<&'static str>) {
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

#[test]
fn a_prompt_moves_after_the_compute_streams_of_both_sides_and_over_the_lane_that_was_asked_for() {
    for (lane, used) in [
        (LaneChoice::Auto, "cuda"),
        (LaneChoice::Cuda, "cuda"),
        (LaneChoice::Tcp, "tcp"),
    ] {
        let prefill = Prefill::start(&[]);
        assert_eq!(
            pull(prefill.port, lane),
            (PullResult::Done, vec![used]),
            "{lane:?}"
        );
        prefill.end();
    }
    assert_eq!(kvlane_cuda_stand_in::load().violations(), Vec::<String>::new());
}

#[test]
fn blocks_that_prefill_still_computes_are_not_read_however_soon_decode_asks() {
    for (lane, used) in [(LaneChoice::Cuda, "cuda"), (LaneChoice::Tcp, "tcp")] {
        let prefill = Prefill::start_with(LONG_KERNEL, &[]);
        let started = Instant::now();
        let gpu = Gpu::new();
        let decode = decode(&gpu, lane);
        // Nothing is on decode's stream, so it asks at once.
        let job = decode
            .pull_after(order(prefill.port, &TARGETS), gpu.stream())
            .expect("accepted");
        assert_eq!(wait(&decode, job), PullResult::Done, "{lane:?}");
        // The kernel began before the port was known; starting the processes took some of its time.
        assert!(
            started.elapsed() > LONG_KERNEL / 3,
            "{lane:?}: {:?}",
            started.elapsed()
        );
        for (target, source) in TARGETS.into_iter().zip(SOURCES) {
            assert!(gpu.has(target, 1, source), "{lane:?}: block {target}");
        }
        assert!(decode.stats().pulled_bytes.contains_key(used));
        prefill.end();
    }
}

#[test]
fn what_prefill_does_not_allow_is_not_offered() {
    let gpu = Gpu::new();
    let prefill = prefill_with(&gpu, LaneChoice::Tcp);
    assert!(prefill.offer(offer(&SOURCES)).expect("accepted"));
    gpu.compute(1);
    prefill
        .progress_after(&[("hold", done(4))], gpu.stream())
        .expect("accepted");
    let port = prefill.port().expect("it listens");
    let refused = (PullResult::Denied(DenyReason::Namespace), Vec::new());
    assert_eq!(pull(port, LaneChoice::Cuda), refused);
    assert_eq!(pull(port, LaneChoice::Auto), (PullResult::Done, vec!["tcp"]));
}

/// A program of its own, because calls are counted by process.
#[test]
fn the_memory_of_a_prefill_server_that_is_gone_is_let_go_of_by_a_decode_server_that_does_nothing() {
    let test =
        "the_memory_of_a_prefill_server_that_is_gone_is_let_go_of_by_a_decode_server_that_does_nothing";
    let alone = "KVLANE_P2P_TEST_ALONE";
    if std::env::var_os(alone).is_none() {
        let ended = Command::new(std::env::current_exe().expect("a path"))
            .args(["--exact", test, "--nocapture"])
            .env(alone, "1")
            .status();
        assert!(ended.expect("it starts").success());
        return;
    }
    let stand_in = kvlane_cuda_stand_in::load();
    let mut prefill = Prefill::start(&[]);
    let gpu = Gpu::new();
    let decode = decode(&gpu, LaneChoice::Cuda);
    let job = decode
        .pull_after(order(prefill.port, &TARGETS), gpu.stream())
        .expect("accepted");
    assert_eq!(wait(&decode, job), PullResult::Done);
    let opened = stand_in.calls("cuIpcOpenMemHandle_v2");
    assert!(opened > 0);
    assert_eq!(stand_in.calls("cuIpcCloseMemHandle"), 0);
    prefill.child.kill().expect("it runs");
    let _ = prefill.child.wait();
    let deadline = Instant::now() + PATIENCE;
    while stand_in.calls("cuIpcCloseMemHandle") < opened {
        assert!(Instant::now() < deadline, "mapped memory is kept");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(decode);
}

#[test]
fn memory_that_cannot_be_shared_goes_over_tcp_unless_cuda_is_forced() {
    let prefill = Prefill::start(&[("KVLANE_CUDA_STAND_IN_FAIL", "cuIpcGetMemHandle:0:801")]);
    let refused = PullResult::Denied(DenyReason::Namespace);
    for lane in [LaneChoice::Cuda, LaneChoice::Shm] {
        assert_eq!(pull(prefill.port, lane), (refused, Vec::new()), "{lane:?}");
    }
    assert_eq!(
        pull(prefill.port, LaneChoice::Auto),
        (PullResult::Done, vec!["tcp"])
    );
    prefill.end();
}

/// The two workers are in one process, where CUDA opens no handles.
#[test]
fn memory_that_cannot_be_mapped_goes_over_tcp_unless_cuda_is_forced() {
    for (lane, expected) in [
        (LaneChoice::Auto, (PullResult::Done, vec!["tcp"])),
        (LaneChoice::Cuda, (PullResult::Failed, Vec::new())),
    ] {
        let gpu = Gpu::new();
        let prefill = prefill(&gpu);
        assert!(prefill.offer(offer(&SOURCES)).expect("accepted"));
        gpu.compute(1);
        prefill
            .progress_after(&[("hold", done(4))], gpu.stream())
            .expect("accepted");
        assert_eq!(pull(prefill.port().expect("it listens"), lane), expected);
    }
}

#[test]
fn progress_of_a_revoked_offer_is_not_told_for_the_next_one_of_that_name() {
    let (source, target) = (Gpu::new(), Gpu::new());
    let (prefill, decode) = (prefill(&source), decode(&target, LaneChoice::Tcp));
    assert!(prefill.offer(offer(&SOURCES)).expect("accepted"));
    source.compute(1);
    prefill
        .progress_after(&[("hold", done(4))], source.stream())
        .expect("accepted");
    // Preempted before the stream came to it, and begun anew in other blocks.
    assert!(prefill.revoke("hold").expect("accepted"));
    assert!(prefill.offer(offer(&[0, 1, 2, 6])).expect("accepted"));
    let mut short = order(prefill.port().expect("it listens"), &TARGETS);
    short.timeout = 4 * KERNEL;
    let job = decode.pull_after(short, target.stream()).expect("accepted");
    assert_eq!(wait(&decode, job), PullResult::TimedOut);
    prefill
        .progress_after(&[("hold", done(4))], source.stream())
        .expect("accepted");
    let again = order(prefill.port().expect("it listens"), &TARGETS);
    let job = decode.pull_after(again, target.stream()).expect("accepted");
    assert_eq!(wait(&decode, job), PullResult::Done);
    assert!(target.has(TARGETS[3], 1, 6));
}

#[test]
fn a_pull_that_waits_for_the_stream_ends_when_it_is_cancelled_times_out_or_the_worker_is_closed() {
    let gpu = Gpu::new();
    let decode = decode(&gpu, LaneChoice::Auto);
    let address = 1; // nobody listens there, and nobody is asked
    gpu.compute(2);
    let begin = |timeout| {
        let order = PullOrder {
            timeout,
            ..order(address, &TARGETS)
        };
        decode.pull_after(order, gpu.stream()).expect("accepted")
    };
    let (cancelled, late, left) = (begin(PATIENCE), begin(KERNEL / 10), begin(PATIENCE));
    decode.cancel(cancelled);
    assert_eq!(wait(&decode, cancelled), PullResult::Cancelled);
    assert_eq!(wait(&decode, late), PullResult::TimedOut);
    decode.close();
    assert_eq!(wait(&decode, left), PullResult::Unreachable);
}

#[test]
fn without_a_stream_nothing_of_a_device_is_told_or_pulled() {
    let gpu = Gpu::new();
    let (prefill, decode) = (prefill(&gpu), decode(&gpu, LaneChoice::Auto));
    let told = prefill.progress(&[("hold", done(4))]).unwrap_err().to_string();
    assert!(
        told.contains("stream is none, allowed: the compute stream"),
        "{told}"
    );
    assert!(decode.pull(order(1, &TARGETS)).is_err());
}
