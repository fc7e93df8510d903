//! Copy and checksum of whole pages in one pass over the registers, several pages at a time.
//!
//! ```text
//! for each step of two cache lines, for each of up to eight pages side by side:
//!     load    -> registers
//!     fold    the page's remainder by the step, add the step      (carry-less multiplication)
//!     store   past the cache, or not at all
//! ```
//!
//! The registers that are folded are the registers that are stored, so the bytes that are checked are the bytes that are
//! delivered. Pages go side by side because a hardware prefetcher follows one page at a time and stops at its end: a
//! single stream waits for memory at every page, eight keep more reads in flight than one core has otherwise. The pages
//! that come next are touched by a prefetch, as no hardware could know where the next run is: that takes a tenth off a
//! copy. Two lines at once let the memory controller join the writes.
//!
//! # Folding
//! A CRC is the remainder of the message, read as a polynomial, modulo P. `x^d` times 64 bits has the same remainder as
//! the product of those bits with `x^d mod P`, so 64 bytes of remainder can be carried over any distance by two
//! multiplications for each 128 bits (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
//! Instruction", Intel 2009). A page is carried by its own length onto the next one; what is left at the end are 64
//! bytes with the remainder of everything so far, which [`LayerCrc`] takes as a message of its own.

use super::PAGE_BYTES;
use super::crc::LayerCrc;
use super::kernel::{Kernel, LINE_BYTES};

/// Bytes of a page that are handled before it is the next page's turn.
const STEP_BYTES: usize = 2 * LINE_BYTES;

impl Kernel {
    /// Whether [`fold_pages`] has a way for this kernel: the vector instructions of x86-64 only.
    pub(super) fn folds(self) -> bool {
        matches!(self, Kernel::Avx512Fold | Kernel::Avx2Fold)
    }
}

