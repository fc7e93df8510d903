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
use std::mem::ManuallyDrop;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::{ByteSource, ByteTarget, PAGE_BYTES};

/// A shared mapping of a file, for reading.
#[derive(Debug)]
pub struct ReadMapping {
    raw: ManuallyDrop<MmapRaw>,
    process: u32,
}

impl Drop for ReadMapping {
    fn drop(&mut self) {
        // In a forked child a mapping that stays out of children is not there, and something else may lie in its place.
        if self.process == std::process::id() {
            // SAFETY: dropped here only, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.raw) };
        }
    }
}

impl ReadMapping {
    /// Maps the first `len` bytes of `file`, which must be open for reading. The length is checked against the file's.
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        check_file_length(file, len)?;
        Ok(Self {
            raw: ManuallyDrop::new(MmapOptions::new().len(len).map_raw_read_only(file)?),
            process: std::process::id(),
        })
    }

    /// Bytes of the mapping.
    #[allow(clippy::len_without_is_empty, reason = "no segment is empty")]
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
        let result = self
            .raw
            .advise_range(Advice::PopulateRead, pages.start, pages.len());
        self.or_touch(result, pages, |page| {
            // SAFETY: inside the mapping; a relaxed load works in read-only memory.
            unsafe { AtomicU8::from_ptr(page) }.load(Ordering::Relaxed);
        })
    }

    /// Reads a byte of each page of `range`, so that the copy that follows finds all of them mapped.
    pub fn touch(&self, range: Range<usize>) {
        for offset in self.pages(&range).step_by(PAGE_BYTES) {
            self.at(offset, 1, 1);
            let page = self.raw.as_mut_ptr().wrapping_add(offset);
            // SAFETY: inside the mapping, as `at` checked; a relaxed load works in read-only memory.
            unsafe { AtomicU8::from_ptr(page) }.load(Ordering::Relaxed);
        }
    }

    /// Whether all pages of `range` are in memory now. They may be gone a moment later. `false` too where the kernel
    /// does not tell.
    pub fn is_resident(&self, range: Range<usize>) -> bool {
        /// 2 MiB in one call.
        const PAGES_PER_CALL: usize = 512;
        let mut states = [0_u8; PAGES_PER_CALL];
        let pages = self.pages(&range);
        pages.clone().step_by(PAGES_PER_CALL * PAGE_BYTES).all(|start| {
            let len = (pages.end - start).min(PAGES_PER_CALL * PAGE_BYTES);
            let states = &mut states[..len.div_ceil(PAGE_BYTES)];
            let address = self.at(start, 1, len).cast_mut().cast();
            // SAFETY: the range is inside the mapping, as `at` checked, and starts at a page, as `pages` makes it; the
            // kernel writes one byte for each of its pages, for which there is room.
            let result = unsafe { libc::mincore(address, len, states.as_mut_ptr()) };
            result == 0 && states.iter().all(|state| state & 1 == 1)
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

    /// Touches page by page where the kernel (before 5.14) does not know the advice that `result` answers.
    fn or_touch(
        &self,
        result: io::Result<()>,
        pages: Range<usize>,
        touch: impl Fn(*mut u8),
    ) -> io::Result<()> {
        match result {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                for offset in pages.step_by(PAGE_BYTES) {
                    self.at(offset, 1, 1);
                    // The pointer of the mapping itself: one that came from a const pointer could not be written.
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
            raw: ManuallyDrop::new(MmapOptions::new().len(len).map_raw(file)?),
            process: std::process::id(),
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
        let result = self
            .0
            .raw
            .advise_range(Advice::PopulateWrite, pages.start, pages.len());
        self.or_touch(result, pages, |page| {
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

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    const LEN: usize = 4 * PAGE_BYTES;

    fn file(len: usize) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len as u64).unwrap();
        file
    }

    #[test]
    fn what_one_mapping_writes_the_other_reads() {
        let file = file(LEN);
        let (writer, reader) = (
            WriteMapping::new(&file, LEN).unwrap(),
            ReadMapping::new(&file, LEN).unwrap(),
        );
        writer.write_bytes(LEN - 3, b"end");
        writer.u64_at(8).store(0x0102_0304_0506_0708, Ordering::Release);
        writer.u32_at(4).store(9, Ordering::Release);
        let mut bytes = [0; 3];
        reader.read_bytes(LEN - 3, &mut bytes);
        assert_eq!(&bytes, b"end");
        assert_eq!(reader.load_u64(8), 0x0102_0304_0506_0708);
        assert_eq!(reader.load_u32(4), 9);
        assert_eq!((reader.source(1, 7).len(), writer.target(1, 7).len()), (7, 7));
    }

    #[test]
    fn a_reader_of_a_file_that_it_may_not_write_gets_a_mapping() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("segment");
        std::fs::write(&path, vec![5; LEN]).unwrap();
        let read_only = OpenOptions::new().read(true).open(&path).unwrap();
        let reader = ReadMapping::new(&read_only, LEN).unwrap();
        reader.populate_read(0..LEN).unwrap();
        assert_eq!(reader.load_u32(LEN - 4), 0x0505_0505);
        assert!(WriteMapping::new(&read_only, LEN).is_err());
    }

    #[test]
    fn populating_changes_no_byte() {
        let file = file(LEN);
        let writer = WriteMapping::new(&file, LEN).unwrap();
        writer.write_bytes(PAGE_BYTES + 1, b"kept");
        writer.populate_write(PAGE_BYTES + 2..3 * PAGE_BYTES).unwrap();
        writer.populate_write(0..0).unwrap();
        writer.dont_fork().unwrap();
        let mut bytes = [0; 4];
        writer.read_bytes(PAGE_BYTES + 1, &mut bytes);
        assert_eq!(&bytes, b"kept");
    }

    #[test]
    fn on_an_old_kernel_each_page_is_touched_instead() {
        let writer = WriteMapping::new(&file(LEN), LEN).unwrap();
        let start = writer.at(0, 1, 1).addr();
        let touched = std::cell::RefCell::new(Vec::new());
        let touch = |page: *mut u8| touched.borrow_mut().push(page.addr() - start);
        let answer = |code| Err(io::Error::from_raw_os_error(code));
        writer
            .or_touch(answer(libc::EINVAL), PAGE_BYTES..LEN, touch)
            .unwrap();
        assert_eq!(touched.take(), [PAGE_BYTES, 2 * PAGE_BYTES, 3 * PAGE_BYTES]);
        writer.or_touch(answer(libc::ENOMEM), 0..LEN, touch).unwrap_err();
        writer.or_touch(Ok(()), 0..LEN, touch).unwrap();
        assert!(touched.take().is_empty());
    }

    #[test]
    fn a_file_shorter_than_the_mapping_is_refused() {
        let error = ReadMapping::new(&file(LEN - 1), LEN).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(WriteMapping::new(&file(LEN - 1), LEN).is_err());
    }

    #[test]
    #[should_panic(expected = "not a multiple of 8")]
    fn a_misaligned_word_panics() {
        ReadMapping::new(&file(LEN), LEN).unwrap().load_u64(4);
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn a_word_across_the_end_panics() {
        WriteMapping::new(&file(LEN), LEN).unwrap().u64_at(LEN);
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn an_offset_that_overflows_panics() {
        ReadMapping::new(&file(LEN), LEN).unwrap().source(usize::MAX, 2);
    }
}
