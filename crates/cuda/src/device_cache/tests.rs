//! On a stand-in for the driver that works later than it was asked to. The risks: a wait that is missing, a buffer that is
//! used while a copy uses it, a wait without an end.

use std::sync::atomic::{AtomicBool, Ordering};

use kvlane_core::{Device, TensorView};

use super::*;
use crate::raw::stand_in::{ComputeStream, HELD, NOT_YET, StandIn};

const BLOCKS: u32 = 6;
const LAYERS: usize = 3;
const WIDTH: usize = 1000;
const LAYER_BYTES: usize = 2 * WIDTH;

/// Layers of `(2, blocks, width)` bytes: K and V far from each other.
struct Rig {
    stand_in: StandIn,
    cache: DeviceCache,
    addresses: Vec<u64>,
}

impl Rig {
    fn new(delay_ms: u64, buffers: usize) -> Self {
        let stand_in = StandIn::new(Duration::from_millis(delay_ms));
        let bytes = LAYER_BYTES * BLOCKS as usize;
        let addresses: Vec<u64> = (0..LAYERS).map(|_| stand_in.allocate(bytes)).collect();
        let views = addresses.iter().enumerate().map(|(layer, &address)| TensorView {
            name: format!("layer.{layer}"),
            address,
            device: Device::Cuda(stand_in.ordinal()),
            element_bytes: 1,
            shape: vec![2, u64::from(BLOCKS), 1, 1, WIDTH as u64],
            strides: vec![
                (BLOCKS as usize * WIDTH) as i64,
                WIDTH as i64,
                WIDTH as i64,
                WIDTH as i64,
                1,
            ],
        });
        let map = BlockMap::from_tensors(views, BLOCKS, Some(1)).unwrap();
        let cache = DeviceCache::open(stand_in.tensors(map), buffers).unwrap();
        Self {
            stand_in,
            cache,
            addresses,
        }
    }

    fn load(&self, block: u32, bytes: &[u8], patience: &Patience<'_>) -> Result<()> {
        let mut staging = self.cache.staging(patience)?;
        staging[..bytes.len()].copy_from_slice(bytes);
        self.cache.copy_block_in(block, &all(), staging, None, patience)
    }

    fn load_after(&self, mark: &Mark, block: u32, bytes: &[u8], patience: &Patience<'_>) -> Result<()> {
        let mut staging = self.cache.staging(patience)?;
        staging[..bytes.len()].copy_from_slice(bytes);
        self.cache
            .copy_block_in(block, &all(), staging, Some(mark), patience)
    }

    fn block(&self, block: u32) -> Vec<u8> {
        let lease = self.cache.copy_block_out(block, &all(), &long()).unwrap();
        lease[..LAYERS * LAYER_BYTES].to_vec()
    }

    /// A kernel that writes the K half of a block's first layer.
    fn kernel(&self, stream: &ComputeStream, block: u32, byte: u8, duration_ms: u64) {
        let address = self.addresses[0] + (block as usize * WIDTH) as u64;
        stream.write(address, vec![byte; WIDTH], Duration::from_millis(duration_ms));
    }

    #[track_caller]
    fn check_clean(&self) {
        assert_eq!(self.stand_in.violations(), Vec::<String>::new());
    }
}

fn all() -> Vec<usize> {
    (0..LAYERS).collect()
}

fn content(seed: u32) -> Vec<u8> {
    (0..LAYERS * LAYER_BYTES)
        .map(|index| (index * 31 + seed as usize * 7 + index / 251) as u8)
        .collect()
}

fn within(ms: u64) -> Patience<'static> {
    Patience {
        deadline: Instant::now() + Duration::from_millis(ms),
        cancelled: &|| false,
    }
}

