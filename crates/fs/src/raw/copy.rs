//! The copy engine: one pass that copies and checksums, over raw addresses.
//!
//! Whole pages go through [`mod@super::fold`] where the machine has the instructions. Everything else goes this way:
//!
//! ```text
//! for each 4 KiB:
//!     source -> chunk            a buffer on the stack that stays in the L1 cache
//!     crc of the chunk
//!     chunk -> target            non-temporal stores, while the next 4 KiB of the source are prefetched
//! ```
//!
//! The bytes that are checked are thus exactly the bytes that are delivered, whatever another process does to the shared
//! mapping meanwhile. Non-temporal stores save the target's read for ownership, a third of the memory traffic of a copy.
//! The hardware prefetchers stop at each page and know nothing of the next run, so prefetching by hand hides the latency
//! that the checksum would add.

use std::mem::MaybeUninit;
use std::sync::atomic::{Ordering, fence};

use super::fold::fold_pages;
use super::kernel::{LINE_BYTES, gather, stream};
use super::{ByteSource, ByteTarget, Kernel, LayerCrc};

/// Bytes that are copied, checksummed and written while they are in the L1 cache.
const CHUNK_BYTES: usize = 4096;

/// Says that nothing is known about the next copy.
pub(super) const NOTHING: (*const u8, usize) = (std::ptr::null(), 0);

/// Orders every store before it, non-temporal ones too, before every store after it.
///
/// Non-temporal stores are not ordered by a release store alone.
pub fn store_fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: `sfence` is part of SSE, which every x86-64 has.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
    fence(Ordering::SeqCst);
}

/// Copies `source` to `target` and appends the bytes to `crc`, if one is given. [`store_fence`] must come before the target
/// is published.
///
/// # Panics
/// If the two have different lengths or overlap.
pub fn copy_bytes(source: ByteSource<'_>, target: ByteTarget<'_>, crc: Option<&mut LayerCrc>) {
    let (from, to) = (source.pointer(), target.pointer());
    let len = source.len();
    assert!(len == target.len(), "{len} bytes into {}", target.len());
    assert!(
        from.addr() + len <= to.addr() || to.addr() + len <= from.addr(),
        "a copy onto itself"
    );
    // SAFETY: both are valid for their length by their types, the lengths are equal and the ranges apart, as checked; the
    // kernel is one of this machine's.
    unsafe { copy_run(Kernel::best(), from, to, len, crc, NOTHING) };
}

/// Copies `len` bytes and appends them to `crc`, if one is given. Whoever publishes the target calls [`store_fence`]
/// first. `next` is what the next copy will read, if that is known; it is only prefetched.
///
/// # Safety
/// `len` bytes are readable at `source` and writable at `target`, the two do not overlap, and this machine has the
/// instructions of `kernel`. Others may write the source meanwhile: the target then holds a mix, and `crc` is the
/// checksum of exactly that mix.
pub(super) unsafe fn copy_run(
    kernel: Kernel,
    source: *const u8,
    target: *mut u8,
    len: usize,
    crc: Option<&mut LayerCrc>,
    next: (*const u8, usize),
) {
    // Bytes up to the target's first whole cache line: a line that is written in part must go through the cache.
    let head = target.align_offset(LINE_BYTES).min(len);
    let tail = (len - head) % LINE_BYTES;
    let body_end = len - tail;
    // SAFETY: head, body and tail are the caller's ranges cut into three; the body's target is aligned to a line, and its
    // length a multiple of one. `fill` gives as many bytes as it is asked for, in memory that overlaps nothing.
    unsafe {
        match crc {
            None => {
                source.copy_to_nonoverlapping(target, head);
                let mut done = head;
                if kernel.folds() {
                    let (from, to) = (source.add(done), target.add(done));
                    done += fold_pages(kernel, from, Some(to), body_end - done, None, address(next));
                }
                stream(
                    kernel,
                    source.add(done),
                    target.add(done),
                    body_end - done,
                    NOTHING,
                );
                source
                    .add(body_end)
                    .copy_to_nonoverlapping(target.add(body_end), tail);
            }
            Some(crc) => {
                let mut chunk = Chunk::new();
                let mut done = head;
                if head > 0 {
                    chunk
                        .fill(kernel, source, head, crc)
                        .copy_to_nonoverlapping(target, head);
                }
                if kernel.folds() {
                    let (from, to) = (source.add(done), target.add(done));
                    done += fold_pages(kernel, from, Some(to), body_end - done, Some(crc), address(next));
                }
                while done < body_end {
                    let step = CHUNK_BYTES.min(body_end - done);
                    let bytes = chunk.fill(kernel, source.add(done), step, crc);
                    let behind = done + step;
                    let ahead = if behind < body_end {
                        (source.add(behind), body_end - behind)
                    } else {
                        next
                    };
                    stream(kernel, bytes, target.add(done), step, ahead);
                    done += step;
                }
                if tail > 0 {
                    chunk
                        .fill(kernel, source.add(done), tail, crc)
                        .copy_to_nonoverlapping(target.add(done), tail);
                }
            }
        }
    }
}

