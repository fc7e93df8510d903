//! Ranges of a paged cache of this process, in the form in which the kernel takes them.

use std::ptr;
use std::sync::Arc;

use kvlane_fs::HostCache;

use super::RANGES_PER_CALL;

/// Ranges of the runs of a cache, in order, of which system calls take bytes off the front.
///
/// The first place of `ranges` is never a range, so there is always one in front of the next range, and the list never
/// fills a whole call, so there is always one behind the last: a call may take a header and a trailer along.
pub(crate) struct LocalRanges {
    /// None: there are never ranges.
    cache: Option<Arc<HostCache>>,
    ranges: Vec<libc::iovec>,
    /// The next range.
    first: usize,
    len_bytes: usize,
}

// SAFETY: every range lies in a run of the cache, which is `Send` and `Sync` and lives as long as this.
unsafe impl Send for LocalRanges {}

const NOTHING: libc::iovec = libc::iovec {
    iov_base: ptr::null_mut(),
    iov_len: 0,
};

impl LocalRanges {
    /// Most ranges at a time.
    pub(crate) const MAX: usize = RANGES_PER_CALL - 2;

    /// No ranges yet.
    pub(crate) fn new(cache: Arc<HostCache>) -> Self {
        Self::of(Some(cache))
    }

    /// For bytes that do not come into a cache in host memory.
    pub(crate) fn none() -> Self {
        Self::of(None)
    }

    fn of(cache: Option<Arc<HostCache>>) -> Self {
        let mut ranges = Vec::with_capacity(RANGES_PER_CALL);
        ranges.push(NOTHING);
        Self {
            cache,
            ranges,
            first: 1,
            len_bytes: 0,
        }
    }

    /// Forgets the ranges.
    pub(crate) fn clear(&mut self) {
        self.ranges.truncate(1);
        self.first = 1;
        self.len_bytes = 0;
    }

    /// Appends `len` bytes at `offset` of a run; joins what is adjacent in memory.
    ///
    /// # Panics
    /// If the cache has no such run or the run no such bytes, if the list is full, or if there is no cache.
    pub(crate) fn push(&mut self, region: usize, block: u32, run: usize, offset: usize, len: usize) {
        let cache = self.cache.as_ref().expect("ranges of a cache");
        let (start, run_len) = cache.run(region, block, run);
        assert!(
            offset <= run_len && len <= run_len - offset,
            "{len} bytes at {offset} of a run of {run_len} bytes"
        );
        if len == 0 {
            return;
        }
        let start = start.wrapping_add(offset);
        self.len_bytes += len;
        if self.is_empty_list() {
            self.ranges.truncate(1);
            self.first = 1;
        } else if let Some(last) = self.ranges.last_mut()
            && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == start
        {
            last.iov_len += len;
            return;
        }
        assert!(
            self.count() < Self::MAX,
            "more than {} ranges at a time",
            Self::MAX
        );
        self.ranges.push(libc::iovec {
            iov_base: start.cast(),
            iov_len: len,
        });
    }

    /// Number of ranges.
    pub(crate) fn count(&self) -> usize {
        self.ranges.len() - self.first
    }

    /// Bytes of all ranges.
    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    fn is_empty_list(&self) -> bool {
        self.first == self.ranges.len()
    }

    /// The ranges, for a call that the borrow outlives.
    pub(super) fn list(&mut self) -> &[libc::iovec] {
        &self.ranges[self.first..]
    }

    /// The ranges with another in front and one behind, if these have bytes. [`drop_back`](Self::drop_back) must follow the
    /// call that takes them.
    pub(super) fn list_with(&mut self, front: libc::iovec, back: libc::iovec) -> &mut [libc::iovec] {
        let mut first = self.first;
        if front.iov_len > 0 {
            first -= 1;
            self.ranges[first] = front;
        }
        let mut end = self.ranges.len();
        if back.iov_len > 0 {
            self.ranges.push(back);
            end += 1;
        }
        &mut self.ranges[first..end]
    }

    /// Takes a range away that [`list_with`](Self::list_with) has put behind.
    pub(super) fn drop_back(&mut self, back: libc::iovec) {
        if back.iov_len > 0 {
            self.ranges.pop();
        }
    }

