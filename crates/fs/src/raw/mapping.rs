//! Shared mappings of segment files.
//!
//! Other processes write these bytes, so there is never a slice over them: words are read and written as atomics, byte
//! ranges by copies. Offsets that are out of range or misaligned panic; callers check what they read from a file before
//! they use it as an offset.
//!
//! A file must not become shorter while it is mapped: an access behind its end is a SIGBUS. Segments keep their length
//! from before their name appears until after it is gone, and whoever maps one checks its length first.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::{ByteSource, ByteTarget, PAGE_BYTES};

/// A shared mapping of a file, for reading.
#[derive(Debug)]
pub struct ReadMapping {
    raw: MmapRaw,
}

impl ReadMapping {
    /// Maps the first `len` bytes of `file`, which must be open for reading. The length is checked against the file's.
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        check_file_length(file, len)?;
        Ok(Self {
            raw: MmapOptions::new().len(len).map_raw_read_only(file)?,
        })
    }

    /// Bytes of the mapping.
    #[allow(clippy::len_without_is_empty, reason = "the system refuses an empty mapping")]
    pub fn len(&self) -> usize {
        self.raw.len()
    }

    /// Reads the 64-bit word at `offset` with acquire order: what was written before the word was stored with release
    /// order is seen from here on.
    pub fn load_u64(&self, offset: usize) -> u64 {
        let word = self
            .at(offset, align_of::<AtomicU64>(), size_of::<AtomicU64>())
            .cast_mut()
            .cast::<u64>();
        // SAFETY: inside the mapping and aligned, as `at` checked; mapped until `self` is dropped. In read-only memory
        // only relaxed loads are promised to work, hence the fence for acquire.
        let value = unsafe { AtomicU64::from_ptr(word) }.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        value
    }

    /// Reads the 32-bit word at `offset` with acquire order.
    pub fn load_u32(&self, offset: usize) -> u32 {
        let word = self
            .at(offset, align_of::<AtomicU32>(), size_of::<AtomicU32>())
            .cast_mut()
            .cast::<u32>();
        // SAFETY: as in `load_u64`.
        let value = unsafe { AtomicU32::from_ptr(word) }.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        value
    }

    /// Copies the bytes from `offset` on into `bytes`. A writer may be at work: check a sequence afterwards.
    pub fn read_bytes(&self, offset: usize, bytes: &mut [u8]) {
        let source = self.at(offset, 1, bytes.len());
        // SAFETY: the range is inside the mapping; `bytes` is borrowed for writing, so it cannot overlap.
        unsafe { source.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        // Keeps the copy before what the caller reads next, such as the sequence that says whether it is whole.
        fence(Ordering::Acquire);
    }

    /// The range as the source of a copy.
    pub fn source(&self, offset: usize, len: usize) -> ByteSource<'_> {
        // SAFETY: inside the mapping, which the result borrows.
        unsafe { ByteSource::from_raw(self.at(offset, 1, len), len) }
    }

    /// Maps the pages of `range` before they are used; a whole mapping costs a fault for each page otherwise.
    pub fn populate_read(&self, range: Range<usize>) -> io::Result<()> {
        let pages = self.pages(&range);
        self.advise_or(Advice::PopulateRead, pages, |page| {
            // SAFETY: inside the mapping; a relaxed load works in read-only memory.
            unsafe { AtomicU8::from_ptr(page) }.load(Ordering::Relaxed);
        })
    }

    /// Keeps the mapping out of child processes, which must not write the segments of their parent.
    pub fn dont_fork(&self) -> io::Result<()> {
        self.raw.advise(Advice::DontFork)
    }

    /// Address of `len` bytes at `offset`, checked.
    fn at(&self, offset: usize, alignment: usize, len: usize) -> *const u8 {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.raw.len()),
            "{len} bytes at {offset} are outside of a mapping of {} bytes",
            self.raw.len()
        );
        // The mapping itself starts at a page, so the offset decides the alignment.
        assert!(
            offset.is_multiple_of(alignment),
            "offset {offset} is not a multiple of {alignment}"
        );
        // SAFETY: offset is at most the mapping's length.
        unsafe { self.raw.as_ptr().add(offset) }
    }

    /// The whole pages that `range` touches.
    fn pages(&self, range: &Range<usize>) -> Range<usize> {
        assert!(
            range.start <= range.end && range.end <= self.raw.len(),
            "{range:?} is outside of the mapping"
        );
        range.start - range.start % PAGE_BYTES..range.end
    }

    /// Gives an advice, or touches page by page on kernels (before 5.14) that do not know it.
    fn advise_or(&self, advice: Advice, pages: Range<usize>, touch: impl Fn(*mut u8)) -> io::Result<()> {
        match self.raw.advise_range(advice, pages.start, pages.len()) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                for offset in pages.step_by(PAGE_BYTES) {
                    // The pointer of the mapping itself, not one derived from a const pointer.
                    self.at(offset, 1, 1);
                    touch(self.raw.as_mut_ptr().wrapping_add(offset));
                }
                Ok(())
            }
            result => result,
        }
    }
}

