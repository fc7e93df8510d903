//! What is copied: posted blocks at once, granted ones as far as the notices allow, each once.

use std::ops::Range;

use super::{Copied, Posted, PostedBlocks, Puller, PullerAction, PullerLimits, Scale};

impl Puller {
    /// False: they cannot be the blocks of this pull.
    pub(super) fn copy_posted(&mut self, transfer: u64, posted: &PostedBlocks) -> bool {
        let limits = self.limits;
        let Some(pull) = self.pulls.get_mut(&transfer) else {
            return false;
        };
        let scale = Scale::of(&limits, self.units.get(&pull.connection), pull);
        let is_plausible = posted.blocks.len() == scale.holder_blocks
            && posted.blocks.iter().all(|&block| block < limits.block_count_max);
        if !is_plausible {
            return false;
        }
        pull.posted = Posted::Copying;
        pull.posted_lease = (posted.slot, posted.epoch);
        for (layers, positions) in parts(&limits, &scale, 0..limits.layers, 0..scale.count) {
            pull.running += 1;
            self.actions.push_back(PullerAction::Copy {
                transfer,
                connection: pull.connection,
                slot: posted.slot,
                epoch: posted.epoch,
                span: scale.span(layers, positions, &posted.blocks, &pull.targets),
                deadline: pull.deadline,
            });
        }
        true
    }

    /// Takes the result of a copy of posted blocks. If one fails, what the holder grants is copied once all are over.
    pub(super) fn posted_copied(&mut self, transfer: u64, copied: Copied) {
        let Some(pull) = self.pulls.get_mut(&transfer) else {
            return;
        };
        if copied != Copied::Held {
            pull.posted = Posted::Failed;
        }
        if pull.running > 0 {
            return;
        }
        match std::mem::replace(&mut pull.posted, Posted::No) {
            Posted::Failed => {
                self.ask(transfer);
                self.copy_what_is_ready(transfer);
            }
            _ => self.finish(transfer),
        }
    }

    /// Has copied what the notices so far allow and was not.
    pub(super) fn copy_what_is_ready(&mut self, transfer: u64) {
        let limits = self.limits;
        let Some(pull) = self.pulls.get_mut(&transfer) else {
            return;
        };
        let progress = pull.progress;
        let scale = Scale::of(&limits, self.units.get(&pull.connection), pull);
        let named = scale.named_position(pull.sources.len());
        let position = |blocks: u32| scale.position(blocks).min(named);
        let (done, wave) = (position(progress.done_blocks), position(progress.wave_blocks));
        let mut spans: Vec<(Range<u32>, Range<usize>)> = Vec::new();
        if done > pull.copied_blocks {
            // Those of the wave have their first layers already.
            let in_wave = done.min(pull.wave_blocks).max(pull.copied_blocks);
            if in_wave > pull.copied_blocks {
                spans.push((pull.wave_layers..limits.layers, pull.copied_blocks..in_wave));
            }
            if done > in_wave {
                spans.push((0..limits.layers, in_wave..done));
            }
            pull.copied_blocks = done;
            if pull.wave_blocks <= done {
                (pull.wave_blocks, pull.wave_layers) = (done, 0);
            }
        }
        if wave > pull.copied_blocks && progress.wave_layers > 0 {
            // What a narrower wave leaves out is copied whole once it is done.
            pull.wave_blocks = pull.wave_blocks.min(wave);
            let old_wave = pull.wave_blocks.max(pull.copied_blocks);
            let whole = progress.wave_layers;
            if old_wave > pull.copied_blocks && whole > pull.wave_layers {
                spans.push((pull.wave_layers..whole, pull.copied_blocks..old_wave));
            }
            // A wave only grows in one dimension at a time as long as its layers are equal for all of its blocks.
            if wave > old_wave && (old_wave == pull.copied_blocks || whole >= pull.wave_layers) {
                spans.push((0..whole, old_wave..wave));
                pull.wave_blocks = wave;
            }
            pull.wave_layers = pull.wave_layers.max(whole);
        }
        let (slot, epoch) = pull.lease.unwrap_or_default();
        let parts = spans
            .into_iter()
            .flat_map(|(layers, positions)| parts(&limits, &scale, layers, positions));
        for (layers, positions) in parts {
            pull.running += 1;
            self.actions.push_back(PullerAction::Copy {
                transfer,
                connection: pull.connection,
                slot,
                epoch,
                span: scale.span(layers, positions, &pull.sources, &pull.targets),
                deadline: pull.deadline,
            });
        }
        // The last notice may only say that what is there already was the rest.
        self.check_if_complete(transfer);
    }
}

/// A span in parts of about as many layers each, none of them empty.
fn parts(
    limits: &PullerLimits,
    scale: &Scale,
    layers: Range<u32>,
    positions: Range<usize>,
) -> impl Iterator<Item = (Range<u32>, Range<usize>)> + use<> {
    let layer_count = layers.len();
    let pieces = layer_count * positions.len();
    let count = (pieces / scale.part_pieces_min(limits))
        .min(limits.parts as usize)
        .clamp(usize::from(pieces > 0), layer_count);
    let start = move |part: usize| layers.start + (layer_count * part / count) as u32;
    (0..count).map(move |part| (start(part)..start(part + 1), positions.clone()))
}
