//! `kvlane store verify`.

use indicatif::HumanBytes;
use kvlane_fs::inspect::{self, BadBlock, VerifyReport};
use serde::Serialize;

use super::progress::with_bar;
use super::{FolderArguments, StoreError, existing_store};
use crate::exit::Exit;
use crate::output::{Report, Table, show};

pub(super) fn run(arguments: &FolderArguments) -> Result<Exit, StoreError> {
    let folder = existing_store(&arguments.path)?;
    let outcome = with_bar(arguments.json, |progress| inspect::verify(&folder, progress));
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
                error,
                ..
            } in &outcome.bad_blocks
            {
                let wrong = match (layer, error) {
                    (_, Some(error)) => format!("cannot be read: {error}"),
                    (layer, None) => layer.map_or_else(String::new, |layer| layer.to_string()),
                };
                table.row([key, segment, &slot.to_string(), &wrong]);
            }
            text += &format!("\n{table}");
        }
        for file in &outcome.rejected_files {
            text += &format!("not usable: {file}\n");
        }
        if !self.is_sound() {
            text +=
                "\nServers that verify, as they do by default, never use what is bad: they recompute it.\n";
        }
        text
    }
}
