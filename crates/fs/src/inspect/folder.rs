//! Whether a folder is fit for a store, before there is one.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Access, AtFlags, FallocateFlags, Mode, OFlags};
use serde::Serialize;

use crate::directory::{default_capacity_bytes, is_writable_for_others, random_u64};
use crate::error::{FsError, Result};
use crate::medium::{self, MediumChoice};
use crate::options::Medium;
use crate::raw::OfdLock;

/// What was found out about a folder.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct FolderInfo {
    /// The folder.
    pub path: String,
    /// Name of its file system.
    pub file_system: String,
    /// The way bytes would take there.
    pub medium: String,
    /// Why that way.
    pub reason: String,
    /// Bytes that the file system has left for this process.
    pub free_bytes: u64,
    /// Capacity of a new store there, if nobody configures one.
    pub default_capacity_bytes: u64,
    /// Whether this process may write there.
    pub writable: bool,
    /// Whether users besides the owner may write there, so that they can plant KV.
    pub writable_for_others: bool,
    /// User id of the owner.
    pub owner: u32,
    /// User id of this process.
    pub user: u32,
    /// Why a writer could not store there, though it may write there; only tried where writing is allowed.
    pub unfit: Option<String>,
}

/// Inspects the folder at `path`, which need not hold a store. Leaves nothing behind.
///
/// # Errors
/// There is no folder at `path`, or it cannot be read.
pub fn folder(path: &Path) -> Result<FolderInfo> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(path, flags, Mode::empty())
        .map(File::from)
        .map_err(|errno| FsError::io("open the folder", path)(errno.into()))?;
    let meta = folder.metadata().map_err(FsError::io("inspect", path))?;
    let choice = medium::choose(&folder, path, Medium::Auto)?;
    let writable = rustix::fs::accessat(&folder, ".", Access::WRITE_OK, AtFlags::EACCESS).is_ok();
    let unfit = writable.then(|| find_unfit(&choice, path)).flatten();
    Ok(FolderInfo {
        default_capacity_bytes: default_capacity_bytes(&choice),
        path: path.display().to_string(),
        file_system: choice.file_system,
        medium: format!("{:?}", choice.medium).to_lowercase(),
        reason: choice.reason.to_owned(),
        free_bytes: choice.free_bytes,
        writable,
        writable_for_others: is_writable_for_others(meta.mode()),
        owner: meta.uid(),
        user: rustix::process::geteuid().as_raw(),
        unfit,
    })
}

/// Why a writer would store nothing there.
fn find_unfit(choice: &MediumChoice, path: &Path) -> Option<String> {
    choice.refusal().or_else(|| try_out(choice, path).err())
}

/// Allocates and locks a small file, as a writer does with its segments.
fn try_out(choice: &MediumChoice, path: &Path) -> Result<(), String> {
    let name = path.join(format!(".kvlane-trial-{:016x}.tmp", random_u64()));
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let failed = |action: &str, error: std::io::Error| format!("cannot {action}: {error}");
    let file = rustix::fs::open(&name, flags, Mode::RUSR | Mode::WUSR)
        .map(File::from)
        .map_err(|errno| failed("create a file", errno.into()))?;
    let tried = (|| {
        choice
            .keep_places(&file)
            .map_err(|error| failed("turn copy-on-write off", error))?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 4096)
            .map_err(|errno| failed("allocate space in advance", errno.into()))?;
        let lock = OfdLock::byte(0);
        let taken = lock
            .try_lock(&file)
            .map_err(|error| failed("lock a file", error))?;
        let other = File::open(&name).map_err(|error| failed("open a file twice", error))?;
        let seen = lock
            .is_held_by_other(&other)
            .map_err(|error| failed("ask for a lock", error))?;
        if taken && seen {
            Ok(())
        } else {
            Err("locks of files have no effect there".to_owned())
        }
    })();
    let removed = std::fs::remove_file(&name).map_err(|error| failed("remove a file", error));
    tried.and(removed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_is_tried_out_and_left_as_it_was() {
        let root = tempfile::tempdir().unwrap();
        let info = folder(root.path()).unwrap();
        assert!(info.writable && info.unfit.is_none(), "{info:?}");
        assert!(!info.writable_for_others);
        assert_eq!(info.owner, info.user);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);

        std::fs::set_permissions(root.path(), PermissionsExt::from_mode(0o777)).unwrap();
        assert!(folder(root.path()).unwrap().writable_for_others);
        std::fs::set_permissions(root.path(), PermissionsExt::from_mode(0o1777)).unwrap();
        assert!(!folder(root.path()).unwrap().writable_for_others);
    }

    #[test]
    fn a_file_system_on_which_nothing_is_stored_is_unfit() {
        let root = tempfile::tempdir().unwrap();
        let file = File::open(root.path()).unwrap();
        let mut choice = medium::choose(&file, root.path(), Medium::Auto).unwrap();
        let is_btrfs = choice.file_system == "btrfs";
        assert_eq!(find_unfit(&choice, root.path()), None);
        for file_system in ["f2fs", "zfs"] {
            choice.file_system = file_system.to_owned();
            let reason = find_unfit(&choice, root.path()).expect("it is unfit");
            assert!(
                reason.contains(file_system) && reason.contains("ext4"),
                "{reason}"
            );
        }
        // The flag is btrfs' own: what is below this test does not take it.
        choice.file_system = "btrfs".to_owned();
        let unfit = find_unfit(&choice, root.path());
        assert_eq!(unfit.is_none(), is_btrfs, "{unfit:?}");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_missing_folder_and_a_file_are_errors() {
        let root = tempfile::tempdir().unwrap();
        assert!(folder(&root.path().join("missing")).is_err());
        std::fs::write(root.path().join("file"), b"").unwrap();
        assert!(folder(&root.path().join("file")).is_err());
    }
}
