//! `kvlane._native`: conversion between Python and kvlane's crates. No logic lives here.
//!
//! Three rules hold for every function but those that only read or make a value in memory (getters, `Chain.keys` and the
//! like), where a panic is PyO3's `PanicException`: arguments are checked while the interpreter lock is held; whatever copies,
//! waits or touches a file runs without it; and a panic becomes an exception that names itself an internal error.

mod chain;
mod cli;
mod error;
mod fs;
mod ints;
mod layout;
mod logs;
mod p2p;
mod p2p_options;
mod ping;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::chain::{Chain, RecentChains};
    #[pymodule_export]
    use crate::cli::run_cli;
    #[pymodule_export]
    use crate::fs::{FsReader, FsWorker};
    #[pymodule_export]
    use crate::layout::{Layout, namespace_id};
    #[pymodule_export]
    use crate::logs::{end_logs, next_logs};
    #[pymodule_export]
    use crate::p2p::{P2pAsker, P2pWorker};
    #[pymodule_export]
    use crate::ping::P2pPing;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        crate::error::init(module)
    }
}
