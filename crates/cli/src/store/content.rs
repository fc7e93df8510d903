//! `kvlane store ls` and `kvlane store stat`.

use std::collections::BTreeMap;
use std::path::Path;

use indicatif::HumanBytes;
use kvlane_fs::inspect::{self, SegmentInfo, StoreInfo, WriterInfo};
use serde::Serialize;

use super::progress::with_bar;
use super::{FolderArguments, StoreError, ago, existing_store};
use crate::descriptors::{Names, NamespaceName};
use crate::exit::Exit;
use crate::output::{Report, Table, show};

pub(super) fn ls(arguments: &FolderArguments) -> Result<Exit, StoreError> {
    let StoreInfo { path, segments, .. } = listed(&existing_store(&arguments.path)?, arguments.json)?;
    Ok(show(&Listing { path, segments }, arguments.json))
}

pub(super) fn stat(arguments: &FolderArguments) -> Result<Exit, StoreError> {
    let folder = existing_store(&arguments.path)?;
    let info = listed(&folder, arguments.json)?;
    let names = Names::read(&folder, info.epoch);
    Ok(show(&Totals::new(info, &names), arguments.json))
}

fn listed(folder: &Path, json: bool) -> Result<StoreInfo, StoreError> {
    Ok(with_bar(json, |progress| inspect::list_with(folder, progress))?)
}

#[derive(Serialize)]
struct Listing {
    path: String,
    segments: Vec<SegmentInfo>,
}

impl Report for Listing {
    fn text(&self) -> String {
        if self.segments.is_empty() {
            return format!("{}: no segments", self.path);
        }
        let mut table = Table::new([
            "segment",
            "size",
            "owner",
            "layers",
            "block",
            "slots",
            "blocks",
            "promised",
            "writing",
            "free",
            "damaged",
            "last used",
        ]);
        for segment in &self.segments {
            if segment.rejected.is_some() {
                table.row([segment.name.as_str(), "", "not usable"]);
                continue;
            }
            table.row([
                segment.name.clone(),
                HumanBytes(segment.file_bytes).to_string(),
                if segment.owner_lives { "lives" } else { "gone" }.to_owned(),
                segment.layers.to_string(),
                HumanBytes(segment.block_bytes).to_string(),
                segment.slots.to_string(),
                segment.committed.to_string(),
                segment.reserved.to_string(),
                segment.writing.to_string(),
                segment.free.to_string(),
                segment.damaged.to_string(),
                ago(segment.last_used_unix_ms),
            ]);
        }
        let mut text = table.to_string();
        for reason in self
            .segments
            .iter()
            .filter_map(|segment| segment.rejected.as_ref())
        {
            text += &format!("not usable: {reason}\n");
        }
        text
    }
}

#[derive(Serialize)]
struct Totals {
    path: String,
    file_system: String,
    medium: String,
    reason: String,
    writable: bool,
    capacity_bytes: u64,
    used_bytes: u64,
    epoch: u64,
    writers: Vec<WriterInfo>,
    segments: SegmentCounts,
    slots: SlotCounts,
    namespaces: Vec<NamespaceTotal>,
}

#[derive(Default, Serialize)]
struct SegmentCounts {
    owned: usize,
    orphaned: usize,
    rejected: usize,
}

#[derive(Default, Serialize)]
struct SlotCounts {
    committed: u64,
    reserved: u64,
    writing: u64,
    free: u64,
    damaged: u64,
}

#[derive(Serialize)]
struct NamespaceTotal {
    namespace: String,
    /// Null where no descriptor tells.
    name: Option<NamespaceName>,
    blocks: u64,
    payload_bytes: u64,
}

impl Totals {
    fn new(info: StoreInfo, names: &Names) -> Self {
        let mut segments = SegmentCounts::default();
        let mut slots = SlotCounts::default();
        let mut namespaces: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for (namespace, _) in names.current() {
            namespaces.insert(namespace.clone(), (0, 0));
        }
        for segment in &info.segments {
            match (&segment.rejected, segment.owner_lives) {
                (Some(_), _) => segments.rejected += 1,
                (None, true) => segments.owned += 1,
                (None, false) => segments.orphaned += 1,
            }
            slots.committed += u64::from(segment.committed);
            slots.reserved += u64::from(segment.reserved);
            slots.writing += u64::from(segment.writing);
            slots.free += u64::from(segment.free);
            slots.damaged += u64::from(segment.damaged);
            for (namespace, &blocks) in &segment.namespaces {
                let total = namespaces.entry(namespace.clone()).or_default();
                total.0 += u64::from(blocks);
                total.1 += u64::from(blocks) * segment.block_bytes;
            }
        }
        Self {
            path: info.path,
            file_system: info.file_system,
            medium: info.medium,
            reason: info.reason,
            writable: info.writable,
            capacity_bytes: info.capacity_bytes,
            used_bytes: info.used_bytes,
            epoch: info.epoch,
            writers: info.writers,
            segments,
            slots,
            namespaces: namespaces
                .into_iter()
                .map(|(namespace, (blocks, payload_bytes))| NamespaceTotal {
                    name: names.get(&namespace).cloned(),
                    namespace,
                    blocks,
                    payload_bytes,
                })
                .collect(),
        }
    }
}

impl Report for Totals {
    fn text(&self) -> String {
        let percent = 100.0 * self.used_bytes as f64 / self.capacity_bytes.max(1) as f64;
        let access = if self.writable { "writable" } else { "read-only" };
        let writers: Vec<String> = self
            .writers
            .iter()
            .map(|writer| match writer.wanted_bytes {
                0 => HumanBytes(writer.used_bytes).to_string(),
                wanted => format!(
                    "{} and wants {}",
                    HumanBytes(writer.used_bytes),
                    HumanBytes(wanted)
                ),
            })
            .collect();
        let writers = match writers.len() {
            0 => "none live".to_owned(),
            count => format!("{count} live, with {}", writers.join(", ")),
        };
        let (segments, slots) = (&self.segments, &self.slots);
        let mut text = format!(
            "folder    {}, {access}\n\
             medium    {} ({}: {})\n\
             use       {} of {} ({percent:.1} %)\n\
             writers   {writers}\n\
             epoch     {}\n\
             segments  {} owned, {} orphaned, {} not usable\n\
             slots     {} blocks, {} promised, {} being written, {} free, {} damaged\n",
            self.path,
            self.medium,
            self.file_system,
            self.reason,
            HumanBytes(self.used_bytes),
            HumanBytes(self.capacity_bytes),
            self.epoch,
            segments.owned,
            segments.orphaned,
            segments.rejected,
            slots.committed,
            slots.reserved,
            slots.writing,
            slots.free,
            slots.damaged,
        );
        if !self.namespaces.is_empty() {
            let mut table = Table::new(["namespace", "blocks", "payload", "of"]);
            for total in &self.namespaces {
                table.row([
                    total.namespace[..16].to_owned(),
                    total.blocks.to_string(),
                    HumanBytes(total.payload_bytes).to_string(),
                    total.name.as_ref().map_or_else(
                        || "no descriptor: another server's, or an older reset's".to_owned(),
                        NamespaceName::line,
                    ),
                ]);
            }
            text += &format!("\n{table}");
        }
        text
    }
}
