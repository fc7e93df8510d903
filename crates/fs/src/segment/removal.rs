//! Segments that go: they lose their name at once, and their payload once nobody copies from it any more.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, flock};

use super::{OWNER_LOCK, SegmentView, is_foreign_host, is_linked_as, move_on, read_header};
use crate::control::open_trusted;
use crate::directory::Directory;
use crate::error::{FsError, Result};
use crate::format::{SegmentHeader, counters};
use crate::jobs::lock;
use crate::raw::{WriteMapping, store_fence};

/// Keeps the payload of a segment from becoming a hole while it is copied from, even when the segment is removed. In a
/// file system that lives in memory, a read of a hole through a mapping takes a page: that is a SIGBUS where none is left,
/// and memory outside of the budget elsewhere.
#[derive(Debug)]
pub(crate) struct Hold(Arc<SegmentView>);

impl Drop for Hold {
    fn drop(&mut self) {
        let mut holds = lock(&self.0.holds);
        *holds -= 1;
        if *holds == 0
            && self.0.holes_take_memory
            && let Err(errno) = flock(&self.0.file, FlockOperation::NonBlockingUnlock)
        {
            tracing::debug!(path = %self.0.path.display(), %errno, "cannot unlock a segment");
        }
    }
}

impl SegmentView {
    /// Check the slot's sequence after this and before the copy: it says whether the payload was a hole already. `None`:
    /// it is becoming one right now.
    pub(crate) fn hold(self: &Arc<Self>) -> Option<Hold> {
        let mut holds = lock(&self.holds);
        if *holds == 0 && self.holes_take_memory {
            flock(&self.file, FlockOperation::NonBlockingLockShared).ok()?;
        }
        *holds += 1;
        Some(Hold(Arc::clone(self)))
    }
}

/// Removes a segment that nobody owns, of whatever geometry. `false`: it is owned, not there, or another machine's.
pub(crate) fn remove_orphan(directory: &Directory, name: &str) -> Result<bool> {
    let path = directory.path.join(name);
    let Some(file) = open_trusted(&directory.folder, name, &path, true)? else {
        return Ok(false);
    };
    if !OWNER_LOCK.try_lock(&file).map_err(FsError::io("lock", &path))? {
        return Ok(false);
    }
    if !is_linked_as(&directory.folder, &file, name).map_err(FsError::io("inspect", &path))? {
        return Ok(false);
    }
    let header = read_header(&file, &path, name)?;
    if is_foreign_host(directory, &header) {
        // Where locks of other machines may be invisible, a free lock says nothing about their segments.
        return Ok(false);
    }
    // Before the payload becomes a hole: a reader that is copying from it must see that it is gone.
    invalidate_all(&file, &header).map_err(FsError::io("invalidate", &path))?;
    rustix::fs::unlinkat(&directory.folder, name, AtFlags::empty())
        .map_err(|errno| FsError::io("remove", &path)(errno.into()))?;
    directory.control.bump_generation();
    directory.control.bump_changes();
    directory.give_back_payload(Removed::new(file, &header));
    Ok(true)
}

/// Makes every slot's content invisible in a segment whose lock we have just taken.
fn invalidate_all(file: &File, header: &SegmentHeader) -> std::io::Result<()> {
    let tables = WriteMapping::new(file, header.data_offset() as usize)?;
    for slot in 0..header.slot_count {
        move_on(tables.u64_at(header.sequence_offset(slot) as usize));
    }
    tables
        .u64_at((header.counters_offset() + counters::CHANGES) as usize)
        .fetch_add(1, Ordering::AcqRel);
    store_fence();
    Ok(())
}

/// A segment without a name and without a valid slot. A reader that still maps it would keep its memory; a hole has none.
#[derive(Debug)]
pub(crate) struct Removed {
    file: File,
    from: u64,
    length: u64,
}

impl Removed {
    pub(super) fn new(file: File, header: &SegmentHeader) -> Self {
        Removed {
            file,
            from: header.data_offset(),
            length: header.file_bytes() - header.data_offset(),
        }
    }

    /// Punches the hole, unless somebody is copying from there. Whoever comes later looks at the sequences first, which
    /// were moved before this.
    pub(crate) fn is_punched(&self, directory: &Directory) -> bool {
        if directory.lives_in_memory()
            && let Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) =
                flock(&self.file, FlockOperation::NonBlockingLockExclusive)
        {
            return false;
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(errno) = rustix::fs::fallocate(&self.file, flags, self.from, self.length) {
            tracing::debug!(%errno, "cannot punch a hole into a removed segment");
        }
        // The lock goes with the file.
        true
    }
}
