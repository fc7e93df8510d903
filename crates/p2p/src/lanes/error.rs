//! What can go wrong on a lane.

use std::io;

use kvlane_cuda::CudaError;

/// Why bytes did not come, or do not count.
///
/// Every variant means: treat the blocks of this copy as missing. [`Lane::is_open`](super::Lane::is_open) says whether the
/// lane itself may be used again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaneError {
    /// What the peer says about its cache contradicts itself, or does not fit the local one.
    #[error("refused the peer's cache: {0}")]
    Layout(String),
    /// Blocks, layers or a lease that one of the two sides does not have.
    #[error("refused a request: {0}")]
    Request(String),
    /// The peer holds the blocks no longer: what was copied may be a mix.
    #[error("the lease in slot {slot}, epoch {epoch}, has lapsed")]
    Lapsed {
        /// Place in the holder's epoch table.
        slot: u32,
        /// What the slot should have held.
        epoch: u64,
    },
    /// The deadline came first.
    #[error("the deadline passed after {done_bytes} bytes")]
    TimedOut {
        /// Bytes that were copied before.
        done_bytes: u64,
    },
    /// The caller asked to stop.
    #[error("cancelled after {done_bytes} bytes")]
    Cancelled {
        /// Bytes that were copied before.
        done_bytes: u64,
    },
    /// The peer's process has ended, or it closed the connection.
    #[error("the peer is gone: {what}")]
    PeerGone {
        /// What was seen.
        what: &'static str,
        /// The system's answer, where there was one.
        #[source]
        source: Option<io::Error>,
    },
    /// The system does not let this process read the peer's memory.
    #[error("no right to read the memory of process {pid}: {source}")]
    NotPermitted {
        /// The peer.
        pid: i32,
        /// The system's answer.
        source: io::Error,
    },
    /// The peer has no memory where it said, or a local block is no memory.
    #[error("no memory at an address of process {pid}: {source}")]
    BadAddress {
        /// The peer.
        pid: i32,
        /// The system's answer.
        source: io::Error,
    },
    /// Another process has this number here: another pid namespace, or it was given out anew.
    #[error("process {pid} does not show the token of this connection")]
    WrongProcess {
        /// The number that the peer gave.
        pid: i32,
    },
    /// The peer sent what the protocol does not allow here.
    #[error("broke the data connection: {0}")]
    Protocol(String),
    /// An earlier error closed the lane.
    #[error("the lane was closed by an earlier error")]
    Closed,
    /// The CUDA driver refused, or the peer's device memory is not what it said.
    #[error("on the GPU: {0}")]
    Device(CudaError),
    /// The two sides cannot make a communicator of NCCL. Another lane takes its place.
    #[error("lane nccl is not possible: {0}")]
    Unavailable(String),
    /// The system refused for another reason.
    #[error("{call} failed: {source}")]
    System {
        /// The system call.
        call: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

impl LaneError {
    /// The system's error number, where one was the cause.
    pub fn errno(&self) -> Option<i32> {
        match self {
            LaneError::PeerGone {
                source: Some(source), ..
            }
            | LaneError::NotPermitted { source, .. }
            | LaneError::BadAddress { source, .. }
            | LaneError::System { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Sorts an answer of `process_vm_readv`.
    pub(crate) fn of_process(pid: i32, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ESRCH) => LaneError::PeerGone {
                what: "its process has ended",
                source: Some(source),
            },
            Some(libc::EPERM | libc::EACCES | libc::ENOSYS) => LaneError::NotPermitted { pid, source },
            Some(libc::EFAULT) => LaneError::BadAddress { pid, source },
            _ => LaneError::System {
                call: "process_vm_readv",
                source,
            },
        }
    }

    /// Sorts an error of the device, before which so many bytes were copied.
    pub(crate) fn of_device(error: CudaError, done_bytes: u64) -> Self {
        match error {
            CudaError::TimedOut { .. } => LaneError::TimedOut { done_bytes },
            CudaError::Cancelled { .. } => LaneError::Cancelled { done_bytes },
            error => LaneError::Device(error),
        }
    }

    /// Sorts an answer of a call on a data connection.
    pub(crate) fn of_socket(call: &'static str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(
                libc::ECONNRESET
                | libc::EPIPE
                | libc::ENOTCONN
                | libc::ETIMEDOUT
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH,
            ) => LaneError::PeerGone {
                what: "the data connection broke",
                source: Some(source),
            },
            _ => LaneError::System { call, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_answers_is_sorted_and_keeps_its_number() {
        let of = |errno| LaneError::of_process(7, io::Error::from_raw_os_error(errno));
        assert!(matches!(of(libc::ESRCH), LaneError::PeerGone { .. }));
        assert!(matches!(of(libc::EPERM), LaneError::NotPermitted { pid: 7, .. }));
        assert!(matches!(of(libc::ENOSYS), LaneError::NotPermitted { pid: 7, .. }));
        assert!(matches!(of(libc::EFAULT), LaneError::BadAddress { pid: 7, .. }));
        assert!(matches!(of(libc::ENOMEM), LaneError::System { .. }));
        for errno in [libc::ESRCH, libc::EPERM, libc::ENOSYS, libc::EFAULT, libc::ENOMEM] {
            assert_eq!(of(errno).errno(), Some(errno));
        }
        let reset = LaneError::of_socket("recvmsg", io::Error::from_raw_os_error(libc::ECONNRESET));
        assert!(matches!(reset, LaneError::PeerGone { .. }));
        assert_eq!(LaneError::Closed.errno(), None);
    }
}
