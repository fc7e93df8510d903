//! How many file descriptors segments may take: an engine that has none left answers no request any more.

/// Half of what this process may have open; the other half is for everything else.
pub(crate) fn max_for_segments() -> u64 {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.map_or(u64::MAX, |limit| limit / 2)
}

/// What segments take: each that the index knows has one to be read, an own one two more, for its lock and its owner's
/// reads. A new own one may not be known yet.
pub(crate) fn taken_by(own: usize, known: usize) -> u64 {
    (2 * own + known.max(own)) as u64
}

/// What to say when there are no more for another segment.
pub(crate) fn complaint(max: u64) -> String {
    format!(
        "segments take {max} file descriptors, which is half of what this process may have (ulimit -n): \
         raise that limit, or `segment_bytes`"
    )
}