/// Has `call` run into a deadline, a later one if it has passed before the call waits for `what`. Returns by how much it was
/// overrun.
#[track_caller]
fn overrun<T: std::fmt::Debug>(
    what: &'static str,
    mut call: impl FnMut(&Patience<'_>) -> Result<T>,
) -> Duration {
    for ms in [30, 300, 3000] {
        let started = Instant::now();
        let error = call(&within(ms)).unwrap_err();
        let took = started.elapsed();
        assert!(matches!(error, CudaError::TimedOut { .. }), "{error:?}");
        assert!(took < HELD / 2, "it waited for the stream");
        if error == (CudaError::TimedOut { what }) {
            return took.saturating_sub(Duration::from_millis(ms));
        }
    }
    panic!("it never waited for {what}");
}

/// Claims that a deadline was kept as well as threads run on time, in one of five attempts.
#[track_caller]
fn check_on_time(attempt: impl FnMut() -> Duration) {
    let overruns: Vec<Duration> = std::iter::repeat_with(attempt)
        .take(5)
        .take_while(|overrun| *overrun >= Duration::from_millis(170))
        .collect();
    assert!(overruns.len() < 5, "{overruns:?}");
}

#[test]
fn every_block_comes_back_as_it_was_put_in() {
    let rig = Rig::new(1, 2);
    for block in 0..BLOCKS {
        rig.load(block, &content(block), &long()).unwrap();
    }
    for block in 0..BLOCKS {
        assert!(rig.block(block) == content(block), "block {block}");
    }
    // Two runs for each layer, none of them adjacent.
    assert_eq!(rig.stand_in.copies(), 2 * BLOCKS as usize * LAYERS * 2);
    rig.check_clean();
}

#[test]
fn some_layers_of_a_block_lie_one_after_the_other() {
    let rig = Rig::new(1, 2);
    rig.load(1, &content(1), &long()).unwrap();
    let lease = rig.cache.copy_block_out(1, &[2, 0], &long()).unwrap();
    let whole = content(1);
    assert!(lease[..LAYER_BYTES] == whole[2 * LAYER_BYTES..]);
    assert!(lease[LAYER_BYTES..2 * LAYER_BYTES] == whole[..LAYER_BYTES]);
}

#[test]
fn one_layer_is_read_and_written_by_itself() {
    let rig = Rig::new(1, 2);
    rig.cache.write_layer(1, 3, &content(9)[..LAYER_BYTES]);
    let mut back = vec![0; LAYER_BYTES];
    rig.cache.read_layer(1, 3, &mut back);
    assert!(back == content(9)[..LAYER_BYTES]);
    let whole = rig.block(3);
    assert!(
        whole[..LAYER_BYTES]
            .iter()
            .chain(&whole[2 * LAYER_BYTES..])
            .all(|&byte| byte == 0)
    );
}

#[test]
fn bytes_from_the_device_are_seen_only_after_their_event() {
    let rig = Rig::new(30, 1);
    // The stand-in puts NOT_YET into the buffer at the start of the copy and zeroes at its end.
    assert!(!rig.block(0).contains(&NOT_YET));
}

#[test]
fn a_store_reads_what_the_compute_stream_was_about_to_write() {
    let rig = Rig::new(0, 1);
    let stream = rig.stand_in.compute_stream();
    rig.kernel(&stream, 2, 7, 50);
    rig.cache.order_stores_after(stream.handle()).unwrap();
    assert!(rig.block(2)[..WIDTH].iter().all(|&byte| byte == 7));
}

#[test]
fn without_the_order_the_stand_in_shows_old_bytes() {
    // The control of the test before: if this fails, that one proves nothing.
    let rig = Rig::new(0, 1);
    let stream = rig.stand_in.compute_stream();
    let _held = stream.hold();
    rig.kernel(&stream, 2, 7, 0);
    assert!(rig.block(2)[..WIDTH].iter().all(|&byte| byte == 0));
}

#[test]
fn a_load_lands_behind_a_step_that_still_writes_its_blocks() {
    let rig = Rig::new(0, 1);
    let stream = rig.stand_in.compute_stream();
    rig.kernel(&stream, 2, 7, 50);
    let mark = rig.cache.mark(stream.handle()).unwrap();
    rig.load_after(&mark, 2, &content(2), &long()).unwrap();
    // Behind everything on the stream.
    rig.cache.order_stores_after(stream.handle()).unwrap();
    assert!(rig.block(2) == content(2));
}

#[test]
fn a_load_whose_deadline_passes_behind_a_long_step_touches_nothing() {
    check_on_time(|| {
        let rig = Rig::new(0, 1);
        let stream = rig.stand_in.compute_stream();
        let _held = stream.hold();
        let mark = rig.cache.mark(stream.handle()).unwrap();
        let overrun = overrun("the compute stream", |patience| {
            rig.load_after(&mark, 2, &content(2), patience)
        });
        assert_eq!(rig.stand_in.copies(), 0);
        assert!(rig.block(2).iter().all(|&byte| byte == 0));
        overrun
    });
}

#[test]
fn a_load_waits_for_no_step_that_came_after_it() {
    let rig = Rig::new(0, 1);
    let stream = rig.stand_in.compute_stream();
    let mark = rig.cache.mark(stream.handle()).unwrap();
    let _held = stream.hold();
    rig.cache.order_stores_after(stream.handle()).unwrap();
    rig.cache.mark(stream.handle()).unwrap();
    rig.load_after(&mark, 2, &content(2), &within(10_000)).unwrap();
}

#[test]
fn the_default_stream_is_a_stream_too() {
    // What PyTorch uses unless it was told otherwise has the number zero.
    let rig = Rig::new(0, 1);
    let stream = rig.stand_in.default_stream();
    rig.kernel(&stream, 2, 7, 50);
    rig.cache.order_stores_after(stream.handle()).unwrap();
    assert!(rig.block(2)[..WIDTH].iter().all(|&byte| byte == 7));
}

#[test]
fn a_load_that_has_begun_ends_only_when_nothing_can_arrive_any_more() {
    let rig = Rig::new(20, 1);
    // Six copies of 20 ms against 30 ms. Again if those pass before the first copy.
    let not_begun = CudaError::TimedOut {
        what: "the start of a copy",
    };
    let mut attempts = 0..5;
    while let Err(error) = rig.load(4, &content(4), &within(30)) {
        assert_eq!(error, not_begun);
        assert!(attempts.next().is_some(), "no load begins");
    }
    rig.stand_in.set_delay(Duration::ZERO);
    assert!(rig.block(4) == content(4));
    rig.check_clean();
}

#[test]
fn a_store_is_given_up_at_its_deadline_and_its_buffer_comes_back_later() {
    check_on_time(|| {
        let rig = Rig::new(5, 1);
        let stream = rig.stand_in.compute_stream();
        let held = stream.hold();
        rig.cache.order_stores_after(stream.handle()).unwrap();
        let overrun = overrun("a copy from the device", |patience| {
            rig.cache.copy_block_out(0, &all(), patience)
        });
        // The only buffer is still in use by the device.
        let error = rig.cache.staging(&within(10)).unwrap_err();
        assert_eq!(
            error,
            CudaError::TimedOut {
                what: "a staging buffer"
            }
        );
        drop(held);
        rig.load(1, &content(1), &long()).unwrap();
        assert!(rig.block(1) == content(1));
        assert_eq!(rig.stand_in.pinned().0, 1);
        rig.check_clean();
        overrun
    });
}

#[test]
fn a_cancelled_wait_ends_at_once() {
    let rig = Rig::new(50, 1);
    let cancelled = AtomicBool::new(false);
    let asked = || cancelled.swap(true, Ordering::Relaxed);
    let patience = Patience {
        deadline: Instant::now() + Duration::from_secs(60),
        cancelled: &asked,
    };
    let error = rig.cache.copy_block_out(0, &all(), &patience).unwrap_err();
    assert!(matches!(error, CudaError::Cancelled { .. }), "{error}");
}

#[test]
fn many_threads_share_two_buffers_and_get_right_bytes() {
    let rig = Rig::new(0, 2);
    let buffer_bytes = rig.cache.buffer_bytes();
    for block in 0..BLOCKS {
        rig.load(block, &content(block), &long()).unwrap();
    }
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let rig = &rig;
            scope.spawn(move || {
                for turn in 0..20u32 {
                    // Each thread has a block of its own.
                    let seed = thread * 100 + turn;
                    rig.load(thread, &content(seed), &long()).unwrap();
                    assert!(rig.block(thread) == content(seed), "thread {thread}, turn {turn}");
                }
            });
        }
    });
    assert_eq!(rig.stand_in.pinned(), (2, 2 * buffer_bytes));
    rig.check_clean();
}