/// Appends `len` bytes to `crc` without copying them anywhere. `next` is as for [`copy_run`].
///
/// # Safety
/// `len` bytes are readable at `source`, and this machine has the instructions of `kernel`. Others may write the source
/// meanwhile.
pub(super) unsafe fn checksum_run(
    kernel: Kernel,
    source: *const u8,
    len: usize,
    crc: &mut LayerCrc,
    next: (*const u8, usize),
) {
    let mut done = 0;
    if kernel.folds() {
        // SAFETY: the caller's contract; nothing is stored.
        done = unsafe { fold_pages(kernel, source, None, len, Some(crc), address(next)) };
    }
    let mut chunk = Chunk::new();
    while done < len {
        let step = CHUNK_BYTES.min(len - done);
        // SAFETY: done + step is at most `len`.
        unsafe { chunk.fill(kernel, source.add(done), step, crc) };
        done += step;
    }
}

/// Where `next` begins, if that is known.
fn address(next: (*const u8, usize)) -> Option<*const u8> {
    (next.1 > 0).then_some(next.0)
}

/// The bytes on their way, in memory that nobody else writes.
#[repr(align(64))]
struct Chunk([MaybeUninit<u8>; CHUNK_BYTES]);

impl Chunk {
    fn new() -> Self {
        Self([MaybeUninit::uninit(); CHUNK_BYTES])
    }

