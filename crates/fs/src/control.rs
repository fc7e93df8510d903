//! The control file of a folder: capacity, counters that readers watch, and who writes.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use crate::error::{FsError, Result};
use crate::format::{self, control};
use crate::medium;
use crate::raw::{ForkGuard, OfdLock, ReadMapping, WriteMapping};

/// Name of the control file.
pub(crate) const CONTROL_NAME: &str = "control";

/// The mapped control file.
#[derive(Debug)]
pub(crate) struct Control {
    // In front of `file`, so that it is dropped first.
    _fork_guard: ForkGuard,
    file: File,
    path: PathBuf,
    view: View,
    /// The epoch that this process has asked for; the file may lag behind while its file system accepts no writes.
    epoch_wanted: AtomicU64,
}

/// How long a reset waits for the file system.
const EPOCH_PATIENCE: Duration = Duration::from_millis(500);

#[derive(Debug)]
enum View {
    Read(ReadMapping),
    Write(WriteMapping),
}

/// How long another process may hold the budget lock before the capacity stays as it is.
const REPLACE_PATIENCE: Duration = Duration::from_millis(200);
/// The head is 28 bytes, written in one call.
const HEAD_PAUSE: Duration = Duration::from_millis(20);

/// Opens a file of the folder without following links, and refuses what somebody else could have put there.
pub(crate) fn open_trusted(folder: &File, name: &str, path: &Path, write: bool) -> Result<Option<File>> {
    let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
    let flags = access | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match rustix::fs::openat(folder, name, flags, Mode::empty()) {
        Ok(descriptor) => File::from(descriptor),
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(rustix::io::Errno::LOOP) => {
            return Err(FsError::Untrusted {
                path: path.into(),
                problem: "is a symbolic link".into(),
            });
        }
        Err(errno) => return Err(FsError::io("open", path)(errno.into())),
    };
    let meta = file.metadata().map_err(FsError::io("inspect", path))?;
    if !meta.is_file() {
        return Err(FsError::Untrusted {
            path: path.into(),
            problem: "is not a regular file".into(),
        });
    }
    let own = rustix::process::geteuid().as_raw();
    if meta.uid() != own {
        let problem = format!("belongs to user {} and this process is user {own}", meta.uid());
        return Err(FsError::Untrusted {
            path: path.into(),
            problem,
        });
    }
    Ok(Some(file))
}

impl Control {
    /// Opens the control file, or creates it with the capacity that `choose_capacity` names if `create_missing`. `Ok(None)`: it
    /// is not there and is not to be created or cannot be.
    pub(crate) fn open(
        folder: &File,
        folder_path: &Path,
        writable: bool,
        create_missing: bool,
        configured: Option<u64>,
        choose_capacity: impl FnOnce() -> u64,
    ) -> Result<Option<Self>> {
        let path = folder_path.join(CONTROL_NAME);
        let mut found = open_trusted(folder, CONTROL_NAME, &path, writable)?;
        if found.is_none() {
            if !writable || !create_missing {
                return Ok(None);
            }
            create(folder, &path, configured.unwrap_or_else(choose_capacity))?;
            found = open_trusted(folder, CONTROL_NAME, &path, writable)?;
        }
        let Some(file) = found else {
            return Err(FsError::io("open", path)(std::io::ErrorKind::NotFound.into()));
        };
        let length = file.metadata().map_err(FsError::io("inspect", &path))?.len();
        let reject = |reject| FsError::Foreign {
            path: path.clone(),
            reject,
        };
        if length < control::FILE_BYTES {
            let expected = control::FILE_BYTES;
            return Err(reject(format::Reject::Truncated {
                found: length,
                expected,
            }));
        }
        check_head(&file, &path)?.map_err(reject)?;
        let bytes = control::FILE_BYTES as usize;
        let view = if writable {
            View::Write(WriteMapping::new(&file, bytes).map_err(FsError::io("map", &path))?)
        } else {
            View::Read(ReadMapping::new(&file, bytes).map_err(FsError::io("map", &path))?)
        };
        Ok(Some(Control {
            _fork_guard: ForkGuard::new(&file),
            file,
            path,
            view,
            epoch_wanted: AtomicU64::new(0),
        }))
    }

