//! The errors of this crate. All of them mean *refused*: nothing was changed and a retry without a change is useless.
//! What a recompute can mend (absent, torn, late, full) is an [`Outcome::Miss`](kvlane_core::Outcome), not an error.

use std::io;
use std::path::PathBuf;

use crate::format::Reject;

/// Shorthand for results of this crate.
pub type Result<T, E = FsError> = std::result::Result<T, E>;

/// The folder or the options cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FsError {
    /// A system call failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer; keeps errno.
        #[source]
        source: io::Error,
    },
    /// A file exists that this build does not understand.
    #[error("{path} is not usable: {reject}; remove the folder or give another shared_storage_path")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reject: Reject,
    },
    /// A file or folder that somebody else could change, so that its content cannot be trusted.
    #[error("{path} {problem}: refused, because who can write it can plant KV")]
    Untrusted {
        /// The file.
        path: PathBuf,
        /// What was seen.
        problem: String,
    },
    /// The folder was created with another capacity.
    #[error(
        "capacity_bytes is {configured}, but {path} was created with {recorded}: \
         use the same value everywhere or leave it out"
    )]
    CapacityMismatch {
        /// The folder.
        path: PathBuf,
        /// Value of this process.
        configured: u64,
        /// Value in the control file.
        recorded: u64,
    },
    /// An option has a value that cannot work.
    #[error("{option} is {found}, allowed: {allowed}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// The value.
        found: String,
        /// What would work.
        allowed: String,
    },
    /// As many writers live as the control file has room for.
    #[error("{path} already has {limit} live writers")]
    TooManyWriters {
        /// The folder.
        path: PathBuf,
        /// The limit.
        limit: u32,
    },
    /// The folder does not allow writing, but a store was asked for.
    #[error("{path} is not writable, so nothing can be stored there (loads work)")]
    ReadOnly {
        /// The folder.
        path: PathBuf,
    },
    /// The folder does not allow writing, and no store was made in it yet.
    #[error("{path} has no store yet, and it is not writable here: start a server that stores there first")]
    NoStore {
        /// The folder.
        path: PathBuf,
    },
    /// The call came from a child process that was forked after the folder had been opened.
    #[error("{path} was opened before this process was forked: open it again here")]
    Forked {
        /// The folder.
        path: PathBuf,
    },
    /// The CUDA device cannot be used.
    #[error(transparent)]
    Device(#[from] kvlane_cuda::CudaError),
    /// The core refused the request.
    #[error(transparent)]
    Core(#[from] kvlane_core::Error),
}

impl FsError {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> FsError {
        let path = path.into();
        move |source| FsError::Io { action, path, source }
    }

    /// The native error code, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            FsError::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// Whether there was no space for what was to be written.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

impl From<FsError> for kvlane_core::Error {
    fn from(error: FsError) -> Self {
        match error {
            FsError::Core(inner) => inner,
            other => kvlane_core::Error::Backend {
                context: other.to_string(),
                source: Box::new(other),
            },
        }
    }
}
