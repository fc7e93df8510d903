//! The stand-in notices what a device would punish, and nothing else. The risk: tests on it pass whatever kvlane does.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::{BlockMap, Device, TensorView};
use kvlane_cuda::{CudaError, DeviceCache, DeviceTensors, StreamHandle, probe};
use kvlane_cuda_stand_in::{Control, load};

const BYTES: usize = 4096;
const KERNEL: Duration = Duration::from_millis(100);
/// One that still runs when its bytes are misused, however late that is. Nobody waits for its end.
const LONG_KERNEL: Duration = Duration::from_secs(30);
/// The variable that says what to do in a process of its own: a device that was lost stays so.
const VARIABLE: &str = "KVLANE_CUDA_STAND_IN_TEST";

struct Rig {
    stand_in: &'static Control,
    cache: DeviceCache,
    address: u64,
    stream: u64,
}

impl Rig {
    fn new() -> Self {
        let stand_in = load();
        let address = stand_in.allocate(BYTES);
        let view = TensorView {
            name: "layer".to_owned(),
            address,
            device: Device::Cuda(0),
            element_bytes: 1,
            shape: vec![4, BYTES as u64 / 4],
            strides: vec![BYTES as i64 / 4, 1],
        };
        let map = BlockMap::from_tensors([view], 4, Some(0)).expect("accepted");
        // SAFETY: as many bytes were allocated on that device, for as long as the process lives.
        let tensors = unsafe { DeviceTensors::from_map(map, Arc::new(())) };
        Self {
            stand_in,
            cache: DeviceCache::open(tensors, 2).expect("accepted"),
            address,
            stream: stand_in.compute_stream(),
        }
    }

    fn compute(&self, byte: u8, kernel: Duration) {
        self.stand_in
            .write(self.stream, self.address, &[byte; BYTES], kernel);
    }

    fn order(&self) {
        // SAFETY: a stream of the stand-in, which lives as long as the process.
        let stream = unsafe { StreamHandle::from_raw(self.stream) };
        self.cache.order_stores_after(stream).expect("accepted");
    }

    fn read(&self) -> Result<Vec<u8>, CudaError> {
        let mut bytes = vec![0; BYTES / 4];
        let patience = kvlane_cuda::Patience {
            deadline: Instant::now() + Duration::from_secs(10),
            cancelled: &|| false,
        };
        self.cache.read(0, 1, &mut bytes, &patience).map(|()| bytes)
    }
}

/// Not a test of its own: what the others run in a process of its own.
#[test]
fn in_a_process_of_its_own() {
    let Ok(what) = std::env::var(VARIABLE) else { return };
    let rig = Rig::new();
    let told = match what.as_str() {
        "read behind the kernel" => {
            rig.compute(7, KERNEL);
            rig.order();
            assert!(rig.read().expect("read").iter().all(|&byte| byte == 7));
            "right".to_owned()
        }
        "read beside the kernel" => {
            rig.compute(7, LONG_KERNEL);
            // Whether this read still comes through, the misuse is noticed.
            format!(
                "{:?}",
                rig.read().map(|_| ()).and_then(|()| rig.read().map(|_| ()))
            )
        }
        "kernel beside a stream that was not waited for" => {
            rig.compute(7, LONG_KERNEL);
            let other = rig.stand_in.compute_stream();
            rig.stand_in.write(other, rig.address, &[8; 16], Duration::ZERO);
            let end = Instant::now() + LONG_KERNEL;
            while rig.stand_in.violations().is_empty() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            format!("{:?}", rig.read().map(|_| ()))
        }
        "refused call" => {
            rig.stand_in.fail("cuMemcpyDtoHAsync_v2", 1, 999);
            rig.read().expect("works once");
            rig.read().expect_err("fails then").to_string()
        }
        other => panic!("{other}"),
    };
    println!("answer: {told}; {:?}", rig.stand_in.violations());
}

fn answer(what: &str) -> String {
    let program = std::env::current_exe().expect("a test program has a path");
    let output = Command::new(program)
        .args(["--exact", "in_a_process_of_its_own", "--nocapture"])
        .env(VARIABLE, what)
        .output()
        .expect("a process can be started");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let line = text.lines().find_map(|line| line.split_once("answer: "));
    line.unwrap_or_else(|| panic!("no answer in {text}")).1.to_owned()
}

#[test]
fn a_copy_that_waits_for_the_compute_stream_reads_what_it_wrote_and_is_no_misuse() {
    assert_eq!(answer("read behind the kernel"), "right; []");
}

#[test]
fn a_copy_that_does_not_wait_is_misuse_and_costs_the_device() {
    let told = answer("read beside the kernel");
    assert!(told.contains("code: 700"), "{told}");
    assert!(
        told.contains("reads 1024 bytes") && told.contains("unfinished operation"),
        "{told}"
    );
}

#[test]
fn two_streams_that_write_the_same_bytes_are_misuse() {
    let told = answer("kernel beside a stream that was not waited for");
    assert!(
        told.contains("writes 16 bytes") && told.contains("code: 700"),
        "{told}"
    );
}

#[test]
fn a_call_that_was_told_to_fails_after_it_has_worked() {
    let told = answer("refused call");
    assert!(
        told.starts_with("cuMemcpyDtoHAsync_v2 failed with an unknown code (999)"),
        "{told}"
    );
    assert!(told.ends_with("; []"), "{told}");
}

#[test]
fn kvlane_takes_the_loaded_library_for_the_driver_and_says_what_it_is() {
    let _ = load();
    let info = probe().expect("it is loaded");
    assert_eq!(info.library, "libcuda.so.1");
    assert_eq!(info.devices, ["kvlane stand-in (no GPU)"]);
}
