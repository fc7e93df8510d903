//! What a folder has of a chain of blocks, and why the first missing one is missing.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use kvlane_core::BlockKey;
use serde::Serialize;

use super::{Progress, SlotView, each_segment, hex, open, state};
use crate::directory::unix_ms;
use crate::error::Result;
use crate::format::SlotState;

/// What a folder has of a chain.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ExplainReport {
    /// For each namespace in the folder.
    pub namespaces: Vec<Explanation>,
    /// Files that are not usable segments: whatever is in them counts as absent.
    pub rejected_files: u64,
}

/// What a folder has of a chain, in one namespace.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Explanation {
    /// The namespace with its epoch, 64 hex digits, as records carry it.
    pub namespace: String,
    /// Leading blocks that can be had.
    pub ready_blocks: usize,
    /// Blocks of the chain that are there at all.
    pub present_blocks: usize,
    /// Each block of the chain, in its order.
    pub blocks: Vec<BlockInfo>,
    /// Why the block behind the ready ones cannot be had; `None` if all can.
    pub first_miss: Option<String>,
}

impl Explanation {
    /// For a namespace of which the folder has nothing, and a chain of `block_count` blocks.
    pub fn nothing(namespace: String, block_count: usize) -> Self {
        Self::new(namespace, vec![BlockInfo::ABSENT; block_count])
    }

    fn new(namespace: String, blocks: Vec<BlockInfo>) -> Self {
        let is_ready = |block: &&BlockInfo| block.state == Presence::Ready;
        let ready_blocks = blocks.iter().take_while(is_ready).count();
        Explanation {
            namespace,
            ready_blocks,
            present_blocks: blocks.iter().filter(is_ready).count(),
            first_miss: first_miss(&blocks, ready_blocks),
            blocks,
        }
    }
}

/// One block of a chain, in one namespace.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct BlockInfo {
    /// Whether it can be had.
    pub state: Presence,
    /// File name of the segment that has it or promises it.
    pub segment: Option<String>,
    /// The slot there.
    pub slot: Option<u32>,
}

impl BlockInfo {
    const ABSENT: Self = Self {
        state: Presence::Absent,
        segment: None,
        slot: None,
    };
}

/// Whether a block can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Presence {
    /// It is there. Its payload was not checked.
    Ready,
    /// A living writer is filling it.
    Writing,
    /// A living writer promises it.
    Promised,
    /// It was promised, but the promise ran out.
    Overdue,
    /// It was promised, or being filled, by a writer that is gone.
    Orphaned,
    /// It is there, but somebody found that its bytes are not its own: nobody is served it.
    Bad,
    /// Nothing is known of it.
    Absent,
}

/// Says for each namespace in the folder how much of `chain` it has, and why the first miss is one.
///
/// # Errors
/// There is no store at `path`, or it cannot be read.
pub fn explain(path: &Path, chain: &[BlockKey], progress: Progress<'_>) -> Result<ExplainReport> {
    let directory = open(path)?;
    let wanted: HashMap<BlockKey, usize> = chain.iter().enumerate().map(|(at, key)| (*key, at)).collect();
    let mut seen: BTreeMap<[u8; 32], HashMap<usize, BlockInfo>> = BTreeMap::new();
    let mut rejected_files = 0;
    let now_ms = unix_ms();
    each_segment(&directory, progress, |name, view, _| {
        // `verify` and `list` name it.
        let Ok(view) = view else {
            rejected_files += 1;
            return;
        };
        let alive = view.owner_lives();
        for slot in 0..view.header.slot_count {
            let (record, is_bad, writing) = match state(&view, slot) {
                SlotView::Whole(record) => (record, false, false),
                SlotView::Bad(record) => (record, true, false),
                // A promise is filled in its own slot. Other slots say nothing of what they will hold.
                SlotView::Writing(Some(before)) if before.state == SlotState::Reserved => {
                    (before, false, true)
                }
                _ => continue,
            };
            let state = match record.state {
                SlotState::Free => continue,
                SlotState::Committed if is_bad => Presence::Bad,
                SlotState::Committed => Presence::Ready,
                SlotState::Reserved if record.deadline_unix_ms < now_ms => Presence::Overdue,
                SlotState::Reserved if !alive => Presence::Orphaned,
                SlotState::Reserved if writing => Presence::Writing,
                SlotState::Reserved => Presence::Promised,
            };
            let blocks = seen.entry(record.namespace.0).or_default();
            // The same block may be in several slots; one that can be had counts.
            if let Some(&at) = wanted.get(&record.key)
                && blocks.get(&at).is_none_or(|other| state.beats(other.state))
            {
                let segment = Some(name.clone());
                blocks.insert(
                    at,
                    BlockInfo {
                        state,
                        segment,
                        slot: Some(slot),
                    },
                );
            }
        }
    })?;
    let explain_one = |(namespace, mut found): ([u8; 32], HashMap<usize, BlockInfo>)| {
        let block = |at| found.remove(&at).unwrap_or(BlockInfo::ABSENT);
        Explanation::new(hex(&namespace), (0..chain.len()).map(block).collect())
    };
    Ok(ExplainReport {
        namespaces: seen.into_iter().map(explain_one).collect(),
        rejected_files,
    })
}