    /// What all segments together may take, as the file says now.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.read().load_u64(control::CAPACITY as usize)
    }

    /// Records another capacity, if nobody writes here and nothing was written. False: somebody does, or something was.
    ///
    /// Whoever opened the folder first without an option, such as a server that only loads, has made a guess.
    pub(crate) fn replace_capacity(
        &self,
        capacity_bytes: u64,
        is_empty: impl FnOnce() -> bool,
    ) -> Result<bool> {
        use std::os::unix::fs::FileExt;
        let replace = || {
            if !self.live_writers(None).is_empty() || !is_empty() {
                return Ok(false);
            }
            let head = format::encode_control(capacity_bytes);
            let fixed = control::CAPACITY as usize..control::FIXED_BYTES;
            self.file
                .write_all_at(&head[fixed], control::CAPACITY)
                .map_err(FsError::io("write", &self.path))?;
            Ok(true)
        };
        self.with_budget_lock(REPLACE_PATIENCE, replace)
            .unwrap_or(Ok(false))
    }

    fn read(&self) -> &ReadMapping {
        match &self.view {
            View::Read(mapping) => mapping,
            View::Write(mapping) => mapping,
        }
    }

    pub(crate) fn generation(&self) -> u64 {
        self.read().load_u64(control::GENERATION as usize)
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.read()
            .load_u64(control::EPOCH as usize)
            .max(self.epoch_wanted.load(Ordering::Acquire))
    }

    pub(crate) fn changes(&self) -> u64 {
        self.read().load_u64(control::CHANGES as usize)
    }

    fn bump(&self, offset: u64) -> bool {
        match &self.view {
            View::Write(mapping) => {
                mapping.u64_at(offset as usize).fetch_add(1, Ordering::AcqRel);
                true
            }
            View::Read(_) => false,
        }
    }

    /// Returns once the file system accepts writes. A store through a mapping would wait for that too, but inside a page
    /// fault, and before Linux 6.7 with the lock of the whole address space: every thread of the engine that allocates
    /// memory would wait as well. A freeze stops writes before it stops page faults, so what follows this is let through.
    pub(crate) fn wait_until_writable(&self) {
        use std::os::unix::fs::FileExt;
        if let Err(error) = self.file.write_all_at(&[0; 8], control::SCRATCH) {
            tracing::debug!(path = %self.path.display(), %error, "cannot write the control file");
        }
    }

    /// Tells all readers that segments appeared or disappeared.
    pub(crate) fn bump_generation(&self) {
        self.bump(control::GENERATION);
    }

    /// As if the process had died before it told anybody.
    #[cfg(test)]
    pub(crate) fn set_generation_for_test(&self, generation: u64) {
        if let View::Write(mapping) = &self.view {
            mapping
                .u64_at(control::GENERATION as usize)
                .store(generation, Ordering::Release);
        }
    }

    /// Tells all readers that slots changed.
    pub(crate) fn bump_changes(&self) {
        self.bump(control::CHANGES);
    }

    /// How often somebody has marked a slot bad.
    pub(crate) fn bad_slots(&self) -> u64 {
        self.read().load_u64(control::BAD_SLOTS as usize)
    }

    /// Sends everybody to look at the marks.
    pub(crate) fn bump_bad_slots(&self) {
        self.bump(control::BAD_SLOTS);
        self.bump_changes();
    }

    /// Starts a new epoch: for this process at once, for all others when the file system takes the write, for which
    /// this waits a bounded time.
    pub(crate) fn start_epoch(self: &Arc<Self>) -> Result<()> {
        // Saturating: a number that somebody wrote into the file must not be able to stop an engine.
        let wanted = self.epoch().saturating_add(1);
        self.epoch_wanted.fetch_max(wanted, Ordering::AcqRel);
        if matches!(self.view, View::Read(_)) {
            return Err(FsError::ReadOnly {
                path: self.path.clone(),
            });
        }
        // A store through the mapping of a frozen file system stands still, and nothing can end it: so a thread does it
        // that nobody waits for any longer than this.
        let (control, (sender, receiver)) = (Arc::clone(self), std::sync::mpsc::sync_channel(1));
        std::thread::Builder::new()
            .name("kvlane-epoch".into())
            .spawn(move || {
                control.wait_until_writable();
                control.bump(control::EPOCH);
                let _ = sender.send(());
            })
            .map_err(FsError::io("start a thread for", &self.path))?;
        let late = |_| {
            FsError::io(
                "write now, so that only this process sees the reset for now:",
                &self.path,
            )
        };
        receiver
            .recv_timeout(EPOCH_PATIENCE)
            .map_err(|timeout| late(timeout)(std::io::ErrorKind::TimedOut.into()))
    }

    /// Runs `change` while no other process changes the budget. `None` if the lock could not be had in `patience`: its
    /// holder may have been stopped, and nobody may wait for that.
    pub(crate) fn with_budget_lock<R>(&self, patience: Duration, change: impl FnOnce() -> R) -> Option<R> {
        // A lock belongs to an open file, which all threads of ours share, so no two of them may call this at a time:
        // the opening thread does before there is a writer thread, and then only that one.
        let lock = OfdLock::byte(control::LOCK_BUDGET as u32);
        let deadline = Instant::now() + patience;
        loop {
            match lock.try_lock(&self.file) {
                Ok(true) => break,
                Ok(false) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Ok(false) => return None,
                Err(error) => {
                    tracing::warn!(path = %self.path.display(), %error, "cannot lock the budget");
                    return None;
                }
            }
        }
        let result = change();
        if let Err(error) = lock.unlock(&self.file) {
            tracing::warn!(path = %self.path.display(), %error, "cannot unlock the budget");
        }
        Some(result)
    }

    /// Takes a place in the table of writers. Its lock lives as long as this open file.
    pub(crate) fn register_writer(&self, start_id: u64) -> Result<WriterPlace> {
        let View::Write(mapping) = &self.view else {
            return Err(FsError::ReadOnly {
                path: self.path.clone(),
            });
        };
        for number in 0..control::WRITERS_MAX {
            let lock = OfdLock::byte(control::LOCK_WRITER as u32 + number);
            if lock
                .try_lock(&self.file)
                .map_err(FsError::io("lock", &self.path))?
            {
                let place = WriterPlace { number };
                mapping
                    .u64_at(place.offset(control::WRITER_BYTES_USED))
                    .store(0, Ordering::Release);
                mapping
                    .u64_at(place.offset(control::WRITER_WANTS))
                    .store(0, Ordering::Release);
                mapping
                    .u64_at(place.offset(control::WRITER_START_ID))
                    .store(start_id, Ordering::Release);
                return Ok(place);
            }
        }
        Err(FsError::TooManyWriters {
            path: self.path.clone(),
            limit: control::WRITERS_MAX,
        })
    }

    /// Gives the place back at an orderly end.
    pub(crate) fn forget_writer(&self, place: WriterPlace) {
        self.set(place, control::WRITER_START_ID, 0);
        self.set(place, control::WRITER_WANTS, 0);
        if let Err(error) = OfdLock::byte(control::LOCK_WRITER as u32 + place.number).unlock(&self.file) {
            tracing::debug!(%error, "cannot unlock the writer's place");
        }
    }

    fn set(&self, place: WriterPlace, field: u64, value: u64) {
        if let View::Write(mapping) = &self.view {
            mapping
                .u64_at(place.offset(field))
                .store(value, Ordering::Release);
        }
    }

    pub(crate) fn set_bytes_used(&self, place: WriterPlace, bytes: u64) {
        self.set(place, control::WRITER_BYTES_USED, bytes);
    }

    pub(crate) fn set_wants(&self, place: WriterPlace, bytes: u64) {
        self.set(place, control::WRITER_WANTS, bytes);
    }

    /// The writers that live now.
    pub(crate) fn live_writers(&self, own: Option<WriterPlace>) -> Vec<WriterEntry> {
        let view = self.read();
        (0..control::WRITERS_MAX)
            .filter_map(|number| {
                let place = WriterPlace { number };
                let start_id = view.load_u64(place.offset(control::WRITER_START_ID));
                let lock = OfdLock::byte(control::LOCK_WRITER as u32 + number);
                let own = own.is_some_and(|own| own.number == number);
                if start_id == 0 || !(own || lock.is_held_by_other(&self.file).unwrap_or(false)) {
                    return None;
                }
                Some(WriterEntry {
                    place,
                    own,
                    bytes_used: view.load_u64(place.offset(control::WRITER_BYTES_USED)),
                    wants_bytes: view.load_u64(place.offset(control::WRITER_WANTS)),
                })
            })
            .collect()
    }
}