#[test]
fn a_copy_that_fails_half_way_is_an_error_and_the_next_one_works() {
    let rig = Rig::new(5, 1);
    rig.stand_in.fail("cuMemcpyHtoDAsync_v2", Some((1, 2)));
    let error = rig.load(0, &content(0), &long()).unwrap_err();
    assert_eq!(error.code(), Some(2));
    assert!(
        error.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY (2)"),
        "{error}"
    );
    rig.stand_in.fail("cuMemcpyHtoDAsync_v2", None);
    rig.load(0, &content(1), &long()).unwrap();
    assert!(rig.block(0) == content(1));
    rig.check_clean();
}

#[test]
fn a_lost_device_fails_every_later_call_and_its_buffers_are_not_reused() {
    let rig = Rig::new(20, 2);
    rig.stand_in.fail("cuEventQuery", Some((0, 700)));
    let first = rig.cache.copy_block_out(0, &all(), &long()).unwrap_err();
    assert_eq!(first.code(), Some(700));
    rig.stand_in.fail("cuEventQuery", None);
    let later = rig.cache.copy_block_out(0, &all(), &long()).unwrap_err();
    assert_eq!(later, first);
    assert!(rig.load(0, &content(0), &long()).is_err());
    let Rig { stand_in, cache, .. } = rig;
    drop(cache);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(
        stand_in.pinned().0,
        1,
        "the buffer that the device may be using stays"
    );
    assert_eq!(stand_in.violations(), Vec::<String>::new());
}

