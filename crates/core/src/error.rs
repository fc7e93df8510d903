//! The errors of this crate. Each answers one question: what may the caller do now?

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A call was refused: the caller used the library in a way that cannot work, and nothing was changed.
///
/// Content that is absent, torn, evicted or late is not an error: it is an
/// [`Outcome::Miss`](crate::Outcome::Miss), which costs a recompute.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A KV tensor has a form from which no block map can be derived.
    #[error("KV tensor '{tensor}' with shape {shape:?} and strides {strides:?} is not usable: {reason}")]
    UnsupportedLayout {
        /// The layer's name.
        tensor: String,
        /// Logical shape, in elements.
        shape: Vec<u64>,
        /// Strides, in elements.
        strides: Vec<i64>,
        /// What is wrong, as the end of a sentence.
        reason: String,
    },
    /// An argument is out of its range.
    #[error("{argument} is {found}, allowed: {allowed}")]
    InvalidArgument {
        /// The argument's name.
        argument: &'static str,
        /// The value that was given.
        found: String,
        /// What would have been accepted.
        allowed: String,
    },
    /// A job number that was never given out, or whose completion was already taken.
    #[error("job {0} is unknown")]
    UnknownJob(u64),
    /// The backend behind the trait refused or cannot work; `source` says why.
    #[error("{context}")]
    Backend {
        /// What was being done.
        context: String,
        /// The backend's own error, native codes kept.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
