//! Positions of a pull, counted in units: what holder and reader have in common where their blocks differ in size.

use std::ops::Range;

use super::{Pull, PullerLimits, Span};

/// How the blocks of a holder meet those of this side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Units {
    /// Tokens of a unit. The blocks of both sides are whole numbers of units.
    pub unit_tokens: u32,
    /// Tokens of a block of the holder.
    pub holder_block_tokens: u32,
}

/// Where the units of one pull are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scale {
    /// Units of a block of this side, and of the holder.
    own: u64,
    holder: u64,
    /// First unit, counted from the prompt's first one.
    first_unit: u64,
    /// How many units.
    pub(super) count: usize,
    /// The holder's blocks that they lie in: the first, counted from the prompt's first one, and how many.
    holder_first_block: u64,
    pub(super) holder_blocks: usize,
}

impl Scale {
    /// Without `units`, blocks are alike.
    pub(super) fn of(limits: &PullerLimits, units: Option<&Units>, pull: &Pull) -> Self {
        let own_tokens = u64::from(limits.block_tokens.max(1));
        let (unit_tokens, holder_tokens) = units.map_or((own_tokens, own_tokens), |units| {
            (
                u64::from(units.unit_tokens.max(1)),
                u64::from(units.holder_block_tokens),
            )
        });
        let (own, holder) = (own_tokens / unit_tokens, (holder_tokens / unit_tokens).max(1));
        let first_block = u64::from(pull.first_block);
        let first_unit = first_block * own;
        let end_unit = (first_block + pull.targets.len() as u64) * own;
        // A last block that is partly filled may have units that no token of the prompt is in. The holder need not have them.
        let end_unit = end_unit.min(u64::from(pull.prompt.tokens).div_ceil(unit_tokens));
        let own_blocks = first_block..first_block + pull.targets.len() as u64;
        let holder_tokens = (unit_tokens * holder) as u32;
        let holder_blocks =
            pull.prompt
                .blocks_of_other_size(own_blocks, limits.block_tokens.max(1), holder_tokens);
        Self {
            own,
            holder,
            first_unit,
            count: end_unit.saturating_sub(first_unit) as usize,
            holder_first_block: holder_blocks.start,
            holder_blocks: holder_blocks.end.saturating_sub(holder_blocks.start) as usize,
        }
    }

    /// The position behind the last unit that lies in the first `blocks` blocks of the prompt, as the holder counts them.
    pub(super) fn position(&self, blocks: u32) -> usize {
        let units = (u64::from(blocks) * self.holder).saturating_sub(self.first_unit);
        (units as usize).min(self.count)
    }

    /// The same for the first `named` blocks of those that the holder names to the pull.
    pub(super) fn named_position(&self, named: usize) -> usize {
        let units = ((self.holder_first_block + named as u64) * self.holder).saturating_sub(self.first_unit);
        (units as usize).min(self.count)
    }

    /// The block of the prompt behind the last one that the pull needs, as the holder counts them.
    pub(super) fn holder_end_block(&self) -> u64 {
        self.holder_first_block + self.holder_blocks as u64
    }

    /// Layers of the units at `positions`, which lie in blocks that the holder has named, and in those of the pull.
    pub(super) fn span(
        &self,
        layers: Range<u32>,
        positions: Range<usize>,
        sources: &[u32],
        targets: &[u32],
    ) -> Span {
        Span {
            layers,
            remote: positions
                .clone()
                .map(|position| self.holder_unit(sources, position))
                .collect(),
            local: positions
                .map(|position| self.own_unit(targets, position))
                .collect(),
        }
    }

    /// Fewest pieces, each of one unit in one layer, of a part of a span.
    pub(super) fn part_pieces_min(&self, limits: &PullerLimits) -> usize {
        limits.part_pieces_min.max(1) as usize * self.own as usize
    }

    /// The unit of this side at a position. The blocks are those of the pull.
    fn own_unit(&self, targets: &[u32], position: usize) -> u32 {
        let (block, unit) = (position as u64 / self.own, position as u64 % self.own);
        join(targets[block as usize], self.own, unit)
    }

    /// The unit of the holder at a position. The blocks are those that the holder named.
    fn holder_unit(&self, sources: &[u32], position: usize) -> u32 {
        let unit = self.first_unit + position as u64;
        let block = unit / self.holder - self.holder_first_block;
        join(sources[block as usize], self.holder, unit % self.holder)
    }
}

/// A number beyond all units if it does not fit: lanes refuse that.
fn join(block: u32, units_per_block: u64, unit: u64) -> u32 {
    u32::try_from(u64::from(block) * units_per_block + unit).unwrap_or(u32::MAX)
}
