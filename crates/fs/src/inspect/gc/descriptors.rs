//! Removing the descriptors of workers that are gone. `kvlane/vllm/descriptors.py` writes them and has the same rules.

use std::fs::File;
use std::io::Read;

use rustix::fs::{AtFlags, FlockOperation, flock};
use rustix::io::Errno;
use serde::Deserialize;

use super::super::descriptors::{DESCRIPTOR_BYTES_MAX, FOLDER, names, open_folder};
use super::{Fate, GcReport, LEFTOVER_AGE_MIN_MS};
use crate::control::open_trusted;
use crate::directory::{Directory, random_u64};
use crate::error::{FsError, Result};
use crate::segment::is_linked_as;

/// A descriptor that is being made.
const STAGED: &str = ".staged-";
const STAGED_AGE_MIN_MS: u64 = 3_600_000;
/// Whether a worker of another machine lives cannot be seen from here.
const FOREIGN_AGE_MIN_MS: u64 = 30 * 86_400_000;

/// What is read of a descriptor.
#[derive(Deserialize)]
struct Content {
    /// 64 hexadecimal digits.
    namespace: String,
    #[serde(rename = "engine_id")]
    _engine_id: String,
    /// Of the kernel under which its worker has locked it.
    boot_id: Option<String>,
}