    /// Takes `bytes` off the front.
    pub(super) fn advance(&mut self, bytes: usize) {
        assert!(bytes <= self.len_bytes, "{bytes} bytes of {}", self.len_bytes);
        self.len_bytes -= bytes;
        advance(&self.ranges, &mut self.first, bytes).apply(&mut self.ranges);
    }
}

/// What is left of the first range that was not taken whole.
pub(super) struct Rest {
    index: usize,
    taken: usize,
}

impl Rest {
    pub(super) fn apply(self, ranges: &mut [libc::iovec]) {
        if self.taken > 0 {
            let range = &mut ranges[self.index];
            range.iov_base = range.iov_base.wrapping_byte_add(self.taken);
            range.iov_len -= self.taken;
        }
    }
}

/// Moves `first` behind the ranges that `bytes` cover.
pub(super) fn advance(ranges: &[libc::iovec], first: &mut usize, mut bytes: usize) -> Rest {
    while let Some(range) = ranges.get(*first)
        && bytes >= range.iov_len
    {
        bytes -= range.iov_len;
        *first += 1;
    }
    Rest {
        index: *first,
        taken: bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lanes::fixture::{Form, cache};

    /// Runs of 32 bytes; block `b + 1` lies behind block `b`.
    fn ranges() -> (LocalRanges, usize) {
        let cache = cache(Form::KvOuter, 1, 8, 64);
        let start = cache.run(0, 0, 0).0.addr();
        (LocalRanges::new(cache), start)
    }

    fn listed(ranges: &mut LocalRanges, start: usize) -> Vec<(usize, usize)> {
        let place = |range: &libc::iovec| (range.iov_base.addr() - start, range.iov_len);
        ranges.list().iter().map(place).collect()
    }

    #[test]
    fn neighbours_become_one_range_and_others_stay_apart() {
        let (mut ranges, start) = ranges();
        for block in [2, 3, 4, 6] {
            ranges.push(0, block, 0, 0, 32);
        }
        ranges.push(0, 6, 1, 8, 4);
        ranges.push(0, 6, 1, 12, 0);
        assert_eq!(listed(&mut ranges, start), [(64, 96), (192, 32), (456, 4)]);
        assert_eq!((ranges.count(), ranges.len_bytes()), (3, 132));
    }

    #[test]
    fn bytes_are_taken_off_the_front_and_new_ranges_come_behind() {
        let (mut ranges, start) = ranges();
        ranges.push(0, 0, 0, 0, 32);
        ranges.push(0, 2, 0, 0, 32);
        ranges.advance(33);
        assert_eq!(listed(&mut ranges, start), [(65, 31)]);
        ranges.push(0, 3, 0, 0, 32);
        assert_eq!(listed(&mut ranges, start), [(65, 63)]);
        ranges.advance(63);
        assert_eq!((ranges.count(), ranges.len_bytes()), (0, 0));
        // Behind what was taken whole, so not a part of it.
        ranges.push(0, 4, 0, 0, 32);
        assert_eq!(listed(&mut ranges, start), [(128, 32)]);
    }

    #[test]
    fn a_header_and_a_trailer_go_along_and_are_gone_afterwards() {
        let (mut ranges, start) = ranges();
        ranges.push(0, 1, 0, 0, 32);
        let (mut head, mut tail) = ([0; 3], [0; 5]);
        let range = |bytes: &mut [u8]| libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let (front, back) = (range(&mut head), range(&mut tail));
        let lens: Vec<usize> = ranges
            .list_with(front, back)
            .iter()
            .map(|range| range.iov_len)
            .collect();
        assert_eq!(lens, [3, 32, 5]);
        ranges.drop_back(back);
        assert_eq!(listed(&mut ranges, start), [(32, 32)]);
        assert_eq!(ranges.list_with(range(&mut []), range(&mut [])).len(), 1);
    }

    #[test]
    #[should_panic(expected = "5 bytes at 28 of a run of 32 bytes")]
    fn bytes_behind_a_run_are_no_range() {
        ranges().0.push(0, 0, 0, 28, 5);
    }
}
