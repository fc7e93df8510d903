//! The copy engine: one pass that copies and checksums, over raw addresses.
//!
//! Per 4 KiB: copy the source into a buffer on the stack (it stays in the L1 cache), checksum that buffer, then write it
//! to the target with non-temporal stores. The bytes that are checked are thus exactly the bytes that are delivered,
//! whatever another process does to the shared mapping meanwhile. Non-temporal stores save the target's read for
//! ownership, which is a third of the memory traffic of a copy.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};

use crc_fast::{CrcAlgorithm, Digest};

/// Bytes that are copied, checksummed and written while they are in the L1 cache.
const CHUNK_BYTES: usize = 4096;
/// Unit of non-temporal stores: a cache line, written whole or not at all.
const LINE_BYTES: usize = 64;

/// CRC-32 (ISO-HDLC, as in zlib) of one layer of one block, seeded with the block's key and the layer's number.
///
/// The seed makes a payload that lies in the wrong slot, or in the wrong layer of the right slot, fail its check.
#[derive(Clone, Debug)]
pub struct LayerCrc(Digest);

impl LayerCrc {
    /// Starts the checksum of layer `layer` of the block named `key`.
    pub fn new(key: &[u8; 32], layer: u32) -> Self {
        let mut seed = [0_u8; 36];
        seed[..32].copy_from_slice(key);
        seed[32..].copy_from_slice(&layer.to_le_bytes());
        let mut digest = Digest::new(CrcAlgorithm::Crc32IsoHdlc);
        digest.update(&seed);
        Self(digest)
    }

    /// Appends bytes that nobody else writes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of everything so far.
    pub fn value(&self) -> u32 {
        // The digest is 64 bits wide for its longer algorithms; a CRC-32 fills the low half.
        self.0.finalize() as u32
    }
}

/// A range that a copy reads, valid for `'a`.
#[derive(Clone, Copy, Debug)]
pub struct ByteSource<'a> {
    pointer: *const u8,
    len: usize,
    owner: PhantomData<&'a [u8]>,
}

impl<'a> ByteSource<'a> {
    /// # Safety
    /// `len` bytes at `pointer` stay readable for `'a`. Others may write them.
    pub(super) unsafe fn from_raw(pointer: *const u8, len: usize) -> Self {
        Self { pointer, len, owner: PhantomData }
    }

    /// Bytes of the range.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn pointer(&self) -> *const u8 {
        self.pointer
    }
}

impl<'a> From<&'a [u8]> for ByteSource<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self { pointer: bytes.as_ptr(), len: bytes.len(), owner: PhantomData }
    }
}

/// A range that a copy writes, valid for `'a`.
#[derive(Debug)]
pub struct ByteTarget<'a> {
    pointer: *mut u8,
    len: usize,
    owner: PhantomData<&'a mut [u8]>,
}

impl<'a> ByteTarget<'a> {
    /// # Safety
    /// `len` bytes at `pointer` stay writable for `'a`, and no reference to them is used meanwhile.
    pub(super) unsafe fn from_raw(pointer: *mut u8, len: usize) -> Self {
        Self { pointer, len, owner: PhantomData }
    }

    /// Bytes of the range.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn pointer(&self) -> *mut u8 {
        self.pointer
    }
}

impl<'a> From<&'a mut [u8]> for ByteTarget<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        Self { pointer: bytes.as_mut_ptr(), len: bytes.len(), owner: PhantomData }
    }
}

/// How whole cache lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// Non-temporal stores of 64 bytes.
    Avx512,
    /// Non-temporal stores of 32 bytes.
    Avx2,
    /// Non-temporal stores of 16 bytes, which every x86-64 has.
    Sse2,
    /// The library's copy, through the cache.
    Portable,
}

impl Kernel {
    /// The fastest kernel of this machine.
    pub fn best() -> Self {
        static BEST: OnceLock<Kernel> = OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }

    /// All kernels that this machine can run, fastest first.
    pub fn available() -> Vec<Self> {
        let mut kernels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                kernels.push(Self::Avx512);
            }
            if is_x86_feature_detected!("avx2") {
                kernels.push(Self::Avx2);
            }
            kernels.push(Self::Sse2);
        }
        kernels.push(Self::Portable);
        kernels
    }
}

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

