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
    /// Most pieces of a window, if together they have no more than [`WINDOW_BYTES`](Self::WINDOW_BYTES).
    pub(crate) const WINDOW_PIECES: usize = 8 << 10;
    /// Most bytes of a window.
    pub(crate) const WINDOW_BYTES: usize = 32 << 20;

    /// With room for a window, and for what a buffer of so many bytes is scattered to.
    pub(super) fn for_window(device: &Arc<Device>) -> Result<Self> {
        Self::allocate(device, Self::WINDOW_PIECES, Self::WINDOW_BYTES)
    }

    /// With room for so many pieces of so many bytes together.
    pub(super) fn allocate(device: &Arc<Device>, pieces: usize, bytes: usize) -> Result<Self> {
        let staging = device.allocate(entries_max(pieces, bytes) * size_of::<Entry>())?;
        Ok(Self { staging })
    }

    /// Writes the list, and returns how many entries it has. `None`: there are too many.
    pub(super) fn write(&mut self, pieces: impl Iterator<Item = Piece>) -> Option<u32> {
        write(&mut self.staging, pieces)
    }
}

/// Each piece has one entry that is not full.
fn entries_max(pieces: usize, bytes: usize) -> usize {
    pieces + bytes / ENTRY_BYTES as usize
}

fn write(list: &mut [u8], pieces: impl Iterator<Item = Piece>) -> Option<u32> {
    let mut places = list.chunks_exact_mut(size_of::<Entry>());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_pieces_are_several_entries_and_every_byte_is_in_one() {
        let full = ENTRY_BYTES as usize;
        let mut list = vec![0; 6 * size_of::<Entry>()];
        let pieces = [
            Piece::new(1000, 5, 2 * full + 7),
            Piece::new(8, 1 << 40, 1),
            Piece::new(0, 9, full),
        ];
        assert_eq!(write(&mut list, pieces.into_iter()), Some(5));
        let entries: Vec<[u64; 3]> = list
            .chunks_exact(size_of::<Entry>())
            .take(5)
            .map(bytemuck::pod_read_unaligned)
            .collect();
        let expected = [
            [1000, 5, ENTRY_BYTES],
            [1000 + ENTRY_BYTES, 5 + ENTRY_BYTES, ENTRY_BYTES],
            [1000 + 2 * ENTRY_BYTES, 5 + 2 * ENTRY_BYTES, 7],
            [8, 1 << 40, 1],
            [0, 9, ENTRY_BYTES],
        ];
        assert_eq!(entries, expected);
    }

    #[test]
    fn a_list_takes_the_worst_that_it_has_room_for_and_not_one_entry_more() {
        // Every piece one byte longer than whole entries.
        let (pieces, full) = (6, ENTRY_BYTES as usize);
        let worst = || (0..pieces).map(|_| Piece::new(0, 0, full + 1));
        let entries = entries_max(pieces, pieces * (full + 1));
        let mut list = vec![0; entries * size_of::<Entry>()];
        assert_eq!(write(&mut list, worst()), Some(entries as u32));
        list.truncate(list.len() - 1);
        assert_eq!(write(&mut list, worst()), None);
    }
}
