//! The errors of this crate.

use crate::nccl::NcclVersion;

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
    /// NCCL is not on this machine, or not where PyTorch puts it. Use another way to a peer.
    #[error("NCCL is not installed or not found; looked for {}", list(.tried))]
    NcclMissing {
        /// Each place, and the loader's answer.
        tried: Vec<(String, String)>,
    },
    /// There is a library, but it is no NCCL or a very old one. Use another way to a peer.
    #[error("{library} is no usable NCCL: it has no {symbol} ({message})")]
    NcclSymbolMissing {
        /// The library's name.
        library: String,
        /// What it should have.
        symbol: &'static str,
        /// The loader's answer.
        message: String,
    },
    /// Use another way to a peer, or a newer PyTorch.
    #[error("NCCL {found} is too old, allowed: {oldest} and newer")]
    NcclTooOld {
        /// What is installed.
        found: NcclVersion,
        /// The first that will do.
        oldest: NcclVersion,
    },
    /// NCCL refused a call, or something that was on its way failed. The communicator is of no use any more.
    #[error("{call} failed with '{name}' ({code}{detail}) while {context}")]
    Nccl {
        /// NCCL's function.
        call: &'static str,
        /// Its result, an `ncclResult_t`.
        code: u32,
        /// NCCL's text for the code.
        name: String,
        /// What else NCCL says, with a comma in front; or nothing.
        detail: String,
        /// What was being done.
        context: &'static str,
    },
    /// Use another way to this peer.
    #[error("{open} communicators are open or could not be closed, allowed: {most}")]
    TooManyCommunicators {
        /// How many there are.
        open: usize,
        /// How many there may be.
        most: usize,
    },
    /// An earlier error ended the communicator. A new one is needed.
    #[error("the communicator was ended by an earlier error")]
    CommunicatorEnded,
    /// The system gives no thread.
    #[error("cannot start the thread of a communicator: {0}")]
    NoThread(String),
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

/// Results of NCCL for a connection that broke: `ncclSystemError` and `ncclRemoteError`.
const NCCL_CONNECTION: [u32; 2] = [2, 6];

impl CudaError {
    /// Whether the end of the peer may be the reason.
    pub fn may_be_the_peers(&self) -> bool {
        matches!(self, CudaError::Nccl { code, .. } if NCCL_CONNECTION.contains(code))
    }

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
