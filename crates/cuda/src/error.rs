//! The errors of this crate.

/// Shorthand for results of this crate.
pub type Result<T, E = CudaError> = std::result::Result<T, E>;

/// Why the device was not used, or a copy did not happen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The driver's library is not on this machine, or not where the loader looks. Nothing to retry.
    #[error("the CUDA driver is not installed or not found; looked for {}", list(.tried))]
    LibraryMissing {
        /// Each name, and the loader's answer.
        tried: Vec<(String, String)>,
    },
    /// There is a library, but it is no CUDA driver or a very old one. Nothing to retry.
    #[error("{library} is no usable CUDA driver: it has no {symbol} ({message})")]
    SymbolMissing {
        /// The library's name.
        library: String,
        /// What it should have.
        symbol: &'static str,
        /// The loader's answer.
        message: String,
    },
    /// The driver refused a call.
    #[error("{call} failed with {name} ({code}) while {context}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// Its result, a `CUresult`.
        code: u32,
        /// The driver's name for the code.
        name: String,
        /// What was being done.
        context: &'static str,
    },
    /// The device does not exist. Misuse.
    #[error("there is no device cuda:{ordinal}, the driver has {count}")]
    NoSuchDevice {
        /// The number asked for.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },
    /// The regions of a cache are not all on one CUDA device. Misuse.
    #[error("the KV cache of layer '{layer}' is on {found}, allowed: all layers on one CUDA device")]
    NotOneDevice {
        /// The first layer that is elsewhere.
        layer: String,
        /// Where it is.
        found: String,
    },
    /// A peer's offer of its memory is wrong, or of another machine. Use another way to its blocks.
    #[error("refused the peer's offer of device memory: {0}")]
    Offer(String),
    /// The deadline passed first. Treat as a miss.
    #[error("the deadline passed while waiting for {what}")]
    TimedOut {
        /// What did not happen in time.
        what: &'static str,
    },
    /// The caller gave up first. Treat as a miss.
    #[error("given up while waiting for {what}")]
    Cancelled {
        /// What did not happen before.
        what: &'static str,
    },
    /// Called in a forked child: the driver works in the parent only.
    #[error("a forked process cannot use its parent's CUDA device")]
    Forked,
}

impl CudaError {
    /// The driver's own code, where there is one.
    pub fn code(&self) -> Option<u32> {
        match self {
            CudaError::Driver { code, .. } => Some(*code),
            _ => None,
        }
    }
}

fn list(tried: &[(String, String)]) -> String {
    let each: Vec<String> = tried
        .iter()
        .map(|(name, message)| format!("{name} ({message})"))
        .collect();
    each.join(", ")
}
