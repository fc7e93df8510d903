//! Memory that other processes can map.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;

use crate::memory::Handle;

/// A file without a name, mapped for as long as the process lives.
#[derive(Debug)]
pub(crate) struct SharedFile {
    file: File,
    len: usize,
}

impl SharedFile {
    /// Zeroed memory, and where it is.
    pub(crate) fn allocate(len: usize) -> io::Result<(usize, Self)> {
        let name = CString::new("kvlane-cuda-stand-in").expect("no zero in it");
        // SAFETY: takes a text that ends with a zero and makes a descriptor.
        let descriptor = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else has it.
        let file = unsafe { File::from_raw_fd(descriptor) };
        file.set_len(len as u64)?;
        Ok((map(&file, len)?, Self { file, len }))
    }

    /// What another process needs to open it.
    pub(crate) fn handle(&self) -> io::Result<Handle> {
        Ok(Handle {
            pid: std::process::id(),
            descriptor: self.file.as_raw_fd() as u32,
            inode: self.file.metadata()?.ino(),
            len: self.len as u64,
        })
    }
}

/// Maps the file of another process; where, if it still is there.
pub(crate) fn open_shared(handle: Handle) -> io::Result<usize> {
    let path = format!("/proc/{}/fd/{}", handle.pid, handle.descriptor);
    let file = File::options().read(true).write(true).open(path)?;
    let found = file.metadata()?;
    if (found.ino(), found.len()) != (handle.inode, handle.len) {
        return Err(io::Error::from(io::ErrorKind::NotFound));
    }
    map(&file, handle.len as usize)
}

fn map(file: &File, len: usize) -> io::Result<usize> {
    // SAFETY: a new mapping at a place that the system chooses, of a file that is as long.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(address.expose_provenance())
}

/// Host memory that is never given back, so that a late copy into it is noticed and not fatal.
pub(crate) fn pinned(len: usize) -> usize {
    Box::leak(vec![0u8; len].into_boxed_slice())
        .as_mut_ptr()
        .expose_provenance()
}

/// Copies bytes.
pub(crate) fn copy(from: usize, to: usize, len: usize) {
    let from: *const u8 = std::ptr::with_exposed_provenance(from);
    let to: *mut u8 = std::ptr::with_exposed_provenance_mut(to);
    // SAFETY: the callers have found both in ranges of the stand-in, which stay mapped for ever, or have borrowed one of
    // them. Others may write them meanwhile, as on a device; then the bytes are not defined, which the tests are about.
    unsafe { from.copy_to(to, len) };
}

/// Fills bytes.
pub(crate) fn fill(address: usize, byte: u8, len: usize) {
    let start: *mut u8 = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: as for `copy`.
    unsafe { start.write_bytes(byte, len) };
}

/// Numbers that lie one after the other.
pub(crate) fn words(address: usize, count: usize) -> Vec<u64> {
    let start: *const u64 = std::ptr::with_exposed_provenance(address);
    // SAFETY: as for `copy`; read wherever they lie.
    (0..count)
        .map(|index| unsafe { start.add(index).read_unaligned() })
        .collect()
}
