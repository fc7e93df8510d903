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