/// A row of the table of writers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WriterPlace {
    number: u32,
}

impl WriterPlace {
    fn offset(self, field: u64) -> usize {
        (control::WRITERS + u64::from(self.number) * control::WRITER_BYTES + field) as usize
    }
}

/// What a live writer says of itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WriterEntry {
    pub(crate) place: WriterPlace,
    pub(crate) own: bool,
    pub(crate) bytes_used: u64,
    pub(crate) wants_bytes: u64,
}

/// Whether the file's head is right. One that somebody is writing is looked at once more.
fn check_head(file: &File, path: &Path) -> Result<std::result::Result<u64, format::Reject>> {
    let read = || {
        let mut head = [0; control::FIXED_BYTES];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut head, 0).map_err(FsError::io("read", path))?;
        Ok(format::parse_control(&head))
    };
    match read()? {
        Err(format::Reject::Checksum { .. }) => {
            std::thread::sleep(HEAD_PAUSE);
            read()
        }
        outcome => Ok(outcome),
    }
}

/// Creates the control file whole or not at all; losing a race against another process is fine.
fn create(folder: &File, path: &Path, capacity_bytes: u64) -> Result<()> {
    let temporary = format!("{CONTROL_NAME}.{:016x}.tmp", crate::directory::random_u64());
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(folder, &temporary, flags, mode)
        .map(File::from)
        .map_err(|errno| FsError::io("create", path)(errno.into()))?;
    let written = medium::keep_places(&file)
        .and_then(|()| {
            std::os::unix::fs::FileExt::write_all_at(&file, &format::encode_control(capacity_bytes), 0)
        })
        .and_then(|()| {
            match rustix::fs::linkat(
                folder,
                &temporary,
                folder,
                CONTROL_NAME,
                rustix::fs::AtFlags::empty(),
            ) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
                // File systems without hard links: a rename that does not replace.
                Err(_) => rustix::fs::renameat_with(
                    folder,
                    &temporary,
                    folder,
                    CONTROL_NAME,
                    rustix::fs::RenameFlags::NOREPLACE,
                )
                .or_else(|errno| {
                    if errno == rustix::io::Errno::EXIST {
                        Ok(())
                    } else {
                        Err(errno)
                    }
                })
                .map_err(Into::into),
            }
        });
    let _ = rustix::fs::unlinkat(folder, &temporary, rustix::fs::AtFlags::empty());
    written.map_err(FsError::io("create", path))
}