/// Copies `len` bytes and appends them to `crc`, if one is given. Whoever publishes the target calls [`store_fence`]
/// first.
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
) {
    // Bytes up to the target's first whole cache line: a line that is written in part must go through the cache.
    let head = target.align_offset(LINE_BYTES).min(len);
    let tail = (len - head) % LINE_BYTES;
    let body = len - head - tail;
    // SAFETY: head + body + tail is `len`, so the three ranges lie inside those of the caller; the target of the body is
    // line-aligned and its length a multiple of a line.
    unsafe {
        match crc {
            None => {
                source.copy_to_nonoverlapping(target, head);
                stream(kernel, source.add(head), target.add(head), body);
                source.add(head + body).copy_to_nonoverlapping(target.add(head + body), tail);
            }
            Some(crc) => {
                let mut chunk = Chunk::new();
                chunk.fill(source, head, crc).copy_to_nonoverlapping(target, head);
                let mut done = head;
                while done < head + body {
                    let step = CHUNK_BYTES.min(head + body - done);
                    let bytes = chunk.fill(source.add(done), step, crc);
                    stream(kernel, bytes, target.add(done), step);
                    done += step;
                }
                chunk.fill(source.add(done), tail, crc).copy_to_nonoverlapping(target.add(done), tail);
            }
        }
    }
}

/// Appends `len` bytes to `crc` without copying them.
///
/// # Safety
/// `len` bytes are readable at `source`. Others may write them meanwhile.
pub(super) unsafe fn checksum_run(source: *const u8, len: usize, crc: &mut LayerCrc) {
    let mut chunk = Chunk::new();
    let mut done = 0;
    while done < len {
        let step = CHUNK_BYTES.min(len - done);
        // SAFETY: done + step is at most `len`.
        unsafe { chunk.fill(source.add(done), step, crc) };
        done += step;
    }
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
    /// `len` bytes are readable at `source`, and `len` is at most [`CHUNK_BYTES`].
    unsafe fn fill(&mut self, source: *const u8, len: usize, crc: &mut LayerCrc) -> *const u8 {
        debug_assert!(len <= CHUNK_BYTES);
        let bytes = self.0.as_mut_ptr().cast::<u8>();
        // SAFETY: the caller vouches for the source; the buffer is our own and long enough.
        unsafe { source.copy_to_nonoverlapping(bytes, len) };
        // SAFETY: no instruction at all. To the compiler it may read and change the buffer, so that it cannot replace
        // the buffer by a second look at the source, which may be different by then.
        unsafe { std::arch::asm!("/* {0} */", in(reg) bytes, options(nostack, preserves_flags)) };
        // SAFETY: the copy above initialised `len` bytes, and nobody else has the buffer.
        crc.update(unsafe { std::slice::from_raw_parts(bytes, len) });
        bytes
    }
}

/// Copies whole cache lines.
///
/// # Safety
/// As [`copy_run`]; in addition `target` is aligned to a line and `len` is a multiple of one.
unsafe fn stream(kernel: Kernel, source: *const u8, target: *mut u8, len: usize) {
    // SAFETY: the caller's contract is that of each kernel, and it vouches for the instructions.
    unsafe {
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => x86::stream_avx512(source, target, len),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => x86::stream_avx2(source, target, len),
            #[cfg(target_arch = "x86_64")]
            Kernel::Sse2 => x86::stream_sse2(source, target, len),
            _ => source.copy_to_nonoverlapping(target, len),
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, __m256i, __m512i, _mm_loadu_si128, _mm_stream_si128, _mm256_loadu_si256, _mm256_stream_si256,
        _mm512_loadu_si512, _mm512_stream_si512,
    };

    use super::LINE_BYTES;

    macro_rules! stream {
        ($name:ident, $feature:literal, $vector:ty, $load:ident, $store:ident) => {
            /// # Safety
            /// As `super::stream`, on a machine with the instructions of the name.
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn $name(source: *const u8, target: *mut u8, len: usize) {
                const WIDTH: usize = size_of::<$vector>();
                const VECTORS: usize = LINE_BYTES / WIDTH;
                debug_assert!(target.addr().is_multiple_of(LINE_BYTES) && len.is_multiple_of(LINE_BYTES));
                let mut done = 0;
                while done < len {
                    // SAFETY: a line at `done` lies inside both ranges, because `len` is a multiple of a line; the
                    // target is aligned, as the stores ask.
                    unsafe {
                        let mut line = [const { std::mem::zeroed::<$vector>() }; VECTORS];
                        for (index, vector) in line.iter_mut().enumerate() {
                            *vector = $load(source.add(done + index * WIDTH).cast());
                        }
                        for (index, vector) in line.into_iter().enumerate() {
                            $store(target.add(done + index * WIDTH).cast(), vector);
                        }
                    }
                    done += LINE_BYTES;
                }
            }
        };
    }

    stream!(stream_avx512, "avx512f", __m512i, _mm512_loadu_si512, _mm512_stream_si512);
    stream!(stream_avx2, "avx2", __m256i, _mm256_loadu_si256, _mm256_stream_si256);
    stream!(stream_sse2, "sse2", __m128i, _mm_loadu_si128, _mm_stream_si128);
}
