//! The steps in which a segment file is made: it has its length, its lock and its header before its name appears.

use std::fs::File;

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};

use super::OWNER_LOCK;
use crate::directory::Directory;
use crate::error::{FsError, Result};
use crate::format::{self, SegmentHeader, counters};

/// A file without a name, or with a temporary one where the file system cannot do that.
pub(super) fn create_unnamed(directory: &Directory, name: &str) -> std::io::Result<(File, Option<String>)> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    match rustix::fs::openat(&directory.folder, ".", flags, mode) {
        Ok(descriptor) => Ok((File::from(descriptor), None)),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {
            let temporary = format!("{name}.tmp");
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let descriptor = rustix::fs::openat(&directory.folder, &temporary, flags, mode)?;
            Ok((File::from(descriptor), Some(temporary)))
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Gives the file its length and its blocks: without them, a full file system would answer a store through the mapping with
/// SIGBUS.
pub(super) fn allocate(
    directory: &Directory,
    file: &File,
    header: &SegmentHeader,
    path: &std::path::Path,
) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let allocated = match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, header.file_bytes()) {
        // Not every file system can. Where the payload is written by system calls, only the tables need blocks.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) if !directory.mapped_payload() => file
            .write_all_at(&vec![0; header.data_offset() as usize], 0)
            .and_then(|()| file.set_len(header.file_bytes())),
        other => other.map_err(Into::into),
    };
    allocated.map_err(FsError::io("allocate", path))
}

pub(super) fn fill(
    file: &File,
    header: &SegmentHeader,
    layer_bytes: &[u64],
    path: &std::path::Path,
    start_id: u64,
) -> Result<()> {
    use std::os::unix::fs::FileExt;
    if !OWNER_LOCK.try_lock(file).map_err(FsError::io("lock", path))? {
        return Err(FsError::io("lock", path)(std::io::ErrorKind::WouldBlock.into()));
    }
    let owner = header.counters_offset() + counters::OWNER;
    file.write_all_at(&header.encode(), 0)
        .and_then(|()| file.write_all_at(&format::encode_layers(layer_bytes), header.layers_offset()))
        .and_then(|()| file.write_all_at(&start_id.to_le_bytes(), owner))
        .map_err(FsError::io("write", path))
}

pub(super) fn publish(
    directory: &Directory,
    file: &File,
    temporary: Option<&str>,
    name: &str,
) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    let folder = &directory.folder;
    match temporary {
        Some(temporary) => {
            rustix::fs::renameat_with(
                folder,
                temporary,
                folder,
                name,
                rustix::fs::RenameFlags::NOREPLACE,
            )
            .or_else(|_| rustix::fs::renameat(folder, temporary, folder, name))?;
        }
        None => {
            let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
            rustix::fs::linkat(rustix::fs::CWD, unnamed, folder, name, AtFlags::SYMLINK_FOLLOW)?;
        }
    }
    Ok(())
}
