//! The kernel that copies many pieces in one launch, and the lists that it reads.

use std::ffi::{CStr, c_uint, c_void};
use std::ptr;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys::{CUfunction, CUmodule, CUstream};

use super::device::{Device, Staging};
use super::driver::Driver;
use crate::error::Result;
use crate::spans::Piece;

/// What `kernels/copy_pieces.cu` compiles to.
const PTX: &CStr = match CStr::from_bytes_with_nul(
    concat!(include_str!("../../kernels/copy_pieces.ptx"), "\0").as_bytes(),
) {
    Ok(text) => text,
    Err(_) => panic!("the kernel's text has a zero in it"),
};
const NAME: &CStr = c"kvlane_copy_pieces";

/// Threads of a block: with four units of 16 bytes each, an [entry](ENTRY_BYTES) is what they have on their way at once.
const THREADS: c_uint = 512;
/// Most bytes of an entry. Longer pieces are several, so that all blocks have work.
const ENTRY_BYTES: u64 = 32 << 10;
/// Most entries of a list.
const ENTRIES_MAX: usize = 9 << 10;

/// Blocks of a launch that stays on devices: two for each of an H100's 132 multiprocessors. There 96 MiB in pieces of 32 KiB
/// took 86 us with 264 blocks, 118 us with 64, and 76 us as one copy of the driver.
pub(super) const BLOCKS_BETWEEN_DEVICES: c_uint = 264;
/// Blocks of a launch to or from the host: these fill a PCIe bus, and leave the device to the model.
pub(super) const BLOCKS_WITH_HOST: c_uint = 16;

/// The kernel in a device's context. It is unloaded by [`unload`](Self::unload), or with the context.
pub(super) struct CopyKernel {
    module: CUmodule,
    function: CUfunction,
}

impl CopyKernel {
    /// Loads it. The device's context is current.
    pub(super) fn load(driver: &Driver) -> Result<Self> {
        let context = "loading the copy kernel";
        let mut module = ptr::null_mut();
        // SAFETY: writes one handle; the text ends with a zero.
        let code = unsafe { (driver.calls.cuModuleLoadData)(&raw mut module, PTX.as_ptr().cast()) };
        driver.check(code, "cuModuleLoadData", context)?;
        let mut kernel = Self {
            module,
            function: ptr::null_mut(),
        };
        // SAFETY: writes one handle; the module was just loaded.
        let code =
            unsafe { (driver.calls.cuModuleGetFunction)(&raw mut kernel.function, module, NAME.as_ptr()) };
        let found = driver.check(code, "cuModuleGetFunction", context);
        if found.is_err() {
            kernel.unload(driver);
        }
        found.map(|()| kernel)
    }

    /// Puts a copy of the first `count` entries of a list on a stream. The device's context is current.
    ///
    /// # Safety
    /// The stream is of this context. The list keeps still, and its entries are memory that the device can read and write,
    /// until an event that was recorded behind the copy is over.
    pub(super) unsafe fn launch(
        &self,
        driver: &Driver,
        list: &PieceList,
        count: u32,
        blocks_max: c_uint,
        stream: CUstream,
    ) -> Result<()> {
        let mut pieces = list.staging.as_ptr().expose_provenance() as u64;
        let mut count = count;
        let mut arguments: [*mut c_void; 2] = [(&raw mut pieces).cast(), (&raw mut count).cast()];
        // SAFETY: the kernel takes an address and a number, which the driver copies before it returns; the caller vouches for
        // the rest.
        let code = unsafe {
            (driver.calls.cuLaunchKernel)(
                self.function,
                count.clamp(1, blocks_max),
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        driver.check(code, "cuLaunchKernel", "starting copies of many pieces")
    }

    /// Gives it back; nothing of it runs any more. The device's context is current.
    pub(super) fn unload(&self, driver: &Driver) {
        // SAFETY: loaded once, and `Device` unloads it once, when nobody has the device any more.
        let _ = unsafe { (driver.calls.cuModuleUnload)(self.module) };
    }
}

/// As the kernel has it.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Entry {
    from: u64,
    to: u64,
    len_bytes: u64,
}

/// Pinned memory for what one launch copies: the device reads it where it is, since pinned memory has the same address there.
#[derive(Debug)]
pub(crate) struct PieceList {
    staging: Staging,
}

impl PieceList {
    /// Most pieces of a launch, if together they have no more than [`BYTES_MAX`](Self::BYTES_MAX).
    pub(crate) const PIECES_MAX: usize = 8 << 10;
    /// Most bytes of a launch of so many pieces.
    pub(crate) const BYTES_MAX: usize = (ENTRIES_MAX - Self::PIECES_MAX) * ENTRY_BYTES as usize;

    pub(super) fn allocate(device: &Arc<Device>) -> Result<Self> {
        let staging = device.allocate(ENTRIES_MAX * size_of::<Entry>())?;
        Ok(Self { staging })
    }

    /// Writes the list, and returns how many entries it has. `None`: there are too many.
    pub(super) fn write(&mut self, pieces: impl Iterator<Item = Piece>) -> Option<u32> {
        let mut places = self.staging.chunks_exact_mut(size_of::<Entry>());
        let mut count = 0;
        for piece in pieces {
            let mut done_bytes = 0;
            while done_bytes < piece.len_bytes as u64 {
                let entry = Entry {
                    from: piece.from + done_bytes,
                    to: piece.to + done_bytes,
                    len_bytes: (piece.len_bytes as u64 - done_bytes).min(ENTRY_BYTES),
                };
                places.next()?.copy_from_slice(bytemuck::bytes_of(&entry));
                done_bytes += entry.len_bytes;
                count += 1;
            }
        }
        Some(count)
    }
}