/// Handles the whole pages at the start of `source` and returns their bytes: copies them to `target` and appends them to
/// `crc`, if one is given. `next` is where the pages that are handled afterwards begin; they are prefetched a little, so a
/// wrong guess costs time only.
///
/// # Safety
/// `len` bytes are readable at `source` and, if it is given, writable at `target`. The two do not overlap, and the target
/// is aligned to a line if there is a page to be handled. `kernel` folds and is one of this machine's. Others may write the
/// source meanwhile: the target then holds a mix, and `crc` is the checksum of exactly that mix.
pub(super) unsafe fn fold_pages(
    kernel: Kernel,
    source: *const u8,
    target: Option<*mut u8>,
    len: usize,
    crc: Option<&mut LayerCrc>,
    next: Option<*const u8>,
) -> usize {
    let len = len - len % PAGE_BYTES;
    if len == 0 {
        return 0;
    }
    debug_assert!(kernel.folds());
    debug_assert!(target.is_none_or(|target| target.addr().is_multiple_of(LINE_BYTES)));
    let mut line = [0; LINE_BYTES];
    let is_checked = crc.is_some();
    if let Some(crc) = &crc {
        line[..4].copy_from_slice(&crc.register().to_le_bytes());
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's contract is that of each, and it vouches for the instructions.
    unsafe {
        match kernel {
            Kernel::Avx512Fold => x86::avx512::pages(source, target, len, is_checked, next, &mut line),
            _ => x86::avx2::pages(source, target, len, is_checked, next, &mut line),
        }
    }
    if let Some(crc) = crc {
        crc.resume(&line);
    }
    len
}

/// `x^n mod P`, least significant bit first, as a factor of a carry-less multiplication of such numbers.
const fn power(n: usize) -> u64 {
    let mut remainder = 1_u32 << 31;
    let mut step = 0;
    while step < n {
        remainder = (remainder >> 1) ^ (0xedb8_8320 * (remainder & 1));
        step += 1;
    }
    (remainder as u64) << 1
}

/// The two factors that carry 128 bits over a distance: for the first and the second 64 of them.
const fn factors(distance_bytes: usize) -> [u64; 2] {
    [power(8 * distance_bytes + 32), power(8 * distance_bytes - 32)]
}

const LINE_FACTORS: [u64; 2] = factors(LINE_BYTES);
const PAGE_FACTORS: [u64; 2] = factors(PAGE_BYTES);

#[cfg(target_arch = "x86_64")]
mod x86 {
    macro_rules! folding {
        (
            $name:ident, $feature:literal, $class:ident, $($most:literal)|+ pages, $vector:ty, $zero:ident, $load:ident, $store_past:ident, $multiply:ident, $xor:ident, $broadcast:expr
        ) => {
            pub(super) mod $name {
                use std::arch::asm;
                use std::arch::x86_64::*;

                use super::super::{LINE_BYTES, LINE_FACTORS, PAGE_BYTES, PAGE_FACTORS, STEP_BYTES};

                /// Vectors of a cache line.
                const VECTORS: usize = LINE_BYTES / size_of::<$vector>();
                type Line = [$vector; VECTORS];

                /// # Safety
                /// As `fold_pages`, on a machine with the instructions of the module's name; `len` is a number of whole
                /// pages. `line` starts as the register of the checksum, and ends as the remainder.
                #[target_feature(enable = $feature)]
                pub(in super::super) unsafe fn pages(
                    source: *const u8,
                    target: Option<*mut u8>,
                    len: usize,
                    is_checked: bool,
                    next: Option<*const u8>,
                    line: &mut [u8; LINE_BYTES],
                ) {
                    // SAFETY: the caller's contract.
                    unsafe {
                        match (target, is_checked) {
                            (Some(target), true) => all::<true, true>(source, target, len, next, line),
                            (Some(target), false) => all::<true, false>(source, target, len, next, line),
                            (None, _) => all::<false, true>(source, std::ptr::null_mut(), len, next, line),
                        }
                    }
                }

                /// # Safety
                /// As `pages`.
                #[target_feature(enable = $feature)]
                unsafe fn all<const IS_COPIED: bool, const IS_CHECKED: bool>(
                    source: *const u8,
                    target: *mut u8,
                    len: usize,
                    next: Option<*const u8>,
                    line: &mut [u8; LINE_BYTES],
                ) {
                    let mut seed: Line = [$zero(); VECTORS];
                    for (vector, bytes) in seed.iter_mut().zip(line.chunks_exact(size_of::<$vector>())) {
                        // SAFETY: the piece has the size of a vector.
                        *vector = unsafe { $load(bytes.as_ptr().cast()) };
                    }
                    let mut total: Line = [$zero(); VECTORS];
                    let mut done = 0;
                    while done < len {
                        let left = (len - done) / PAGE_BYTES;
                        let (from, to) = (source.wrapping_add(done), target.wrapping_add(done));
                        let ahead = |pages| if left > pages { Some(from.wrapping_add(pages * PAGE_BYTES)) } else { next };
                        // SAFETY: as many pages as are left, or fewer.
                        let pages = unsafe {
                            match left {
                                $($most.. => some::<$most, IS_COPIED, IS_CHECKED>(from, to, ahead($most), seed, &mut total),)+
                                _ => some::<1, IS_COPIED, IS_CHECKED>(from, to, ahead(1), seed, &mut total),
                            }
                        };
                        done += pages * PAGE_BYTES;
                        seed = [$zero(); VECTORS];
                    }
                    for (vector, bytes) in total.iter().zip(line.chunks_exact_mut(size_of::<$vector>())) {
                        // SAFETY: the piece has the size of a vector, and is as aligned as the line's type.
                        unsafe { bytes.as_mut_ptr().cast::<$vector>().write_unaligned(*vector) };
                    }
                }

                /// Handles N pages side by side, carries the remainder `total` over them, and returns N. `seed` is added
                /// to the first line before it is checked. The N pages at `ahead` come next.
                ///
                /// # Safety
                /// As `pages`, for N pages.
                #[inline]
                #[target_feature(enable = $feature)]
                unsafe fn some<const N: usize, const IS_COPIED: bool, const IS_CHECKED: bool>(
                    source: *const u8,
                    target: *mut u8,
                    ahead: Option<*const u8>,
                    seed: Line,
                    total: &mut Line,
                ) -> usize {
                    let mut pages: [Line; N] = [[$zero(); VECTORS]; N];
                    let line_factors = broadcast(LINE_FACTORS);
                    for offset in (0..PAGE_BYTES).step_by(STEP_BYTES) {
                        // A line of each is enough: most of what it hides is the translation of the address. All pages
                        // at once, so that they are translated at the same time; neither as early as the reads that
                        // have just begun, nor so late that it is not done in time.
                        if let Some(ahead) = ahead
                            && offset == PAGE_BYTES / 2
                        {
                            for number in 0..N {
                                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(number * PAGE_BYTES).cast());
                            }
                        }
                        for number in 0..N {
                            for line in 0..STEP_BYTES / LINE_BYTES {
                                for vector in 0..VECTORS {
                                    let place =
                                        number * PAGE_BYTES + offset + line * LINE_BYTES + vector * size_of::<$vector>();
                                    // SAFETY: `place` and a vector behind it lie inside the N pages.
                                    let mut bytes = unsafe { $load(source.add(place).cast()) };
                                    // SAFETY: no instruction at all. To the compiler it may change the register, so
                                    // that it cannot look at the source a second time, which may be different by then.
                                    unsafe {
                                        asm!("/* {0} */", inout($class) bytes, options(pure, nomem, nostack, preserves_flags));
                                    }
                                    if IS_COPIED {
                                        // SAFETY: as above; the target is aligned to a line, and so to its vectors.
                                        unsafe { $store_past(target.add(place).cast(), bytes) };
                                    }
                                    if !IS_CHECKED {
                                        continue;
                                    }
                                    pages[number][vector] = if offset == 0 && line == 0 {
                                        if number == 0 { $xor(bytes, seed[vector]) } else { bytes }
                                    } else {
                                        carry(pages[number][vector], line_factors, bytes)
                                    };
                                }
                            }
                        }
                    }
                    if IS_CHECKED {
                        let page_factors = broadcast(PAGE_FACTORS);
                        for page in pages {
                            for (total, page) in total.iter_mut().zip(page) {
                                *total = carry(*total, page_factors, page);
                            }
                        }
                    }
                    N
                }

                /// The remainder over the distance of the factors, and `next` added.
                #[inline]
                #[target_feature(enable = $feature)]
                fn carry(remainder: $vector, factors: $vector, next: $vector) -> $vector {
                    let (first, second) = (
                        $multiply::<0x00>(remainder, factors),
                        $multiply::<0x11>(remainder, factors),
                    );
                    $xor($xor(first, second), next)
                }

                #[inline]
                #[target_feature(enable = $feature)]
                fn broadcast(factors: [u64; 2]) -> $vector {
                    let both = _mm_set_epi64x(factors[1] as i64, factors[0] as i64);
                    $broadcast(both)
                }
            }
        };
    }

    folding!(
        avx512, "avx512f,vpclmulqdq", zmm_reg, 8 | 4 | 2 pages, __m512i, _mm512_setzero_si512, _mm512_loadu_si512,
        _mm512_stream_si512, _mm512_clmulepi64_epi128, _mm512_xor_si512, _mm512_broadcast_i32x4
    );
    folding!(
        avx2, "avx2,vpclmulqdq", ymm_reg, 4 | 2 pages, __m256i, _mm256_setzero_si256, _mm256_loadu_si256,
        _mm256_stream_si256, _mm256_clmulepi64_epi128, _mm256_xor_si256, _mm256_broadcastsi128_si256
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published factors of the method for this polynomial.
    #[test]
    fn the_factors_for_512_and_128_bits_are_the_published_ones() {
        assert_eq!(factors(64), [0x1_5444_2bd4, 0x1_c6e4_1596]);
        assert_eq!(factors(16), [0x1_7519_97d0, 0x0_ccaa_009e]);
    }
}
