//! The errors of this crate. Each answers one question: may it be tried again, is it a miss, or was it misuse?

use std::io;
use std::net::SocketAddr;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A call was refused, or the backend cannot work. What merely did not arrive is no error but a miss.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Refused: an argument is out of its range; nothing was changed.
    #[error("{argument} is {found}, allowed: {allowed}")]
    InvalidArgument {
        /// The argument's name.
        argument: &'static str,
        /// The value that was given.
        found: String,
        /// What would have been accepted.
        allowed: String,
    },
    /// Refused: this value does not do that, as it was told at start.
    #[error("this worker cannot {0}: the role of its server excludes it")]
    Role(&'static str),
    /// Refused: a job number that was never given out, or whose completion was already taken.
    #[error("job {0} is unknown")]
    UnknownJob(u64),
    /// The start failed: peers could not connect.
    #[error(
        "cannot listen on {address}: {source}; another server on this machine may have the port (kv_port + rank)"
    )]
    Listen {
        /// The address that was asked for.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The CUDA device of the cache does not work.
    #[error("on the GPU: {0}")]
    Device(kvlane_cuda::CudaError),
    /// The system refused something without which nothing works.
    #[error("{context}: {source}")]
    Io {
        /// What was being done.
        context: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}
