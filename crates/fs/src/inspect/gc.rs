//! Removing what no server owns and nobody has used for a while.

mod descriptors;

use std::path::Path;

use serde::Serialize;

use super::{Progress, describe, each_segment, open};
use crate::control::open_trusted;
use crate::directory::{Directory, unix_ms};
use crate::error::{FsError, Result};
use crate::raw::OfdLock;
use crate::segment::{self, SegmentView, is_foreign_host};

/// Making a file takes far less, even where it has to be allocated.
const LEFTOVER_AGE_MIN_MS: u64 = 60_000;

/// Whoever makes a file of which another could think that it was left over locks this.
const MAKER_LOCK: OfdLock = OfdLock::byte(0);

/// What the names of files that are being made begin and end with; between are 16 hex digits.
const LEFTOVER_NAMES: [(&str, &str); 3] = [
    ("control.", ".tmp"),
    ("seg-", ".kvlane.tmp"),
    (".kvlane-trial-", ".tmp"),
];

/// Outcome of a clean-up.
#[derive(Debug, Clone, Default, Serialize)]
#[non_exhaustive]
pub struct GcReport {
    /// Segments that were removed.
    pub removed_segments: Vec<String>,
    /// Left-overs of interrupted work that were removed.
    pub removed_files: Vec<String>,
    /// Bytes that were freed.
    pub freed_bytes: u64,
    /// What stays, and why.
    pub kept: Vec<KeptFile>,
    /// What should have been removed and could not.
    pub failed: Vec<KeptFile>,
}

/// A file that was not removed.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct KeptFile {
    /// Its name.
    pub name: String,
    /// Why it is still there.
    pub reason: String,
}

/// Removes segments that nobody owns and that were not used for `unused_ms`, and left-overs of interrupted work and of
/// workers that are as old. A running writer's files are never touched. A dry run decides the same and removes nothing.
///
/// # Errors
/// There is no store at `path`, or it is read-only. What cannot be removed is in the report.
pub fn gc(path: &Path, unused_ms: u64, dry_run: bool, progress: Progress<'_>) -> Result<GcReport> {
    let directory = open(path)?;
    if !directory.writable && !dry_run {
        return Err(FsError::ReadOnly { path: path.into() });
    }
    collect(&directory, unused_ms, dry_run, progress)
}

fn collect(directory: &Directory, unused_ms: u64, dry_run: bool, progress: Progress<'_>) -> Result<GcReport> {
    let mut report = GcReport::default();
    each_segment(directory, progress, |name, view, _| {
        let removed = view.map_err(Fate::of_unusable).and_then(|view| {
            let bytes = view.header.file_bytes();
            if let Some(reason) = reason_to_keep(directory, &view, unused_ms) {
                return Err(Fate::Kept(reason));
            }
            drop(view);
            match dry_run || segment::remove_orphan(directory, &name).map_err(Fate::Failed)? {
                true => Ok(bytes),
                false => Err(Fate::Kept(
                    "a server took it over, or removed it, just now".to_owned(),
                )),
            }
        });
        match removed {
            Ok(bytes) => {
                report.freed_bytes += bytes;
                report.removed_segments.push(name);
            }
            Err(fate) => report.not_removed(name, fate),
        }
    })?;
    for name in leftovers(directory)? {
        match remove_leftover(directory, &name, unused_ms.max(LEFTOVER_AGE_MIN_MS), dry_run) {
            Ok(bytes) => {
                report.freed_bytes += bytes;
                report.removed_files.push(name);
            }
            Err(fate) => report.not_removed(name, fate),
        }
    }
    descriptors::collect(directory, unused_ms, dry_run, &mut report)?;
    Ok(report)
}

/// Why something was not removed.
enum Fate {
    Kept(String),
    Failed(FsError),
}

impl Fate {
    fn of_unusable(error: FsError) -> Self {
        Self::Kept(error.to_string())
    }
}

impl GcReport {
    fn not_removed(&mut self, name: String, fate: Fate) {
        match fate {
            Fate::Kept(reason) => self.kept.push(KeptFile { name, reason }),
            Fate::Failed(error) => self.failed.push(KeptFile {
                name,
                reason: error.to_string(),
            }),
        }
    }
}

fn reason_to_keep(directory: &Directory, view: &SegmentView, unused_ms: u64) -> Option<String> {
    let info = describe(String::new(), view);
    let used_ms = info.last_used_unix_ms.max(info.created_unix_ms);
    if info.owner_lives {
        Some("a running server owns it".to_owned())
    } else if is_foreign_host(directory, &view.header) {
        // `remove_orphan` refuses it for the same reason.
        Some("another machine made it: its locks may be invisible here".to_owned())
    } else if unix_ms().saturating_sub(used_ms) < unused_ms {
        Some(format!("it was used in the last {} s", seconds(unused_ms)))
    } else {
        None
    }
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

/// Files whose names say that somebody was making them.
fn leftovers(directory: &Directory) -> Result<Vec<String>> {
    let failed = FsError::io("list", &directory.path);
    let entries = std::fs::read_dir(&directory.path).map_err(failed)?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_leftover_name(name))
        .collect();
    names.sort_unstable();
    Ok(names)
}

