//! Removing the descriptors of workers that are gone. `kvlane/vllm/descriptors.py` writes them and has the same rules.

use std::fs::File;
use std::io::Read;

use rustix::fs::{AtFlags, FlockOperation, flock};
use rustix::io::Errno;
use serde::Deserialize;

use super::super::descriptors::{DESCRIPTOR_BYTES_MAX, FOLDER, names, open_folder};
use super::{Fate, GcReport, LEFTOVER_AGE_MIN_MS};
use crate::control::open_trusted;
use crate::directory::Directory;
use crate::error::{FsError, Result};

/// A descriptor that is being made.
const STAGED: &str = ".staged-";
const STAGED_AGE_MIN_MS: u64 = 3_600_000;
/// Whether a worker of another machine lives cannot be seen from here.
const FOREIGN_AGE_MIN_MS: u64 = 30 * 86_400_000;

/// What is read of a descriptor.
#[derive(Deserialize)]
struct Content {
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
        is_older(FOREIGN_AGE_MIN_MS) || was_locked_here(directory, &mut file)
    };
    if !is_left_over {
        return Ok(None);
    }
    if !dry_run {
        rustix::fs::unlinkat(folder, name, AtFlags::empty())
            .map_err(|errno| FsError::io("remove", &path)(errno.into()))?;
    }
    Ok(Some(meta.len()))
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

/// Whether a lock of its worker would be seen from here.
fn was_locked_here(directory: &Directory, file: &mut File) -> bool {
    let mut text = String::new();
    let is_read = file.take(DESCRIPTOR_BYTES_MAX).read_to_string(&mut text).is_ok();
    let content: Option<Content> = serde_json::from_str(&text).ok();
    let boot_id = content.and_then(|content| content.boot_id);
    is_read && boot_id.is_some_and(|boot_id| directory.host.runs_since(&boot_id))
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
            format!(r#"{{"boot_id":"{boot_id}","facts":{{}}}}"#),
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
    fn a_machine_that_does_not_tell_its_boot_takes_no_worker_for_gone() {
        let mut folder = Folder::new(1 << 30);
        folder.directory.host = Host::unnamed_for_test();
        drop(descriptor(&folder, "a.json", "", 2 * MINUTE_MS));
        assert!(run(&folder.directory, 0, false).removed_files.is_empty());
    }
}