#[test]
fn an_event_that_cannot_be_made_costs_no_buffer() {
    let rig = Rig::new(0, 1);
    rig.stand_in.fail("cuEventCreate", Some((0, 2)));
    for _ in 0..3 {
        assert_eq!(
            rig.cache.copy_block_out(0, &all(), &long()).unwrap_err().code(),
            Some(2)
        );
    }
    rig.stand_in.fail("cuEventCreate", None);
    rig.block(0);
}

#[test]
fn dropping_a_cache_gives_everything_back_after_the_last_copy() {
    // Again if the copies take longer than a cache waits for them.
    let is_given_back = (0..5).any(|_| {
        let Rig { stand_in, cache, .. } = Rig::new(20, 3);
        assert_eq!((stand_in.pinned().0, stand_in.retained()), (3, 1));
        let stream = stand_in.compute_stream();
        let held = stream.hold();
        cache.order_stores_after(stream.handle()).unwrap();
        cache.copy_block_out(0, &all(), &within(5)).unwrap_err();
        drop(held);
        let started = Instant::now();
        drop(cache);
        let took = started.elapsed();
        assert_eq!(stand_in.violations(), Vec::<String>::new());
        let left = (stand_in.pinned().0, stand_in.retained());
        assert!(left == (0, 0) || took >= DROP_PATIENCE, "{left:?} after {took:?}");
        left == (0, 0)
    });
    assert!(is_given_back);
}

#[test]
fn a_cache_that_finds_too_little_memory_gives_everything_back() {
    let stand_in = StandIn::new(Duration::ZERO);
    let address = stand_in.allocate(4096);
    let map = flat_map(&[(address, Device::Cuda(stand_in.ordinal()))]).unwrap();
    stand_in.fail("cuMemHostAlloc", Some((2, 2)));
    assert_eq!(
        DeviceCache::open(stand_in.tensors(map), 4).unwrap_err().code(),
        Some(2)
    );
    assert_eq!((stand_in.pinned().0, stand_in.retained()), (0, 0));
}

fn flat_map(places: &[(u64, Device)]) -> kvlane_core::Result<BlockMap> {
    let views = places
        .iter()
        .enumerate()
        .map(|(layer, &(address, device))| TensorView {
            name: format!("layer.{layer}"),
            address,
            device,
            element_bytes: 1,
            shape: vec![4, 1024],
            strides: vec![1024, 1],
        });
    BlockMap::from_tensors(views, 4, None)
}

#[test]
fn the_driver_says_what_it_is() {
    let stand_in = StandIn::new(Duration::ZERO);
    let info = StandIn::probe().unwrap();
    assert_eq!(info.version, (12, 9));
    assert_eq!(info.devices[stand_in.ordinal() as usize], "stand-in");
}