/// A shared mapping of a file, for reading and writing.
#[derive(Debug)]
pub struct WriteMapping(ReadMapping);

impl WriteMapping {
    /// Maps the first `len` bytes of `file`, which must be open for reading and writing.
    ///
    /// Allocate them first: on a full file system, writing a hole through a mapping is a SIGBUS.
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        check_file_length(file, len)?;
        Ok(Self(ReadMapping {
            raw: MmapOptions::new().len(len).map_raw(file)?,
        }))
    }

    /// The 64-bit word at `offset`.
    pub fn u64_at(&self, offset: usize) -> &AtomicU64 {
        let word = self
            .at_mut(offset, align_of::<AtomicU64>(), size_of::<AtomicU64>())
            .cast::<u64>();
        // SAFETY: inside the mapping and aligned, as `at_mut` checked; writable, and mapped until `self` is dropped.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// The 32-bit word at `offset`.
    pub fn u32_at(&self, offset: usize) -> &AtomicU32 {
        let word = self
            .at_mut(offset, align_of::<AtomicU32>(), size_of::<AtomicU32>())
            .cast::<u32>();
        // SAFETY: as in `u64_at`.
        unsafe { AtomicU32::from_ptr(word) }
    }

    /// Copies `bytes` to `offset`, by ordinary stores.
    pub fn write_bytes(&self, offset: usize, bytes: &[u8]) {
        let target = self.at_mut(offset, 1, bytes.len());
        // SAFETY: the range is inside the mapping, over which there are no slices, so `bytes` cannot overlap.
        unsafe { target.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// The range as the target of a copy.
    pub fn target(&self, offset: usize, len: usize) -> ByteTarget<'_> {
        // SAFETY: inside the mapping, which is writable and which the result borrows; nobody has references to bytes.
        unsafe { ByteTarget::from_raw(self.at_mut(offset, 1, len), len) }
    }

    /// Allocates and maps the pages of `range` before they are used. Content does not change.
    pub fn populate_write(&self, range: Range<usize>) -> io::Result<()> {
        let pages = self.pages(&range);
        self.advise_or(Advice::PopulateWrite, pages, |page| {
            // SAFETY: inside the mapping and writable. A read-modify-write that changes no bit makes the page writable
            // without losing what another thread writes at the same time.
            unsafe { AtomicU8::from_ptr(page) }.fetch_or(0, Ordering::Relaxed);
        })
    }

    fn at_mut(&self, offset: usize, alignment: usize, len: usize) -> *mut u8 {
        self.at(offset, alignment, len);
        // Inside the mapping, as `at` checked.
        self.0.raw.as_mut_ptr().wrapping_add(offset)
    }
}

impl Deref for WriteMapping {
    type Target = ReadMapping;

    fn deref(&self) -> &ReadMapping {
        &self.0
    }
}

fn check_file_length(file: &File, len: usize) -> io::Result<()> {
    let found = file.metadata()?.len();
    if found < len as u64 {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("the file has {found} bytes, {len} are needed"),
        ));
    }
    Ok(())
}