fn is_leftover_name(name: &str) -> bool {
    LEFTOVER_NAMES.iter().any(|(start, end)| {
        let digits = name.strip_prefix(start).and_then(|rest| rest.strip_suffix(end));
        digits
            .is_some_and(|digits| digits.len() == 16 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
    })
}

/// Removes what an interrupted maker left behind, and returns its bytes.
fn remove_leftover(directory: &Directory, name: &str, age_ms: u64, dry_run: bool) -> Result<u64, Fate> {
    let path = directory.path.join(name);
    let kept = |reason: &str| Fate::Kept(reason.to_owned());
    let file = open_trusted(&directory.folder, name, &path, !dry_run)
        .map_err(Fate::of_unusable)?
        .ok_or_else(|| kept("its maker removed it just now"))?;
    let failed = |action| {
        let io = FsError::io(action, &path);
        move |error| Fate::Failed(io(error))
    };
    let meta = file.metadata().map_err(failed("inspect"))?;
    let age = meta.modified().ok().and_then(|at| at.elapsed().ok());
    if age.is_none_or(|age| age.as_millis() < u128::from(age_ms)) {
        return Err(Fate::Kept(format!(
            "it was written in the last {} s",
            seconds(age_ms)
        )));
    }
    let is_locked = MAKER_LOCK.is_held_by_other(&file).map_err(failed("lock"))?;
    if is_locked || !(dry_run || MAKER_LOCK.try_lock(&file).map_err(failed("lock"))?) {
        return Err(kept("a running process is making it"));
    }
    if !dry_run {
        rustix::fs::unlinkat(&directory.folder, name, rustix::fs::AtFlags::empty())
            .map_err(|errno| failed("remove")(errno.into()))?;
    }
    Ok(meta.len())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::fixture::{Folder, geometry};
    use crate::host::Host;
    use crate::options::Medium;
    use crate::segment::OwnedSegment;

    fn run(directory: &Directory, unused_ms: u64, dry_run: bool) -> GcReport {
        collect(directory, unused_ms, dry_run, &mut |_, _| {}).unwrap()
    }

    /// A file that was last written ten minutes ago.
    fn old_file(folder: &Folder, name: &str) -> File {
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(folder.path().join(name))
            .unwrap();
        file.set_len(100).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(600))
            .unwrap();
        file
    }

    #[test]
    fn only_left_overs_of_our_own_are_removed() {
        let folder = Folder::new(1 << 30);
        let ours = [
            ".kvlane-trial-0123456789abcdef.tmp",
            "control.0123456789abcdef.tmp",
            "seg-0123456789abcdef.kvlane.tmp",
        ];
        let foreign = [
            "notes.tmp",
            "control.tmp",
            "control.0123.tmp",
            "seg-0123456789abcdeg.kvlane.tmp",
            "seg-0123456789abcdef.kvlane.tmp.tmp",
        ];
        for name in ours.iter().chain(&foreign) {
            old_file(&folder, name);
        }
        assert!(
            run(&folder.directory, 3_600_000, false).removed_files.is_empty(),
            "not yet"
        );
        let dry = run(&folder.directory, 0, true);
        let real = run(&folder.directory, 0, false);
        assert_eq!(
            (&dry.removed_files[..], dry.freed_bytes),
            (&ours.map(str::to_owned)[..], 300)
        );
        assert_eq!(real.removed_files, dry.removed_files);
        for name in foreign {
            assert!(folder.path().join(name).exists(), "{name}");
        }
        assert!(ours.iter().all(|name| !folder.path().join(name).exists()));
    }

    #[test]
    fn a_file_that_is_being_made_stays_however_long_it_takes() {
        let folder = Folder::new(1 << 30);
        let name = "seg-0123456789abcdef.kvlane.tmp";
        let maker = old_file(&folder, name);
        assert!(MAKER_LOCK.try_lock(&maker).unwrap());
        for dry_run in [true, false] {
            let report = run(&folder.directory, 0, dry_run);
            assert!(report.removed_files.is_empty(), "{report:?}");
            assert_eq!(report.kept[0].reason, "a running process is making it");
        }
        drop(maker);
        assert_eq!(run(&folder.directory, 0, false).removed_files, [name]);
    }

    #[test]
    fn a_dry_run_names_exactly_what_a_run_removes() {
        let folder = Folder::new(1 << 30);
        let network = folder.open_as(Medium::Network);
        // Another machine's, one that is owned, one that nobody owns.
        let elsewhere = Host {
            boot_id: [9; 16],
            machine_id: [9; 16],
        };
        let mut header = geometry().header(1, u64::MAX, elsewhere).unwrap();
        header.slot_count = 1;
        drop(OwnedSegment::create(&network, &header, &geometry().layer_bytes, 1).unwrap());
        let owned = folder.segment(1, 2);
        drop(folder.segment(1, 3));
        std::fs::write(folder.path().join("seg-00000000000000ff.kvlane"), [0; 9000]).unwrap();

        let recent = run(&network, 3_600_000, true);
        assert_eq!((recent.removed_segments.len(), recent.kept.len()), (0, 4));
        let dry = run(&network, 0, true);
        let real = run(&network, 0, false);
        assert_eq!(dry.removed_segments.len(), 1);
        assert_eq!(dry.removed_segments, real.removed_segments);
        assert_eq!(dry.freed_bytes, real.freed_bytes);
        assert_eq!(real.kept.len(), 3, "{real:?}");
        for word in ["another machine", "running server", "not usable"] {
            let with_it = real.kept.iter().filter(|kept| kept.reason.contains(word));
            assert_eq!(with_it.count(), 1, "{word}: {real:?}");
        }
        assert!(real.failed.is_empty());
        assert!(run(&network, 0, false).removed_segments.is_empty());
        drop(owned);
    }
}
