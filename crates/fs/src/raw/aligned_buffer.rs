//! Page-aligned buffers, for the bounce pool and for direct I/O.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use super::PAGE_BYTES;

/// Bytes on the heap that start at a page and are a whole number of pages long, as `O_DIRECT` asks.
#[derive(Debug)]
pub struct AlignedBuffer {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its bytes, like a `Box<[u8]>`.
unsafe impl Send for AlignedBuffer {}
// SAFETY: as above; shared access is through `&[u8]` only.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// A zeroed buffer of at least `len` bytes, rounded up to whole pages and never empty.
    pub fn new(len: usize) -> Self {
        let bytes = len.max(1).next_multiple_of(PAGE_BYTES);
        let layout =
            Layout::from_size_align(bytes, PAGE_BYTES).expect("a buffer is smaller than the address space");
        // SAFETY: the layout is not empty.
        let Some(pointer) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout)
        };
        Self { pointer, layout }
    }

    /// Where the buffer lies, for a [`BlockMap`](kvlane_core::BlockMap).
    pub(super) fn address(&self) -> u64 {
        self.pointer.as_ptr().expose_provenance() as u64
    }

    /// Reads `len` bytes at `offset` of `file` into the start of the buffer. For a file opened with `O_DIRECT`, both
    /// must be multiples of [`PAGE_BYTES`].
    pub fn pread_into(&mut self, file: &File, offset: u64, len: usize) -> io::Result<()> {
        file.read_exact_at(&mut self[..len], offset)
    }

    /// Writes the first `len` bytes of the buffer to `offset` of `file`; `O_DIRECT` as with
    /// [`pread_into`](Self::pread_into).
    pub fn pwrite_from(&self, file: &File, offset: u64, len: usize) -> io::Result<()> {
        file.write_all_at(&self[..len], offset)
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: allocated with this size and zeroed, so initialised; borrowed from `self`.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `self` is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout, and freed once.
        unsafe { dealloc(self.pointer.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    /// The folder of the test program: on a disk more often than the folder for temporary files.
    pub(in crate::raw) fn build_folder() -> std::path::PathBuf {
        std::env::current_exe().unwrap().parent().unwrap().to_owned()
    }

    #[test]
    fn a_buffer_is_whole_zeroed_pages() {
        for (len, expected) in [
            (0, PAGE_BYTES),
            (1, PAGE_BYTES),
            (PAGE_BYTES, PAGE_BYTES),
            (5000, 2 * PAGE_BYTES),
        ] {
            let buffer = AlignedBuffer::new(len);
            assert_eq!(buffer.len(), expected);
            assert!(buffer.as_ptr().addr().is_multiple_of(PAGE_BYTES));
            assert!(buffer.iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn bytes_go_to_a_file_and_back() {
        let file = tempfile::tempfile().unwrap();
        let mut buffer = AlignedBuffer::new(5000);
        buffer[..5000].fill(7);
        buffer.pwrite_from(&file, 3, 5000).unwrap();
        let mut back = AlignedBuffer::new(5000);
        back.pread_into(&file, 3, 5000).unwrap();
        assert_eq!(back[..5000], buffer[..5000]);
        assert_eq!(
            back.pread_into(&file, 4, 5000).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn the_buffer_suits_direct_io_where_the_file_system_has_it() {
        let folder = tempfile::tempdir_in(build_folder()).unwrap();
        let mut options = std::fs::OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_DIRECT);
        let file = match options.open(folder.path().join("file")) {
            Ok(file) => file,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                eprintln!("NOT RUN: this file system has no direct I/O");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let mut buffer = AlignedBuffer::new(2 * PAGE_BYTES);
        buffer.fill(9);
        buffer.pwrite_from(&file, 0, 2 * PAGE_BYTES).unwrap();
        let mut back = AlignedBuffer::new(PAGE_BYTES);
        back.pread_into(&file, PAGE_BYTES as u64, PAGE_BYTES).unwrap();
        assert_eq!(back[..], buffer[..PAGE_BYTES]);
    }
}
