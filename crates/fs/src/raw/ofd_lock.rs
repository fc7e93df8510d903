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

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    fn open(path: &std::path::Path) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .unwrap()
    }

    /// A child that another test has just started has all open files until it becomes its program.
    #[track_caller]
    fn eventually(mut is_free: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !is_free() {
            assert!(Instant::now() < end, "the lock is still held");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_second_open_of_the_file_cannot_take_a_held_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let (first, second) = (open(&path), open(&path));
        let reader = File::open(&path).unwrap();
        assert!(!OfdLock::WHOLE_FILE.is_held_by_other(&reader).unwrap());
        assert!(OfdLock::WHOLE_FILE.try_lock(&first).unwrap());
        assert!(!OfdLock::WHOLE_FILE.try_lock(&second).unwrap());
        assert!(OfdLock::WHOLE_FILE.is_held_by_other(&reader).unwrap());
        assert!(
            !OfdLock::WHOLE_FILE.is_held_by_other(&first).unwrap(),
            "its own lock is nobody else's"
        );
        OfdLock::WHOLE_FILE.unlock(&first).unwrap();
        assert!(!OfdLock::WHOLE_FILE.is_held_by_other(&reader).unwrap());
        assert!(OfdLock::WHOLE_FILE.try_lock(&second).unwrap());
    }

    #[test]
    fn bytes_of_a_file_are_locked_one_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let (first, second) = (open(&path), open(&path));
        assert!(OfdLock::byte(0).try_lock(&first).unwrap());
        assert!(OfdLock::byte(1).try_lock(&second).unwrap());
        assert!(!OfdLock::byte(1).try_lock(&first).unwrap());
        assert!(!OfdLock::WHOLE_FILE.try_lock(&second).unwrap());
        assert!(!OfdLock::byte(2).is_held_by_other(&first).unwrap());
    }

    #[test]
    fn closing_another_descriptor_of_the_file_releases_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let (holder, other) = (open(&path), open(&path));
        assert!(OfdLock::byte(0).try_lock(&holder).unwrap());
        drop(open(&path));
        assert!(!OfdLock::byte(0).try_lock(&other).unwrap());
        drop(holder);
        eventually(|| OfdLock::byte(0).try_lock(&other).unwrap());
    }

    #[test]
    fn a_lock_outlives_its_taker_in_a_child_that_inherited_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let (holder, other) = (open(&path), open(&path));
        assert!(OfdLock::byte(0).try_lock(&holder).unwrap());
        // The child's standard input is a duplicate of the open file that has the lock.
        let mut child = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::from(holder.try_clone().unwrap()))
            .spawn()
            .unwrap();
        drop(holder);
        assert!(
            OfdLock::byte(0).is_held_by_other(&other).unwrap(),
            "the child has it"
        );
        child.kill().unwrap();
        child.wait().unwrap();
        // The child is gone.
        eventually(|| !OfdLock::byte(0).is_held_by_other(&other).unwrap());
    }
}
