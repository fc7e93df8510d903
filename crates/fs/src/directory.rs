//! A shared folder: opened once, checked for trust, with its medium chosen.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags};

use crate::control::Control;
use crate::descriptors::Share;
use crate::error::{FsError, Result};
use crate::host::Host;
use crate::jobs::lock;
use crate::medium::{self, MediumChoice};
use crate::memory_limit;
use crate::options::{FsOptions, Medium};
use crate::segment::Removed;

/// What a segment's file name looks like: `seg-` + 16 hex digits + `.kvlane`.
const SEGMENT_PREFIX: &str = "seg-";
const SEGMENT_SUFFIX: &str = ".kvlane";

/// An opened folder.
#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) path: PathBuf,
    pub(crate) folder: File,
    pub(crate) writable: bool,
    pub(crate) choice: MediumChoice,
    pub(crate) host: Host,
    pub(crate) control: Arc<Control>,
    pub(crate) descriptors: Share,
    /// Segments that we removed and whose payload somebody was still copying.
    removed: Mutex<Vec<Removed>>,
}

impl Directory {
    /// Opens the folder, and creates it and its control file if `create`. `Ok(None)`: there is nothing yet and nothing
    /// may be created, which for a reader is an empty store.
    pub(crate) fn open(path: &Path, options: &FsOptions, create: bool) -> Result<Option<Self>> {
        options.check()?;
        let may_create = create;
        if may_create
            && let Err(error) = DirBuilder::new().recursive(true).mode(0o700).create(path)
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            // On a read-only mount an existing folder is fine; the open below decides.
            if !path.is_dir() {
                return Err(FsError::io("create the folder", path)(error));
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(descriptor) => File::from(descriptor),
            Err(rustix::io::Errno::NOENT) if !create => return Ok(None),
            Err(errno) => return Err(FsError::io("open the folder", path)(errno.into())),
        };
        let meta = folder.metadata().map_err(FsError::io("inspect", path))?;
        let own = rustix::process::geteuid().as_raw();
        if meta.uid() != own && meta.uid() != 0 {
            let problem = format!("belongs to user {} and this process is user {own}", meta.uid());
            return Err(FsError::Untrusted {
                path: path.into(),
                problem,
            });
        }
        let writable = rustix::fs::accessat(
            &folder,
            ".",
            rustix::fs::Access::WRITE_OK,
            rustix::fs::AtFlags::EACCESS,
        )
        .is_ok();
        let choice = medium::choose(&folder, path, options.medium)?;
        let capacity = || default_capacity_bytes(&choice);
        let Some(control) = Control::open(&folder, path, writable, create, options.capacity_bytes, capacity)?
        else {
            return Ok(None);
        };
        if let Some(configured) = options.capacity_bytes
            && configured != control.capacity_bytes()
            && !(writable
                && control.replace_capacity(configured, || {
                    segment_names(&folder, path).is_ok_and(|names| names.is_empty())
                })?)
        {
            return Err(FsError::CapacityMismatch {
                path: path.into(),
                configured,
                recorded: control.capacity_bytes(),
            });
        }
        // Not earlier: a reader comes here again and again until there is a store.
        if is_writable_for_others(meta.mode()) {
            tracing::warn!(
                path = %path.display(),
                "the folder is writable for others: who can write it can plant KV"
            );
        }
        tracing::info!(
            path = %path.display(),
            file_system = choice.file_system,
            medium = ?choice.medium,
            reason = choice.reason,
            capacity_bytes = control.capacity_bytes(),
            writable,
            "opened the KV store"
        );
        Ok(Some(Directory {
            path: path.into(),
            folder,
            writable,
            choice,
            host: Host::this(),
            control: Arc::new(control),
            descriptors: Share::of_this_process(),
            removed: Mutex::default(),
        }))
    }

    /// Gives the space of a removed segment back: now, or once nobody copies from it any more.
    pub(crate) fn give_back_payload(&self, removed: Removed) {
        if !removed.is_punched(self) {
            lock(&self.removed).push(removed);
        }
    }

    /// Tries again what [`give_back_payload`](Self::give_back_payload) had to leave. May block: not for an engine's thread.
    pub(crate) fn give_back_payloads(&self) {
        let removed = std::mem::take(&mut *lock(&self.removed));
        for removed in removed {
            self.give_back_payload(removed);
        }
    }

    /// Names and ids of the segments that are linked now.
    pub(crate) fn segment_names(&self) -> Result<Vec<(u64, String)>> {
        segment_names(&self.folder, &self.path)
    }

    /// Bytes of all linked segments.
    pub(crate) fn used_bytes(&self) -> Result<u64> {
        let mut used = 0;
        for (_, name) in self.segment_names()? {
            match rustix::fs::statat(&self.folder, &name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => used += stat.st_size.max(0) as u64,
                Err(rustix::io::Errno::NOENT) => {}
                Err(errno) => return Err(FsError::io("inspect", self.path.join(&name))(errno.into())),
            }
        }
        Ok(used)
    }

    /// Returns once the folder accepts writes; for a thread that is about to write through a mapping and may wait.
    pub(crate) fn wait_until_writable(&self) {
        // Nobody can freeze a file system that lives in memory.
        if self.writable && !self.lives_in_memory() {
            self.control.wait_until_writable();
        }
    }

    /// Whether the files are memory, whatever way the bytes take to them.
    pub(crate) fn lives_in_memory(&self) -> bool {
        self.choice.lives_in_memory()
    }

    /// Whether the payload goes through mappings.
    pub(crate) fn mapped_payload(&self) -> bool {
        self.choice.medium == Medium::Memory
    }
}

fn segment_names(folder: &File, path: &Path) -> Result<Vec<(u64, String)>> {
    let failed = |errno: rustix::io::Errno| FsError::io("list", path)(errno.into());
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if let Some(name) = entry.file_name().to_str().ok()
            && let Some(id) = segment_id(name)
        {
            names.push((id, name.to_owned()));
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Whether users besides the owner may replace files of a folder with this mode. With the sticky bit, they can add files
/// but not replace ours.
pub(crate) fn is_writable_for_others(mode: u32) -> bool {
    mode & 0o022 != 0 && mode & 0o1000 == 0
}

/// Half of what is left, so that a folder that nobody configured does not fill a machine.
pub(crate) fn default_capacity_bytes(choice: &MediumChoice) -> u64 {
    let mut left = choice.free_bytes;
    if (choice.lives_in_memory() || choice.medium == Medium::Memory)
        && let Some(headroom) = memory_limit::headroom_bytes()
    {
        left = left.min(headroom);
    }
    (left / 2).max(1 << 20)
}

/// File name of a segment.
pub(crate) fn segment_name(id: u64) -> String {
    format!("{SEGMENT_PREFIX}{id:016x}{SEGMENT_SUFFIX}")
}

fn segment_id(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(SEGMENT_PREFIX)?.strip_suffix(SEGMENT_SUFFIX)?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())?
}

/// Milliseconds since 1970; two processes on one machine agree on it.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_millis() as u64)
}

/// A number that no other process has.
pub(crate) fn random_u64() -> u64 {
    let mut bytes = [0; 8];
    if !matches!(
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()),
        Ok(8)
    ) {
        // Without the system's generator, time and process id still differ between processes.
        let mut hasher = blake3::Hasher::new();
        hasher.update(&std::process::id().to_le_bytes());
        hasher.update(format!("{:?}{:?}", SystemTime::now(), std::time::Instant::now()).as_bytes());
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    }
    u64::from_le_bytes(bytes).max(1)
}
