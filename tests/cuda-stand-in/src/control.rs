//! What a test asks of the stand-in that it has loaded.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use crate::raw::Client;

/// What pinned memory holds between the start of a copy into it and its end.
pub const NOT_YET: u8 = 0xa5;

/// Loads the stand-in, so that this process takes it for the CUDA driver from now on. Once: later calls give the same.
///
/// # Panics
/// If cargo has not built the library beside the tests.
pub fn load() -> &'static Control {
    static LOADED: OnceLock<Control> = OnceLock::new();
    LOADED.get_or_init(|| Control {
        client: Client::load(&path()),
    })
}

/// Where cargo puts the library: beside the program, or one folder up.
fn path() -> PathBuf {
    let program = std::env::current_exe().expect("a program has a path");
    let folders = program.ancestors().skip(1).take(2);
    let mut paths = folders.map(|folder| folder.join("libkvlane_cuda_stand_in.so"));
    let found = paths.find(|path| path.exists());
    found.unwrap_or_else(|| panic!("no libkvlane_cuda_stand_in.so beside {}", program.display()))
}

/// The loaded stand-in.
pub struct Control {
    client: Client,
}

impl Control {
    /// Device memory of the first device, for as long as the process lives. Returns its address.
    pub fn allocate(&self, bytes: usize) -> u64 {
        self.client.allocate(bytes)
    }

    /// A stream as the embedding program has one for its kernels: the number that PyTorch calls `cuda_stream`.
    pub fn compute_stream(&self) -> u64 {
        self.client.compute_stream()
    }

    /// A kernel on a stream, which takes `duration` and then writes `bytes` at `address`.
    ///
    /// # Panics
    /// If there is no such stream or the bytes are not in device memory.
    pub fn write(&self, stream: u64, address: u64, bytes: &[u8], duration: Duration) {
        let code = self.client.kernel(stream, address, bytes, duration);
        assert_eq!(code, 0, "the stand-in refused a kernel");
    }

    /// From now on `call` fails with `code`, after it has worked `after` more times; code 0 mends it.
    pub fn fail(&self, call: &str, after: u64, code: u32) {
        self.client.fail(call, after, code);
    }

    /// From now on operations are late by at most this.
    pub fn set_delay(&self, most: Duration) {
        self.client.set_delay(most);
    }

    /// How often a function of the driver was called.
    pub fn calls(&self, call: &str) -> u64 {
        self.client.calls(call)
    }

    /// What was done wrong so far.
    pub fn violations(&self) -> Vec<String> {
        let text = self.client.violations();
        text.lines().map(str::to_owned).collect()
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Control").finish_non_exhaustive()
    }
}