/// Why block `at` cannot be had, as a sentence; `None` behind the end.
fn first_miss(blocks: &[BlockInfo], at: usize) -> Option<String> {
    let reason = match blocks.get(at)?.state {
        Presence::Absent if blocks.iter().all(|block| block.state == Presence::Absent) => {
            "is not there, nor is any other of this chain: not stored, evicted, or stored with other tokens, \
             cache salt, LoRA, images or block size"
        }
        Presence::Absent => "is not there: not stored yet, or evicted",
        Presence::Overdue => "was promised, but the promise ran out",
        Presence::Orphaned => "was promised by a writer that is gone",
        Presence::Writing => "is being written",
        Presence::Promised => "is promised and not there yet",
        Presence::Bad => "is damaged: its bytes did not match, it will be recomputed",
        Presence::Ready => return None,
    };
    Some(format!("block {at} {reason}"))
}

impl Presence {
    /// Whether a record in this state says more about a block than one in the other.
    fn beats(self, other: Self) -> bool {
        let rank = |state| match state {
            Presence::Ready => 6,
            Presence::Writing => 5,
            Presence::Promised => 4,
            Presence::Bad => 3,
            Presence::Overdue => 2,
            Presence::Orphaned => 1,
            Presence::Absent => 0,
        };
        rank(self) > rank(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Folder, commit, key, put, record};
    use crate::format::BAD_MARK;

    fn reason(states: &[Presence]) -> Option<String> {
        let block = |&state: &Presence| BlockInfo {
            state,
            ..BlockInfo::ABSENT
        };
        Explanation::new(String::new(), states.iter().map(block).collect()).first_miss
    }

    #[test]
    fn each_state_of_the_first_missing_block_has_a_reason_of_its_own() {
        use Presence::{Absent, Bad, Orphaned, Overdue, Promised, Ready, Writing};
        let reasons: Vec<String> = [
            &[Ready, Absent, Ready][..],
            &[Ready, Promised],
            &[Ready, Writing],
            &[Ready, Overdue],
            &[Ready, Orphaned],
            &[Ready, Bad],
        ]
        .iter()
        .map(|states| reason(states).unwrap())
        .collect();
        assert!(
            reasons.iter().all(|reason| reason.starts_with("block 1 ")),
            "{reasons:?}"
        );
        let mut different = reasons.clone();
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), reasons.len(), "{reasons:?}");
        assert!(reason(&[Absent, Absent]).unwrap().contains("cache salt"));
        assert_eq!(reason(&[Ready, Ready]), None);
        assert_eq!(reason(&[]), None);
    }

    #[test]
    fn of_several_copies_the_one_that_can_be_had_counts() {
        assert!(Presence::Ready.beats(Presence::Promised));
        assert!(Presence::Promised.beats(Presence::Overdue));
        assert!(!Presence::Orphaned.beats(Presence::Orphaned));
        assert!(Presence::Promised.beats(Presence::Bad) && Presence::Bad.beats(Presence::Overdue));
    }

    #[test]
    fn a_block_that_was_marked_bad_is_a_miss_unless_another_slot_has_it() {
        let folder = Folder::new(1 << 30);
        let segment = folder.segment(4, 1);
        for slot in 0..2 {
            commit(&segment, slot, key(slot), slot, 0);
        }
        segment.set_mark(1, BAD_MARK);
        let found = || {
            let mut found = explain(folder.path(), &[key(0), key(1)], &mut |_, _| {}).unwrap();
            found.namespaces.remove(0)
        };
        let one = found();
        assert_eq!((one.ready_blocks, one.present_blocks), (1, 1));
        assert_eq!(one.blocks[1].state, Presence::Bad);
        assert!(one.first_miss.unwrap().starts_with("block 1 is damaged"));
        commit(&segment, 2, key(1), 1, 0);
        assert_eq!(found().first_miss, None);
    }

    #[test]
    fn a_promise_that_is_being_kept_is_told_from_one_that_waits() {
        let folder = Folder::new(1 << 30);
        let segment = folder.segment(3, 1);
        put(&segment, 0, record(SlotState::Reserved, key(0), 0));
        put(&segment, 1, record(SlotState::Reserved, key(1), 1));
        commit(&segment, 2, key(2), 0, 0);
        for slot in [1, 2] {
            segment.invalidate(slot).expect("it is ours");
        }
        let states = || {
            let found = explain(folder.path(), &[key(0), key(1), key(2)], &mut |_, _| {}).unwrap();
            found.namespaces[0]
                .blocks
                .iter()
                .map(|block| block.state)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            states(),
            [Presence::Promised, Presence::Writing, Presence::Absent]
        );
        drop(segment);
        assert_eq!(
            states(),
            [Presence::Orphaned, Presence::Orphaned, Presence::Absent]
        );
    }
}
