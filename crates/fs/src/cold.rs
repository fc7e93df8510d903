//! Blocks that are not in the page cache: read by threads that do nothing else, so that the device always has several
//! reads to work on while the loading threads copy what is there.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};
use rustix::fs::{Mode, OFlags};

use crate::load::{IDLE_CHECK, LoadJob};
use crate::raw::{AlignedBuffer, PAGE_BYTES};

/// Reads in flight for each transfer. A disk of one machine gives its full rate from two to four on; a remote one wants
/// more, but each takes a buffer of one block.
pub(crate) const COLD_READS: usize = 4;

/// Reads that may wait; more come only when the device has stopped to answer.
pub(crate) const COLD_READS_WAITING_MAX: usize = 1 << 14;

/// One block of a load, to be read from the device.
pub(crate) struct ColdRead {
    pub(crate) job: Arc<LoadJob>,
    pub(crate) position: usize,
    pub(crate) layers: Range<usize>,
}

/// Where a load puts what is not in the page cache.
pub(crate) type ColdQueue = Sender<ColdRead>;

/// What a cold reader does until nobody can give it work any more.
pub(crate) fn cold_thread(reads: &Receiver<ColdRead>, abandoned: &AtomicBool) {
    let mut bounce = Bounce::default();
    while !abandoned.load(Ordering::Relaxed) {
        match reads.recv_timeout(IDLE_CHECK) {
            Ok(read) => read.job.run_cold(read.position, read.layers, &mut bounce),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// The same file, opened for reads past the page cache; `None` where that is not to be had.
pub(crate) fn open_direct(file: &File) -> Option<File> {
    // By descriptor and not by name: the name may be another file by now, or gone.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).ok().map(File::from)
}

/// A thread's buffer for reads that may block.
#[derive(Default)]
pub(crate) struct Bounce(Option<AlignedBuffer>);

impl Bounce {
    /// Reads `bytes` at `offset`: through `direct`, if it is given and takes them, else through the page cache.
    pub(crate) fn read(
        &mut self,
        file: &File,
        direct: Option<&File>,
        offset: u64,
        bytes: usize,
    ) -> io::Result<&[u8]> {
        // Up to the end of the last page, which belongs to the slot too: direct reads are of whole pages.
        let whole = bytes.next_multiple_of(PAGE_BYTES);
        if self.0.as_ref().is_none_or(|buffer| buffer.len() < whole) {
            self.0 = None;
        }
        let buffer = self.0.get_or_insert_with(|| AlignedBuffer::new(whole));
        let is_aligned = offset.is_multiple_of(PAGE_BYTES as u64);
        let read = direct
            .filter(|_| is_aligned)
            .map(|direct| buffer.pread_into(direct, offset, whole));
        if !matches!(read, Some(Ok(()))) {
            // A file system may open a file so and then refuse to read it so.
            buffer.pread_into(file, offset, bytes)?;
        }
        Ok(&buffer[..bytes])
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_is_read_is_the_same_past_the_page_cache_and_through_it() {
        let folder = std::env::current_exe().unwrap().parent().unwrap().to_owned();
        let file = tempfile::tempfile_in(folder).unwrap();
        let content: Vec<u8> = (0..4 * PAGE_BYTES).map(|at| (at / 7) as u8).collect();
        file.write_all_at(&content, 0).unwrap();
        let direct = open_direct(&file);
        if direct.is_none() {
            eprintln!("NOT RUN: this file system has no direct reads");
        }
        let mut bounce = Bounce::default();
        for (offset, bytes) in [(0, 100), (4096, 8192), (4096, 5000), (10, 4096), (8192, 8192)] {
            let expected = &content[offset..offset + bytes];
            assert!(bounce.read(&file, direct.as_ref(), offset as u64, bytes).unwrap() == expected);
            assert!(bounce.read(&file, None, offset as u64, bytes).unwrap() == expected);
        }
        assert!(
            bounce.read(&file, direct.as_ref(), 8192, 3 * 4096).is_err(),
            "it ends before"
        );
    }
}
