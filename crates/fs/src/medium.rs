//! Which file system a folder is on, and which way of moving bytes fits it.

use std::fs::File;
use std::path::Path;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use crate::error::{FsError, Result};
use crate::options::Medium;

// Magic numbers of statfs(2), from linux/magic.h.
const TMPFS: u64 = 0x0102_1994;
const RAMFS: u64 = 0x8584_58f6;
const HUGETLBFS: u64 = 0x9584_58f6;
const EXT: u64 = 0xef53;
const XFS: u64 = 0x5846_5342;
const BTRFS: u64 = 0x9123_683e;
const F2FS: u64 = 0xf2f5_2010;
const ZFS: u64 = 0x2fc1_2fc1;
const OVERLAY: u64 = 0x794c_7630;
const NFS: u64 = 0x6969;
const FUSE: u64 = 0x6573_5546;
const CIFS: u64 = 0xff53_4d42;
const SMB2: u64 = 0xfe53_4d42;
const CEPH: u64 = 0x00c3_6400;
const LUSTRE: u64 = 0x0bd0_0bd0;

/// What was found out about a folder's file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MediumChoice {
    /// Name of the file system, or its number where it is unknown.
    pub file_system: String,
    /// The way that is used; never `Auto`.
    pub medium: Medium,
    /// Why.
    pub reason: &'static str,
    /// Bytes that the file system has left for us.
    pub free_bytes: u64,
    /// Whether other machines may have files open here whose locks nobody sees.
    shared_by_machines: bool,
}

impl MediumChoice {
    /// Whether the files are memory, whatever way the bytes take to them.
    pub(crate) fn lives_in_memory(&self) -> bool {
        self.file_system == "tmpfs"
    }

    /// Whether a page that has its place may need another one when it is written again. A store through a mapping would be
    /// answered with SIGBUS then, once the file system is full.
    fn always_copies_on_write(&self) -> bool {
        matches!(self.file_system.as_str(), "zfs" | "f2fs")
    }

    /// Why nothing is stored there, whatever the file system allows.
    pub(crate) fn refusal(&self) -> Option<String> {
        self.always_copies_on_write().then(|| {
            format!(
                "{} copies on write: once it is full, a store through a mapping would end the process. \
                 Allowed: tmpfs, ext4, xfs, btrfs",
                self.file_system
            )
        })
    }

    /// Makes the pages of `file`, which must be empty, keep their places where that is a property of each file.
    pub(crate) fn keep_places(&self, file: &File) -> std::io::Result<()> {
        if self.file_system != "btrfs" {
            return Ok(());
        }
        turn_copy_on_write_off(file)
    }

    /// Whether the pages of `file` keep their places.
    pub(crate) fn keeps_places(&self, file: &File) -> bool {
        match self.file_system.as_str() {
            "btrfs" => ioctl_getflags(file).is_ok_and(|flags| flags.contains(IFlags::NOCOW)),
            _ => !self.always_copies_on_write(),
        }
    }

    /// Whether other machines may have files open here whose locks nobody sees.
    pub(crate) fn is_shared_by_machines(&self) -> bool {
        self.shared_by_machines
    }
}

/// Chooses the way for the folder `path`, unless `forced` says which.
pub(crate) fn choose(folder: &File, path: &Path, forced: Medium) -> Result<MediumChoice> {
    let stat = rustix::fs::fstatfs(folder)
        .map_err(|errno| FsError::io("ask for the file system of", path)(errno.into()))?;
    // The field is signed or narrower on some targets; the magics fit in 32 bits.
    #[allow(
        clippy::unnecessary_cast,
        reason = "the type of f_type differs between targets"
    )]
    let magic = (stat.f_type as u64) & 0xffff_ffff;
    let (name, medium, reason) = match magic {
        TMPFS => ("tmpfs", Medium::Memory, "it lives in memory"),
        // The first one cannot allocate and has no end, the second one cannot be written to.
        RAMFS => return Err(refused("ramfs", path)),
        HUGETLBFS => return Err(refused("hugetlbfs", path)),
        EXT => ("ext4", Medium::Disk, "it is a local disk"),
        XFS => ("xfs", Medium::Disk, "it is a local disk"),
        BTRFS => ("btrfs", Medium::Disk, "it is a local disk"),
        F2FS => ("f2fs", Medium::Disk, "it is a local disk"),
        ZFS => ("zfs", Medium::Disk, "it is a local disk"),
        OVERLAY => (
            "overlay",
            Medium::Network,
            "mappings of overlay files may part from their file",
        ),
        NFS => ("nfs", Medium::Network, "it is a network file system"),
        FUSE => ("fuse", Medium::Network, "its coherence is unknown"),
        CIFS | SMB2 => ("smb", Medium::Network, "it is a network file system"),
        CEPH => ("ceph", Medium::Network, "it is a network file system"),
        LUSTRE => ("lustre", Medium::Network, "it is a network file system"),
        _ => ("", Medium::Network, "the file system is unknown"),
    };
    let file_system = if name.is_empty() {
        format!("{magic:#x}")
    } else {
        name.to_owned()
    };
    let (medium, reason) = match forced {
        Medium::Auto => (medium, reason),
        other => (other, "the option `medium` says so"),
    };
    // Every overlay is one machine's, whatever is below it, and so are its locks.
    let shared_by_machines = medium == Medium::Network && (forced == Medium::Network || name != "overlay");
    #[allow(
        clippy::unnecessary_cast,
        reason = "the type of f_bsize differs between targets"
    )]
    let free_bytes = stat.f_bavail as u64 * stat.f_bsize as u64;
    Ok(MediumChoice {
        file_system,
        medium,
        reason,
        free_bytes,
        shared_by_machines,
    })
}

/// [`MediumChoice::keep_places`] for a file from before the medium is known.
pub(crate) fn keep_places(file: &File) -> std::io::Result<()> {
    let stat = rustix::fs::fstatfs(file)?;
    #[allow(
        clippy::unnecessary_cast,
        reason = "the type of f_type differs between targets"
    )]
    let magic = (stat.f_type as u64) & 0xffff_ffff;
    if magic == BTRFS {
        turn_copy_on_write_off(file)
    } else {
        Ok(())
    }
}

fn turn_copy_on_write_off(file: &File) -> std::io::Result<()> {
    let flags = ioctl_getflags(file)?;
    Ok(ioctl_setflags(file, flags | IFlags::NOCOW)?)
}

fn refused(file_system: &str, path: &Path) -> FsError {
    FsError::Option {
        option: "the file system of the folder",
        found: format!("{file_system} ({})", path.display()),
        allowed: "tmpfs, a local disk or a network file system".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dev_shm_is_memory_and_an_option_overrides_it() {
        let path = Path::new("/dev/shm");
        let Ok(folder) = File::open(path) else {
            println!("NOT RUN: what a memory file system is taken for: there is no /dev/shm");
            return;
        };
        let choice = choose(&folder, path, Medium::Auto).unwrap();
        assert_eq!(
            (choice.file_system.as_str(), choice.medium),
            ("tmpfs", Medium::Memory)
        );
        let forced = choose(&folder, path, Medium::Disk).unwrap();
        assert_eq!((forced.medium, forced.lives_in_memory()), (Medium::Disk, true));
    }
}
