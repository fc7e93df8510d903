//! Vectored I/O straight between a file and the runs of a cache, in one system call per thousand runs.
//!
//! The library functions for this take slices, which must not exist over memory that others write, hence libc.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::{PAGE_BYTES, Runs};

/// Most ranges that one call takes; Linux' UIO_MAXIOV.
const RANGES_PER_CALL: usize = 1024;

static ZEROES: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Writes `runs`, one after the other, to `offset` of `file`, and `padding_bytes` zeroes (at most a page) behind them.
///
/// May block: give it only runs that no deadline guards.
pub fn pwritev_all(file: &File, offset: u64, runs: &Runs<'_>, padding_bytes: usize) -> io::Result<()> {
    assert!(
        padding_bytes <= PAGE_BYTES,
        "padding of {padding_bytes} bytes is more than a page"
    );
    let padding = (ZEROES.as_ptr().cast_mut(), padding_bytes);
    let mut ranges = Cursor::new(runs.iter().chain(std::iter::once(padding)));
    let mut offset = offset;
    while ranges.refill() {
        // SAFETY: `runs` keeps its ranges valid while it is borrowed, the padding is static; the kernel only reads them.
        let written = unsafe {
            libc::pwritev(
                file.as_raw_fd(),
                ranges.window.as_ptr(),
                ranges.window.len() as i32,
                file_offset(offset)?,
            )
        };
        match check(written)? {
            None => {}
            Some(0) => return Err(io::ErrorKind::WriteZero.into()),
            Some(written) => {
                offset += written as u64;
                ranges.advance(written);
            }
        }
    }
    Ok(())
}

/// Reads from `offset` of `file` into `runs`, one after the other, as far as the page cache has the bytes, and returns
/// how many bytes that were. Fewer than [`Runs::len_bytes`]: the next ones would block, or the file ends there.
///
/// An error of the kind `Unsupported` says that the file system cannot promise not to block (tmpfs, some network ones).
pub fn preadv_nowait(file: &File, offset: u64, runs: &Runs<'_>) -> io::Result<usize> {
    let mut ranges = Cursor::new(runs.iter());
    let mut done = 0;
    while ranges.refill() {
        // SAFETY: `runs` keeps its ranges valid for writing while it is borrowed, and nobody has references to them.
        let read = unsafe {
            libc::preadv2(
                file.as_raw_fd(),
                ranges.window.as_ptr(),
                ranges.window.len() as i32,
                file_offset(offset + done as u64)?,
                libc::RWF_NOWAIT,
            )
        };
        match check(read) {
            Ok(None) => {}
            Ok(Some(0)) => break,
            Ok(Some(read)) => {
                done += read;
                ranges.advance(read);
            }
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// `None`: interrupted, to be tried again.
fn check(result: isize) -> io::Result<Option<usize>> {
    match usize::try_from(result) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            error => Err(error),
        },
    }
}

fn file_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// The ranges that are still to be done, a window of them in the kernel's form.
struct Cursor<I> {
    rest: I,
    window: Vec<libc::iovec>,
}

impl<I: Iterator<Item = (*mut u8, usize)>> Cursor<I> {
    fn new(rest: I) -> Self {
        Self {
            rest,
            window: Vec::new(),
        }
    }

    /// Fills an empty window; `false` when nothing is left to do.
    fn refill(&mut self) -> bool {
        if self.window.is_empty() {
            let ranges = self
                .rest
                .by_ref()
                .filter(|&(_, len)| len > 0)
                .take(RANGES_PER_CALL);
            self.window.extend(ranges.map(|(start, len)| libc::iovec {
                iov_base: start.cast(),
                iov_len: len,
            }));
        }
        !self.window.is_empty()
    }

    /// Takes `bytes` off the front of the window.
    fn advance(&mut self, mut bytes: usize) {
        let mut whole = 0;
        for range in &mut self.window {
            if bytes < range.iov_len {
                range.iov_base = range.iov_base.wrapping_byte_add(bytes);
                range.iov_len -= bytes;
                break;
            }
            bytes -= range.iov_len;
            whole += 1;
        }
        self.window.drain(..whole);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use kvlane_core::PagedMemory;

    use super::super::aligned_buffer::tests::build_folder;
    use super::super::host_cache::tests::{content, split_cache};
    use super::*;
    use crate::raw::HostCache;

    /// More runs than one call takes, none of them adjacent.
    const BLOCKS: u32 = 1500;

    fn all_blocks_backwards(cache: &HostCache) -> Runs<'_> {
        let mut runs = Runs::new();
        (0..BLOCKS)
            .rev()
            .for_each(|block| runs.push_layer(cache, 0, block));
        runs
    }

    #[test]
    fn runs_beyond_the_limit_of_one_call_are_written_in_order_with_padding() {
        let cache = split_cache(BLOCKS, 33, 0);
        (0..BLOCKS).for_each(|block| cache.write_layer(0, block, &content(block as usize, 66)));
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![1; 200_000], 0).unwrap();
        let runs = all_blocks_backwards(&cache);
        pwritev_all(&file, 5, &runs, 100).unwrap();
        let mut bytes = vec![0; runs.len_bytes() + 106];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let expected: Vec<u8> = (0..BLOCKS)
            .rev()
            .flat_map(|block| content(block as usize, 66))
            .collect();
        assert_eq!(bytes[..5], [1; 5]);
        assert!(bytes[5..5 + expected.len()] == expected);
        assert_eq!(bytes[5 + expected.len()..][..100], [0; 100]);
        assert_eq!(bytes.last(), Some(&1), "nothing behind the padding");
    }

    #[test]
    fn bytes_in_the_page_cache_are_read_into_the_runs_without_blocking() {
        let cache = split_cache(BLOCKS, 33, 0);
        let expected = content(1, BLOCKS as usize * 66);
        let file = tempfile::tempfile_in(build_folder()).unwrap();
        file.write_all_at(&expected, 7).unwrap();
        let runs = all_blocks_backwards(&cache);
        match preadv_nowait(&file, 7, &runs) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                eprintln!("NOT RUN: this file system does not know reads that never wait");
            }
            read => {
                assert_eq!(read.unwrap(), expected.len());
                for (place, block) in (0..BLOCKS).rev().enumerate() {
                    let mut bytes = [0; 66];
                    cache.read_layer(0, block, &mut bytes);
                    assert!(bytes == expected[place * 66..][..66], "block {block}");
                }
                // The file ends in the middle of a run.
                assert_eq!(preadv_nowait(&file, 107, &runs).unwrap(), expected.len() - 100);
            }
        }
    }

    #[test]
    fn a_partial_transfer_goes_on_in_the_middle_of_a_range() {
        let base = std::ptr::without_provenance_mut::<u8>(4096);
        let ranges = [(base, 10), (base, 0), (base.wrapping_add(100), 10)];
        let mut cursor = Cursor::new(ranges.into_iter());
        assert!(cursor.refill());
        cursor.advance(13);
        assert_eq!(
            (cursor.window[0].iov_base.addr(), cursor.window[0].iov_len),
            (4096 + 103, 7)
        );
        cursor.advance(7);
        assert!(!cursor.refill());
    }

    #[test]
    fn errors_of_the_system_keep_their_code() {
        let cache = split_cache(1, 8, 0);
        let mut runs = Runs::new();
        runs.push_layer(&cache, 0, 0);
        let file = File::open("/dev/null").unwrap();
        assert_eq!(
            pwritev_all(&file, 0, &runs, 0).unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
        assert_eq!(
            preadv_nowait(&file, u64::MAX, &runs).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
