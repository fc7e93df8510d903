//! Reading another process' memory.

use std::io;

use super::local_ranges::advance;
use super::{LocalRanges, RANGES_PER_CALL};

/// Ranges in the memory of another process, in order. Numbers only: the kernel checks them.
pub(crate) struct RemoteRanges {
    ranges: Vec<libc::iovec>,
    first: usize,
}

// SAFETY: the addresses are those of another process and never followed in this one.
unsafe impl Send for RemoteRanges {}

impl RemoteRanges {
    /// Most ranges at a time.
    pub(crate) const MAX: usize = RANGES_PER_CALL;

    /// No ranges yet.
    pub(crate) fn new() -> Self {
        Self {
            ranges: Vec::with_capacity(RANGES_PER_CALL),
            first: 0,
        }
    }

    /// Forgets the ranges.
    pub(crate) fn clear(&mut self) {
        self.ranges.clear();
        self.first = 0;
    }

    /// Appends a range; joins what is adjacent.
    pub(crate) fn push(&mut self, address: u64, len: usize) {
        let base = std::ptr::without_provenance_mut::<libc::c_void>(address as usize);
        // A range that was read whole cannot grow.
        match self.ranges[self.first..].last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == base => last.iov_len += len,
            _ => self.ranges.push(libc::iovec {
                iov_base: base,
                iov_len: len,
            }),
        }
    }

    /// Number of ranges.
    pub(crate) fn count(&self) -> usize {
        self.ranges.len() - self.first
    }
}

/// Copies as many bytes of `remote` in process `pid` into `local` as one call does, takes them off the front of both and
/// returns how many they were. Not fewer than all, unless a page of one side cannot be accessed.
pub(crate) fn read_process(
    pid: i32,
    local: &mut LocalRanges,
    remote: &mut RemoteRanges,
) -> io::Result<usize> {
    let from = &remote.ranges[remote.first..];
    let to = local.list();
    // SAFETY: the local ranges are runs of a cache that `local` keeps alive; they may be written and nobody has
    // references to them. The kernel checks the other process' ranges.
    let read = unsafe {
        libc::process_vm_readv(
            pid,
            to.as_ptr(),
            to.len() as libc::c_ulong,
            from.as_ptr(),
            from.len() as libc::c_ulong,
            0,
        )
    };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    local.advance(read);
    advance(&remote.ranges, &mut remote.first, read).apply(&mut remote.ranges);
    Ok(read)
}

/// Fills each buffer from its address in process `pid`, in one call. `false`: not all of them could be read.
pub(crate) fn read_process_bytes<const N: usize>(pid: i32, parts: [(&mut [u8], u64); N]) -> io::Result<bool> {
    let total: usize = parts.iter().map(|(buffer, _)| buffer.len()).sum();
    let from = parts.each_ref().map(|(buffer, address)| libc::iovec {
        iov_base: std::ptr::without_provenance_mut(*address as usize),
        iov_len: buffer.len(),
    });
    let to = parts.map(|(buffer, _)| libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    });
    // SAFETY: the local ranges are buffers that are borrowed for writing. The kernel checks the others.
    let read = unsafe {
        libc::process_vm_readv(
            pid,
            to.as_ptr(),
            N as libc::c_ulong,
            from.as_ptr(),
            N as libc::c_ulong,
            0,
        )
    };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    Ok(read == total)
}
