//! Memory of the stand-in for CUDA, which stays mapped for as long as the process lives, also after it was freed.

use crate::world::{INVALID_ARGUMENT, World};

/// Copies bytes out of device memory; an error: it is none, or none any more.
pub(crate) fn read_memory(address: usize, bytes: &mut [u8]) -> Result<(), u32> {
    check(address, bytes.len())?;
    let from: *const u8 = std::ptr::with_exposed_provenance(address);
    // SAFETY: just found to be memory of the stand-in for CUDA, which stays mapped. Others may write it meanwhile, as on a
    // device; then the bytes are not defined, which the tests are about.
    unsafe { from.copy_to(bytes.as_mut_ptr(), bytes.len()) };
    Ok(())
}

/// Copies bytes into device memory; an error as for [`read_memory`].
pub(crate) fn write_memory(address: usize, bytes: &[u8]) -> Result<(), u32> {
    check(address, bytes.len())?;
    let to: *mut u8 = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: as above.
    unsafe { bytes.as_ptr().copy_to(to, bytes.len()) };
    Ok(())
}

/// Fills device memory, unless it is none any more.
pub(crate) fn fill(address: usize, byte: u8, len: usize) {
    if check(address, len).is_ok() {
        let start: *mut u8 = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: as above.
        unsafe { start.write_bytes(byte, len) };
    }
}

fn check(address: usize, len: usize) -> Result<(), u32> {
    if World::get().cuda.check(address, len) {
        Ok(())
    } else {
        Err(INVALID_ARGUMENT)
    }
}

/// Random bytes of the system.
pub(crate) fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    // SAFETY: writes at most as many bytes as it is told.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    assert_eq!(count, 16, "the system gives random bytes");
    bytes
}
