//! Huge pages under a cache of this process.

use std::io;

/// Bytes of a huge page on every machine that kvlane runs on; on another, the system refuses and nothing happens.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

const PAGE_BYTES: usize = 4096;
const MADV_COLLAPSE: libc::c_int = 25;

/// Lets the system use huge pages from `address` on, where it gives memory anew, and joins the pages of what is there
/// already, huge page by huge page, while `go_on` says so. Returns the bytes that were joined, or were before.
///
/// Changes no byte, and memory that is none of the caller's is only advice for nothing. Both addresses are multiples of
/// [`HUGE_PAGE_BYTES`].
pub(crate) fn join_pages(address: usize, end: usize, mut go_on: impl FnMut() -> bool) -> usize {
    assert!(address.is_multiple_of(HUGE_PAGE_BYTES) && end.is_multiple_of(HUGE_PAGE_BYTES));
    if address >= end || advise(address, end - address, libc::MADV_HUGEPAGE).is_err() {
        return 0;
    }
    (address..end)
        .step_by(HUGE_PAGE_BYTES)
        .take_while(|_| go_on())
        .filter(|&start| is_resident(start) && advise(start, HUGE_PAGE_BYTES, MADV_COLLAPSE).is_ok())
        .count()
        * HUGE_PAGE_BYTES
}

/// Whether most of a huge page has memory: joining gives it to the rest as well.
fn is_resident(start: usize) -> bool {
    let mut pages = [0u8; HUGE_PAGE_BYTES / PAGE_BYTES];
    // SAFETY: the system checks the addresses and writes a byte for each page of the range, as many as there are.
    let result = unsafe {
        libc::mincore(
            std::ptr::without_provenance_mut(start),
            HUGE_PAGE_BYTES,
            pages.as_mut_ptr(),
        )
    };
    result == 0 && 2 * pages.iter().filter(|&&page| page & 1 == 1).count() > pages.len()
}

fn advise(start: usize, len: usize, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: both advices that this module gives leave the bytes of a range as they are, whosever it is.
    match unsafe { libc::madvise(std::ptr::without_provenance_mut(start), len, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
