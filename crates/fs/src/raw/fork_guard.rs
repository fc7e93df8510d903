//! Keeps locks out of forked children.
//!
//! A child that forks without exec shares its parent's open files, and with them their locks: a segment of a dead parent
//! would look owned for as long as the child lives. So in every child, each guarded descriptor is replaced by one of
//! /dev/null. The parent's open file keeps the lock, and the child's objects still hold a descriptor that they may close.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};

/// Descriptors that can be guarded at once. One more is not guarded, which costs the late adoption of its segment.
const PLACES: usize = 1 << 16;

static GUARDED: [AtomicI32; PLACES] = [const { AtomicI32::new(-1) }; PLACES];
static REGISTER: Once = Once::new();

/// Replaces a file's descriptor in forked children while it lives. Must be dropped before the file.
#[derive(Debug)]
pub struct ForkGuard {
    place: Option<usize>,
}

impl ForkGuard {
    /// Guards the descriptor of `file`.
    pub fn new(file: &File) -> Self {
        REGISTER.call_once(|| {
            // SAFETY: the handler only calls functions that are allowed between fork and exec, on static memory.
            if unsafe { libc::pthread_atfork(None, None, Some(in_child)) } != 0 {
                tracing::debug!("cannot register a handler for forks");
            }
        });
        let descriptor = file.as_raw_fd();
        let take = |place: &AtomicI32| {
            place.load(Ordering::Relaxed) == -1
                && place
                    .compare_exchange(-1, descriptor, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
        };
        ForkGuard {
            place: GUARDED.iter().position(take),
        }
    }
}

impl Drop for ForkGuard {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            GUARDED[place].store(-1, Ordering::Release);
        }
    }
}

/// Runs in the child, where only one thread exists and others may have died holding any lock of the process.
extern "C" fn in_child() {
    // SAFETY: open, dup3 and close are async-signal-safe; the path is a valid C string.
    let null = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if null < 0 {
        return;
    }
    for place in &GUARDED {
        let descriptor = place.load(Ordering::Acquire);
        if descriptor >= 0 {
            // SAFETY: replaces a descriptor that the guard's owner keeps open; its number stays valid and closable.
            unsafe { libc::dup3(null, descriptor, libc::O_CLOEXEC) };
        }
    }
    // SAFETY: opened above and not shared.
    unsafe { libc::close(null) };
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;
    use crate::raw::OfdLock;

    #[test]
    fn a_forked_child_does_not_keep_its_parents_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("locked");
        let open = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .unwrap()
        };
        let (file, other) = (open(), open());
        assert!(OfdLock::byte(0).try_lock(&file).unwrap());
        let guard = ForkGuard::new(&file);
        // SAFETY: the child only sleeps and exits, both allowed after a fork of a process with threads.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above.
            unsafe {
                libc::sleep(60);
                libc::_exit(0);
            }
        }
        assert!(child > 0);
        assert!(
            !OfdLock::byte(0).try_lock(&other).unwrap(),
            "the parent still has the lock"
        );
        drop(guard);
        drop(file);
        let mut taken = false;
        // Less than the child sleeps.
        for _ in 0..1500 {
            // The child's handler runs at its own pace.
            taken = OfdLock::byte(0).try_lock(&other).unwrap();
            if taken {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        // SAFETY: ends and reaps our own child.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
        assert!(
            taken,
            "the child kept the lock of a file that its parent has closed"
        );
    }
}