    /// Takes `len` bytes of `source`, appends them to `crc` and returns where they lie.
    ///
    /// # Safety
    /// `len` bytes are readable at `source`, `len` is at most [`CHUNK_BYTES`], and this machine has the instructions of
    /// `kernel`.
    #[inline]
    unsafe fn fill(
        &mut self,
        kernel: Kernel,
        source: *const u8,
        len: usize,
        crc: &mut LayerCrc,
    ) -> *const u8 {
        debug_assert!(len <= CHUNK_BYTES);
        let bytes = self.0.as_mut_ptr().cast::<u8>();
        let tail = len % LINE_BYTES;
        let body = len - tail;
        // SAFETY: the caller vouches for the source; the buffer is our own, long enough and aligned to a line.
        unsafe {
            gather(kernel, source, bytes, body);
            source.add(body).copy_to_nonoverlapping(bytes.add(body), tail);
        }
        // SAFETY: no instruction at all. To the compiler it may read and change the buffer, so that it cannot replace
        // the buffer by a second look at the source, which may be different by then.
        unsafe { std::arch::asm!("/* {0} */", in(reg) bytes, options(nostack, preserves_flags)) };
        // SAFETY: the copies above initialised `len` bytes, and nobody else has the buffer.
        crc.update(unsafe { std::slice::from_raw_parts(bytes, len) });
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bit by bit, as the definition has it.
    fn naive_crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| {
                (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 }
            })
        })
    }

    fn naive_layer_crc(key: &[u8; 32], layer: u32, bytes: &[u8]) -> u32 {
        naive_crc32(&[key.as_slice(), &layer.to_le_bytes(), bytes].concat())
    }

    fn content(len: usize) -> Vec<u8> {
        (0..len)
            .map(|index| (index as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0])
            .collect()
    }

    /// Copies `len` bytes between buffers at the given distances from a cache line, with guards around the target.
    fn copy_at(kernel: Kernel, source_shift: usize, target_shift: usize, len: usize, is_checked: bool) {
        const GUARD: u8 = 0xa5;
        let source = content(len + 2 * LINE_BYTES);
        let start = source.as_ptr().align_offset(LINE_BYTES) + source_shift;
        let bytes = &source[start..start + len];
        let mut target = vec![GUARD; len + 4 * LINE_BYTES];
        let start = target.as_ptr().align_offset(LINE_BYTES) + LINE_BYTES + target_shift;
        let mut crc = LayerCrc::new(&[3; 32], 9);
        // SAFETY: both ranges lie inside their vectors; callers take kernels of this machine.
        unsafe {
            copy_run(
                kernel,
                bytes.as_ptr(),
                target.as_mut_ptr().add(start),
                len,
                is_checked.then_some(&mut crc),
                NOTHING,
            );
        }
        store_fence();
        let place = format!("{kernel:?}, source + {source_shift}, target + {target_shift}, {len} bytes");
        assert!(&target[start..start + len] == bytes, "wrong bytes: {place}");
        assert!(
            target[..start].iter().all(|&byte| byte == GUARD),
            "written in front: {place}"
        );
        assert!(
            target[start + len..].iter().all(|&byte| byte == GUARD),
            "written behind: {place}"
        );
        if is_checked {
            assert_eq!(crc.value(), naive_layer_crc(&[3; 32], 9, bytes), "{place}");
        }
    }

    #[test]
    fn every_kernel_copies_every_short_length_at_any_alignment() {
        for kernel in Kernel::available() {
            for len in 0..4 * LINE_BYTES + 3 {
                for (source_shift, target_shift) in [(0, 0), (1, 0), (0, 1), (63, 5), (8, 32), (17, 63)] {
                    copy_at(kernel, source_shift, target_shift, len, true);
                    copy_at(kernel, source_shift, target_shift, len, false);
                }
            }
        }
    }

    #[test]
    fn every_kernel_copies_lengths_around_its_chunks() {
        for kernel in Kernel::available() {
            for chunks in 1..18 {
                for len in [
                    chunks * CHUNK_BYTES - 65,
                    chunks * CHUNK_BYTES - 1,
                    chunks * CHUNK_BYTES + 1,
                ] {
                    copy_at(kernel, 0, 0, len, true);
                    copy_at(kernel, 3, 60, len, true);
                    copy_at(kernel, 3, 60, len, false);
                }
                copy_at(kernel, 0, 0, chunks * CHUNK_BYTES, true);
            }
        }
    }

    #[test]
    fn this_machine_has_a_portable_kernel_and_the_best_one_first() {
        let kernels = Kernel::available();
        assert_eq!(kernels.last(), Some(&Kernel::Portable));
        assert_eq!(Kernel::best(), kernels[0]);
    }

    #[test]
    fn the_checksum_of_a_layer_depends_on_its_key_and_number() {
        let value = |key: &[u8; 32], layer: u32| {
            let mut crc = LayerCrc::new(key, layer);
            crc.update(b"payload");
            crc.value()
        };
        assert_eq!(value(&[1; 32], 2), naive_layer_crc(&[1; 32], 2, b"payload"));
        assert_ne!(value(&[1; 32], 2), value(&[1; 32], 3));
        assert_ne!(value(&[1; 32], 2), value(&[2; 32], 2));
    }

    #[test]
    fn a_checked_copy_of_changing_memory_delivers_exactly_the_bytes_of_its_checksum() {
        use std::sync::atomic::{AtomicBool, AtomicU64};
        use std::time::{Duration, Instant};
        const MIXES: u32 = 500;
        // As many pages as any kernel handles side by side.
        const LEN_BYTES: usize = 8 * CHUNK_BYTES;
        let words: Vec<AtomicU64> = (0..LEN_BYTES / 8).map(|_| AtomicU64::new(0)).collect();
        let is_done = AtomicBool::new(false);
        let end = Instant::now() + Duration::from_secs(60);
        let mut mixes = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut round = 1_u64;
                while !is_done.load(Ordering::Relaxed) && Instant::now() < end {
                    words.iter().for_each(|word| word.store(round, Ordering::Relaxed));
                    round += 1;
                }
            });
            let mut target = vec![0_u64; words.len()];
            let mut last_sum = 0;
            for kernel in Kernel::available() {
                let mut kernel_mixes = 0;
                while kernel_mixes < MIXES && Instant::now() < end {
                    let mut crc = LayerCrc::new(&[0; 32], 0);
                    let (source, place) = (words.as_ptr().cast(), target.as_mut_ptr().cast());
                    // SAFETY: both vectors have as many bytes.
                    unsafe { copy_run(kernel, source, place, LEN_BYTES, Some(&mut crc), NOTHING) };
                    store_fence();
                    let mut expected = LayerCrc::new(&[0; 32], 0);
                    target
                        .iter()
                        .for_each(|word| expected.update(&word.to_ne_bytes()));
                    // A mix that was there before proves nothing: the writer may be asleep.
                    let is_mix = target.iter().any(|word| *word != target[0]);
                    let sum: u64 = target.iter().sum();
                    kernel_mixes += u32::from(is_mix && sum != last_sum);
                    last_sum = sum;
                    if crc.value() != expected.value() {
                        is_done.store(true, Ordering::Relaxed);
                        panic!("{kernel:?} delivered other bytes than it checked");
                    }
                }
                mixes.push(kernel_mixes);
            }
            is_done.store(true, Ordering::Relaxed);
        });
        assert!(
            mixes.iter().all(|&count| count > 0),
            "the memory did not change during a copy: {mixes:?}"
        );
    }

    proptest! {
        #[test]
        fn copies_equal_memcpy_and_checksums_equal_the_naive_one(
            len in 0_usize..80_000,
            source_shift in 0_usize..64,
            target_shift in 0_usize..64,
            kernel in proptest::sample::select(Kernel::available()),
            is_checked: bool,
        ) {
            copy_at(kernel, source_shift, target_shift, len, is_checked);
        }

        #[test]
        fn the_checksum_does_not_depend_on_how_bytes_fall_into_runs(
            pieces in prop::collection::vec(0_usize..40_000, 0..6),
            kernel in proptest::sample::select(Kernel::available()),
        ) {
            let bytes = content(pieces.iter().sum());
            let (mut crc, mut start) = (LayerCrc::new(&[8; 32], 1), 0);
            for len in pieces {
                let piece = &bytes[start..start + len];
                // SAFETY: a slice, and a kernel of this machine.
                unsafe { checksum_run(kernel, piece.as_ptr(), len, &mut crc, NOTHING) };
                start += len;
            }
            prop_assert_eq!(crc.value(), naive_layer_crc(&[8; 32], 1, &bytes));
        }
    }
}
