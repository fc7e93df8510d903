//! Open-file-description locks: they belong to an open file, not to a process, so two opens in one process exclude each
//! other too, and closing an unrelated descriptor of the file releases nothing.
//!
//! A forked child shares the open file and with it the lock: owners compare their process id before they write.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// A range of bytes of a file that can be locked; the bytes need not exist. One byte per purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfdLock {
    start: i64,
    len: i64,
}

impl OfdLock {
    /// The whole file, however long it gets.
    pub const WHOLE_FILE: Self = Self { start: 0, len: 0 };

    /// The byte at `offset`.
    pub const fn byte(offset: u32) -> Self {
        Self {
            start: offset as i64,
            len: 1,
        }
    }

    /// Takes the lock for writing, if nobody else has it: `Ok(false)` if somebody has. `file` must be open for writing.
    /// Dropping the last descriptor of this open file releases it.
    pub fn try_lock(self, file: &File) -> io::Result<bool> {
        match self.call(file, libc::F_OFD_SETLK, libc::F_WRLCK) {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gives the lock back.
    pub fn unlock(self, file: &File) -> io::Result<()> {
        self.call(file, libc::F_OFD_SETLK, libc::F_UNLCK).map(drop)
    }

    /// Whether another open file has the lock now. `file` may be open for reading only.
    pub fn is_held_by_other(self, file: &File) -> io::Result<bool> {
        Ok(self.call(file, libc::F_OFD_GETLK, libc::F_WRLCK)? != libc::F_UNLCK)
    }

    /// Returns the type of the lock that the kernel wrote back.
    fn call(self, file: &File, command: libc::c_int, lock_type: libc::c_int) -> io::Result<libc::c_int> {
        // The process id must be 0 for this kind of lock.
        let mut lock = libc::flock {
            l_type: lock_type as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: self.start,
            l_len: self.len,
            l_pid: 0,
        };
        loop {
            // SAFETY: the descriptor is open while `file` is borrowed, and `lock` is what both commands expect.
            if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } == 0 {
                return Ok(lock.l_type.into());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}
