//! `kvlane store verify`.

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use kvlane_fs::inspect::{self, BadBlock, VerifyReport};
use serde::Serialize;

use super::{FolderArguments, StoreError, existing_store};
use crate::exit::Exit;
use crate::output::{Report, Table, show};

pub(super) fn run(arguments: &FolderArguments) -> Result<Exit, StoreError> {
    let folder = existing_store(&arguments.path)?;
    // On standard error, and nothing at all where that is not a terminal.
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let outcome = inspect::verify(&folder, &mut |done_bytes, total_bytes| {
        bar.set_length(total_bytes);
        bar.set_position(done_bytes);
    });
    bar.finish_and_clear();
    let report = Verification {
        path: folder.display().to_string(),
        outcome: outcome?,
    };
    let shown = show(&report, arguments.json);
    Ok(if report.is_sound() { shown } else { Exit::Problem })
}

#[derive(Serialize)]
struct Verification {
    path: String,
    #[serde(flatten)]
    outcome: VerifyReport,
}

impl Verification {
    fn is_sound(&self) -> bool {
        let VerifyReport {
            bad_blocks,
            damaged_records,
            rejected_files,
            ..
        } = &self.outcome;
        bad_blocks.is_empty() && *damaged_records == 0 && rejected_files.is_empty()
    }
}

impl Report for Verification {
    fn text(&self) -> String {
        let outcome = &self.outcome;
        let mut text = format!(
            "{}: {} blocks are right ({}), {} are bad, {} were recycled while they were read, {} records are \
             damaged, {} files are not usable\n",
            self.path,
            outcome.good_blocks,
            HumanBytes(outcome.good_bytes),
            outcome.bad_blocks.len(),
            outcome.recycled_blocks,
            outcome.damaged_records,
            outcome.rejected_files.len(),
        );
        if !outcome.bad_blocks.is_empty() {
            let mut table = Table::new(["bad block", "segment", "slot", "first wrong layer"]);
            for BadBlock {
                segment,
                slot,
                key,
                layer,
            } in &outcome.bad_blocks
            {
                table.row([key, segment, &slot.to_string(), &layer.to_string()]);
            }
            text += &format!("\n{table}");
        }
        for file in &outcome.rejected_files {
            text += &format!("not usable: {file}\n");
        }
        if !self.is_sound() {
            text += "\nServers never use what is bad: they recompute it.\n";
        }
        text
    }
}
