//! What a test asks of the stand-in that it has loaded.

use std::path::PathBuf;
use std::sync::OnceLock;

use crate::raw::Client;

/// What the target of a receive holds between the start of the group and the bytes.
pub const NOT_YET: u8 = 0xa5;

/// What an aborted receive still writes.
pub const LATE: u8 = 0xee;

/// Loads the stand-in, so that this process takes it for NCCL from now on. Once: later calls give the same. The stand-in for
/// CUDA must be loaded.
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
    let mut paths = folders.map(|folder| folder.join("libkvlane_nccl_stand_in.so"));
    let found = paths.find(|path| path.exists());
    found.unwrap_or_else(|| panic!("no libkvlane_nccl_stand_in.so beside {}", program.display()))
}

/// The loaded stand-in. Misuse is told to the stand-in for CUDA.
pub struct Control {
    client: Client,
}

impl Control {
    /// As the variable `KVLANE_NCCL_STAND_IN_FAIL`: from now on `what` fails with `code`, after it has worked `after` more
    /// times; code 0 mends it.
    pub fn fail(&self, what: &str, after: u64, code: u32) {
        self.client.fail(what, after, code);
    }

    /// How often a function of NCCL was called.
    pub fn calls(&self, call: &str) -> u64 {
        self.client.calls(call)
    }

    /// Communicators that were made, or are being made, and were not aborted or destroyed.
    pub fn communicators(&self) -> u64 {
        self.client.communicators()
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Control").finish_non_exhaustive()
    }
}
