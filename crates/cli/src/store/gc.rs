//! `kvlane store gc`.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use indicatif::HumanBytes;
use kvlane_fs::inspect::{self, GcReport};
use serde::Serialize;

use super::progress::with_bar;
use super::{FolderArguments, StoreError, existing_store};
use crate::exit::Exit;
use crate::output::{Report, show};

/// Remove segments that no running server owns and that were not used for a while.
///
/// What stays is said with the reason; status 1 if something should have been removed and could not.
#[derive(Args, Debug)]
pub(super) struct GcArguments {
    #[command(flatten)]
    folder: FolderArguments,
    /// Keep what was stored or loaded more recently than this, such as 30min, 1h or 7days.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    unused_for: Duration,
    /// Only say what would be removed.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(arguments: &GcArguments) -> Result<Exit, StoreError> {
    let folder = existing_store(&arguments.folder.path)?;
    let unused_ms = u64::try_from(arguments.unused_for.as_millis()).unwrap_or(u64::MAX);
    let report = Removal {
        path: folder.display().to_string(),
        dry_run: arguments.dry_run,
        outcome: with_bar(arguments.folder.json, |progress| {
            inspect::gc(&folder, unused_ms, arguments.dry_run, progress)
        })?,
    };
    let shown = show(&report, arguments.folder.json);
    Ok(if report.outcome.failed.is_empty() {
        shown
    } else {
        Exit::Problem
    })
}

#[derive(Serialize)]
struct Removal {
    path: String,
    dry_run: bool,
    #[serde(flatten)]
    outcome: GcReport,
}

impl Report for Removal {
    fn text(&self) -> String {
        let GcReport {
            removed_segments,
            removed_files,
            freed_bytes,
            kept,
            failed,
            ..
        } = &self.outcome;
        let verb = if self.dry_run { "would remove" } else { "removed" };
        let mut text = format!(
            "{}: {verb} {} segments and {} left-over files, {}\n",
            self.path,
            removed_segments.len(),
            removed_files.len(),
            HumanBytes(*freed_bytes)
        );
        for name in removed_segments.iter().chain(removed_files) {
            text += &format!("  {name}\n");
        }
        // One line per reason: a store may have thousands of segments that are in use.
        let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for file in kept {
            reasons.entry(&file.reason).or_default().push(&file.name);
        }
        for (reason, names) in reasons {
            text += &match names.as_slice() {
                [name] => format!("kept {name}: {reason}\n"),
                _ => format!("kept {} files: {reason}\n", names.len()),
            };
        }
        for file in failed {
            text += &format!("could not remove {}: {}\n", file.name, file.reason);
        }
        text
    }
}