/// Removes what is left over and puts it into the report. Descriptors that stay are not mentioned.
pub(super) fn collect(
    directory: &Directory,
    unused_ms: u64,
    dry_run: bool,
    report: &mut GcReport,
) -> Result<()> {
    let path = directory.path.join(FOLDER);
    let folder = match open_folder(&directory.folder, &path) {
        Ok(Some(folder)) => folder,
        // Something else may have the name; that is nothing to remove.
        Ok(None) | Err(FsError::Untrusted { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    for name in names(&folder, &path)? {
        if !name.starts_with(STAGED) && !name.ends_with(".json") {
            continue;
        }
        let shown = format!("{FOLDER}/{name}");
        match remove(
            directory,
            &folder,
            &name,
            unused_ms.max(LEFTOVER_AGE_MIN_MS),
            dry_run,
        ) {
            Ok(None) => {}
            Ok(Some(bytes)) => {
                report.freed_bytes += bytes;
                report.removed_files.push(shown);
            }
            Err(error @ FsError::Untrusted { .. }) => report.not_removed(shown, Fate::of_unusable(error)),
            Err(error) => report.not_removed(shown, Fate::Failed(error)),
        }
    }
    Ok(())
}

/// Removes one and returns its bytes, or leaves it.
fn remove(
    directory: &Directory,
    folder: &File,
    name: &str,
    age_min_ms: u64,
    dry_run: bool,
) -> Result<Option<u64>> {
    remove_with(directory, folder, name, age_min_ms, dry_run, || ())
}

/// [`remove`], with what happens between looking at the file and removing its name.
fn remove_with(
    directory: &Directory,
    folder: &File,
    name: &str,
    age_min_ms: u64,
    dry_run: bool,
    stand_still: impl Fn(),
) -> Result<Option<u64>> {
    let path = directory.path.join(FOLDER).join(name);
    let Some(mut file) = open_trusted(folder, name, &path, !dry_run)? else {
        return Ok(None);
    };
    let meta = file.metadata().map_err(FsError::io("inspect", &path))?;
    let age = meta.modified().ok().and_then(|at| at.elapsed().ok());
    let is_older = |ms: u64| age.is_some_and(|age| age.as_millis() >= u128::from(ms));
    if !is_older(age_min_ms) || is_locked(&file, dry_run) {
        return Ok(None);
    }
    let is_left_over = if name.starts_with(STAGED) {
        is_older(STAGED_AGE_MIN_MS)
    } else {
        // Anything else may be somebody's.
        let Some(content) = content(&mut file) else {
            return Ok(None);
        };
        let here = |boot_id: &String| directory.host.runs_since(boot_id);
        is_older(FOREIGN_AGE_MIN_MS) || content.boot_id.as_ref().is_some_and(here)
    };
    if !is_left_over {
        return Ok(None);
    }
    // A worker of that name may start at any moment, and make a descriptor of its own.
    if !is_linked_as(folder, &file, name).map_err(FsError::io("inspect", &path))? {
        return Ok(None);
    }
    stand_still();
    let is_removed = dry_run || unlink(folder, &file, name).map_err(FsError::io("remove", &path))?;
    Ok(is_removed.then_some(meta.len()))
}

/// Removes the name of an open file if the name is that file's. It is moved aside first, where nobody replaces it, and what
/// turns out to be another's goes back.
fn unlink(folder: &File, file: &File, name: &str) -> std::io::Result<bool> {
    let aside = format!("{STAGED}{:016x}{:016x}", random_u64(), random_u64());
    match rustix::fs::renameat(folder, name, folder, &aside) {
        Err(Errno::NOENT) => return Ok(false),
        moved => moved?,
    }
    let is_that_file = is_linked_as(folder, file, &aside)?;
    if !is_that_file {
        match rustix::fs::linkat(folder, &aside, folder, name, AtFlags::empty()) {
            // An even later one is there.
            Ok(()) | Err(Errno::EXIST) => {}
            // A file system without links.
            Err(_) => {
                rustix::fs::renameat(folder, &aside, folder, name)?;
                return Ok(false);
            }
        }
    }
    rustix::fs::unlinkat(folder, &aside, AtFlags::empty())?;
    Ok(is_that_file)
}

/// Whether its worker lives, or may live. Without such locks in this file system, age has to tell.
fn is_locked(file: &File, dry_run: bool) -> bool {
    let lock = if dry_run {
        // NFS gives the other one only to who may write.
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    flock(file, lock) == Err(Errno::WOULDBLOCK)
}

/// What it says; `None`: it is no descriptor.
fn content(file: &mut File) -> Option<Content> {
    let mut text = String::new();
    file.take(DESCRIPTOR_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .ok()?;
    let content: Content = serde_json::from_str(&text).ok()?;
    let is_namespace =
        content.namespace.len() == 64 && content.namespace.bytes().all(|b| b.is_ascii_hexdigit());
    (text.len() as u64 <= DESCRIPTOR_BYTES_MAX && is_namespace).then_some(content)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::fixture::Folder;
    use crate::host::Host;

    const MINUTE_MS: u64 = 60_000;
    const DAY_MS: u64 = 86_400_000;

    /// A file below the descriptors that was written so long ago.
    fn descriptor(folder: &Folder, name: &str, boot_id: &str, age_ms: u64) -> File {
        let path = folder.path().join(FOLDER);
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(
            path.join(name),
            format!(
                r#"{{"namespace":"{}","engine_id":"e","boot_id":"{boot_id}","facts":{{}}}}"#,
                "0".repeat(64)
            ),
        )
        .unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .open(path.join(name))
            .unwrap();
        file.set_modified(SystemTime::now() - Duration::from_millis(age_ms))
            .unwrap();
        file
    }

    fn run(directory: &Directory, unused_ms: u64, dry_run: bool) -> GcReport {
        super::super::collect(directory, unused_ms, dry_run, &mut |_, _| {}).unwrap()
    }

    fn own_boot_id() -> String {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        text.trim().to_owned()
    }

    #[test]
    fn descriptors_of_workers_that_are_gone_are_removed_and_others_stay() {
        let folder = Folder::new(1 << 30);
        let here = own_boot_id();
        let living = descriptor(&folder, "living.json", &here, 40 * DAY_MS);
        flock(&living, FlockOperation::NonBlockingLockExclusive).unwrap();
        drop(descriptor(&folder, "gone.json", &here, 2 * MINUTE_MS));
        drop(descriptor(&folder, "just started.json", &here, 0));
        drop(descriptor(&folder, "elsewhere.json", "another", 29 * DAY_MS));
        drop(descriptor(&folder, "elsewhere, old.json", "another", 31 * DAY_MS));
        drop(descriptor(&folder, ".staged-old", &here, 61 * MINUTE_MS));
        drop(descriptor(&folder, ".staged-new", &here, 2 * MINUTE_MS));
        drop(descriptor(&folder, "notes.txt", &here, 40 * DAY_MS));
        let notes = descriptor(&folder, "notes.json", &here, 0);
        std::fs::write(folder.path().join("descriptors/notes.json"), r#"{"mine": true}"#).unwrap();
        notes
            .set_modified(SystemTime::now() - Duration::from_millis(40 * DAY_MS))
            .unwrap();
        drop(notes);
        std::os::unix::fs::symlink("notes.txt", folder.path().join("descriptors/link.json")).unwrap();

        assert!(
            run(&folder.directory, 50 * DAY_MS, false)
                .removed_files
                .is_empty(),
            "not yet"
        );
        let dry = run(&folder.directory, 0, true);
        let real = run(&folder.directory, 0, false);
        let left_over = [
            "descriptors/.staged-old",
            "descriptors/elsewhere, old.json",
            "descriptors/gone.json",
        ];
        assert_eq!(dry.removed_files, left_over);
        assert_eq!(real.removed_files, left_over);
        assert_eq!(dry.freed_bytes, real.freed_bytes);
        assert!(real.failed.is_empty(), "{real:?}");
        assert_eq!(real.kept[0].name, "descriptors/link.json");
        let stay = [
            "living.json",
            "just started.json",
            "elsewhere.json",
            ".staged-new",
            "notes.txt",
            "notes.json",
        ];
        for name in stay {
            assert!(folder.path().join(FOLDER).join(name).exists(), "{name}");
        }
        drop(living);
        assert_eq!(
            run(&folder.directory, 0, false).removed_files,
            ["descriptors/living.json"]
        );
    }

    #[test]
    fn the_descriptor_of_a_worker_that_starts_meanwhile_stays() {
        let folder = Folder::new(1 << 30);
        drop(descriptor(&folder, "again.json", &own_boot_id(), 2 * MINUTE_MS));
        let path = folder.path().join(FOLDER);
        let opened = File::open(&path).unwrap();
        let starts = || {
            std::fs::write(path.join(".staged-again"), "new").unwrap();
            std::fs::rename(path.join(".staged-again"), path.join("again.json")).unwrap();
        };
        let removed = remove_with(&folder.directory, &opened, "again.json", MINUTE_MS, false, starts);
        assert_eq!(removed.unwrap(), None);
        assert_eq!(std::fs::read(path.join("again.json")).unwrap(), b"new");
    }

    #[test]
    fn a_machine_that_does_not_tell_its_boot_takes_no_worker_for_gone() {
        let mut folder = Folder::new(1 << 30);
        folder.directory.host = Host::unnamed_for_test();
        drop(descriptor(&folder, "a.json", "", 2 * MINUTE_MS));
        assert!(run(&folder.directory, 0, false).removed_files.is_empty());
    }
}
