//! How bytes are moved: the instructions that this machine has.

use std::sync::OnceLock;

/// Unit of non-temporal stores: a cache line, written whole or not at all.
pub(super) const LINE_BYTES: usize = 64;

/// How whole cache lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// As `Avx512`, and whole pages are checked from the registers, with vectors of 64 bytes.
    Avx512Fold,
    /// As `Avx2`, and whole pages are checked from the registers, with vectors of 32 bytes.
    Avx2Fold,
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
            let has_wide_multiplication = is_x86_feature_detected!("vpclmulqdq");
            if is_x86_feature_detected!("avx512f") && has_wide_multiplication {
                kernels.push(Self::Avx512Fold);
            }
            if is_x86_feature_detected!("avx2") && has_wide_multiplication {
                kernels.push(Self::Avx2Fold);
            }
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

/// Copies whole cache lines into the cache. The library's copy takes a slower way at this size (`rep movsb`).
///
/// # Safety
/// As [`copy_run`](super::copy::copy_run); in addition `target` is aligned to a line and `len` is a multiple of one.
#[inline]
pub(super) unsafe fn gather(kernel: Kernel, source: *const u8, target: *mut u8, len: usize) {
    // SAFETY: the caller's contract is that of each kernel, and it vouches for the instructions.
    unsafe {
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 | Kernel::Avx512Fold => x86::avx512::gather(source, target, len),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 | Kernel::Avx2Fold => x86::avx2::gather(source, target, len),
            #[cfg(target_arch = "x86_64")]
            Kernel::Sse2 => x86::sse2::gather(source, target, len),
            _ => source.copy_to_nonoverlapping(target, len),
        }
    }
}

/// Copies whole cache lines past the cache, and prefetches `ahead`, but not more than as many bytes.
///
/// # Safety
/// As [`copy_run`](super::copy::copy_run); in addition `target` is aligned to a line and `len` is a multiple of one. `ahead` may be anywhere.
#[inline]
pub(super) unsafe fn stream(
    kernel: Kernel,
    source: *const u8,
    target: *mut u8,
    len: usize,
    ahead: (*const u8, usize),
) {
    // SAFETY: the caller's contract is that of each kernel, and it vouches for the instructions.
    unsafe {
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 | Kernel::Avx512Fold => x86::avx512::stream(source, target, len, ahead),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 | Kernel::Avx2Fold => x86::avx2::stream(source, target, len, ahead),
            #[cfg(target_arch = "x86_64")]
            Kernel::Sse2 => x86::sse2::stream(source, target, len, ahead),
            _ => source.copy_to_nonoverlapping(target, len),
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    macro_rules! kernel {
        ($name:ident, $feature:literal, $vector:ty, $zero:ident, $load:ident, $store:ident, $store_past:ident) => {
            pub(super) mod $name {
                use std::arch::x86_64::{
                    _MM_HINT_T0, _mm_prefetch, $load, $store, $store_past, $vector, $zero,
                };

                use crate::raw::kernel::LINE_BYTES;

                const WIDTH: usize = size_of::<$vector>();

                /// # Safety
                /// As `super::super::gather`, on a machine with the instructions of the module's name.
                #[target_feature(enable = $feature)]
                pub(in crate::raw::kernel) unsafe fn gather(source: *const u8, target: *mut u8, len: usize) {
                    for place in (0..len).step_by(WIDTH) {
                        // SAFETY: a vector at `place` lies inside both ranges, since `len` is a multiple of a line and
                        // so of a vector; the target is aligned, as the store asks.
                        unsafe { $store(target.add(place).cast(), $load(source.add(place).cast())) };
                    }
                }

                /// # Safety
                /// As `super::super::stream`, on a machine with the instructions of the module's name.
                #[target_feature(enable = $feature)]
                pub(in crate::raw::kernel) unsafe fn stream(
                    source: *const u8,
                    target: *mut u8,
                    len: usize,
                    ahead: (*const u8, usize),
                ) {
                    // Four lines at once: memory takes writes better in longer pieces.
                    const STEP: usize = 4 * LINE_BYTES;
                    let mut done = 0;
                    while done + STEP <= len {
                        if done < ahead.1 {
                            for line in 0..STEP / LINE_BYTES {
                                // Prefetching cannot fault, so any address will do.
                                let line = ahead.0.wrapping_add(done + line * LINE_BYTES);
                                _mm_prefetch::<_MM_HINT_T0>(line.cast());
                            }
                        }
                        // SAFETY: done + STEP is at most `len`.
                        unsafe { stream_step::<{ STEP / WIDTH }>(source.add(done), target.add(done)) };
                        done += STEP;
                    }
                    while done < len {
                        // SAFETY: a line at `done` lies inside, since `len` and STEP are multiples of a line.
                        unsafe { stream_step::<{ LINE_BYTES / WIDTH }>(source.add(done), target.add(done)) };
                        done += LINE_BYTES;
                    }
                }

                /// # Safety
                /// N vectors are readable at `source` and writable at `target`, which is aligned to a line.
                #[inline]
                #[target_feature(enable = $feature)]
                unsafe fn stream_step<const N: usize>(source: *const u8, target: *mut u8) {
                    // All loads before the first store; the array stays in registers.
                    let mut vectors = [$zero(); N];
                    for (index, vector) in vectors.iter_mut().enumerate() {
                        // SAFETY: the caller's contract; the load takes any alignment.
                        *vector = unsafe { $load(source.add(index * WIDTH).cast()) };
                    }
                    for (index, vector) in vectors.into_iter().enumerate() {
                        // SAFETY: the caller's contract.
                        unsafe { $store_past(target.add(index * WIDTH).cast(), vector) };
                    }
                }
            }
        };
    }

    kernel!(
        avx512,
        "avx512f",
        __m512i,
        _mm512_setzero_si512,
        _mm512_loadu_si512,
        _mm512_store_si512,
        _mm512_stream_si512
    );
    kernel!(
        avx2,
        "avx2",
        __m256i,
        _mm256_setzero_si256,
        _mm256_loadu_si256,
        _mm256_store_si256,
        _mm256_stream_si256
    );
    kernel!(
        sse2,
        "sse2",
        __m128i,
        _mm_setzero_si128,
        _mm_loadu_si128,
        _mm_store_si128,
        _mm_stream_si128
    );
}
