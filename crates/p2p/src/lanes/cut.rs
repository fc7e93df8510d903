//! A cache whose blocks are cut into units, for a peer whose blocks have another size, or which has other heads.
//!
//! From there on units are to a lane what blocks are where both sides are alike; see [`shape`](crate::shape).

use kvlane_core::Run;

use super::LaneError;
use super::remote::MAX_RUNS;
use crate::shape::{CacheShape, CountedDigit, Counts, LayerShape, Slice};

/// Most pieces of a block over all units and layers: as many as runs of a block that is not cut, times the units of large
/// blocks.
const MAX_PLACES: u64 = 1 << 20;

/// A worker's blocks, cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    pub(super) slice: Option<Slice>,
    pub(super) units_per_block: u32,
    pub(super) layers: Vec<LayerCut>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LayerCut {
    /// Of a block's first unit, from the block's start.
    pub(super) runs: Vec<Run>,
    /// Where each unit of a block starts, from its first one.
    pub(super) offsets: Vec<usize>,
    /// For each unit and run: the run of the block that it lies in, and where in it.
    pub(super) places: Vec<Vec<(usize, usize)>>,
}

impl Cut {
    /// Units that are blocks.
    pub fn whole<'a>(runs: impl Iterator<Item = &'a [Run]>) -> Self {
        let layer = |runs: &[Run]| LayerCut {
            runs: runs.to_vec(),
            offsets: vec![0],
            places: vec![(0..runs.len()).map(|run| (run, 0)).collect()],
        };
        Self {
            slice: None,
            units_per_block: 1,
            layers: runs.map(layer).collect(),
        }
    }

    /// Cuts blocks with these runs, whose shape was [checked](CacheShape::check).
    pub fn new<'a>(
        shape: &CacheShape,
        runs: impl Iterator<Item = &'a [Run]>,
        slice: Slice,
    ) -> Result<Self, LaneError> {
        if slice.unit_tokens == 0 || slice.head_count == 0 {
            return Err(LaneError::Request("a unit without tokens or heads".to_owned()));
        }
        let mut layers = Vec::with_capacity(shape.layers.len());
        // A peer says what its blocks hold, so the lists that are made of it have a bound together.
        let mut places_left = MAX_PLACES;
        for (number, (layer, runs)) in shape.layers.iter().zip(runs).enumerate() {
            let cut = cut_layer(layer, runs, slice, &mut places_left)
                .map_err(|what| LaneError::Request(format!("layer {number}: {what}")))?;
            layers.push(cut);
        }
        // At least one layer, and the same number for all: the tokens of a block are.
        let units_per_block = shape.block_tokens / slice.unit_tokens;
        if layers
            .iter()
            .any(|layer| layer.offsets.len() != units_per_block as usize)
        {
            return Err(LaneError::Request(format!(
                "units of {} tokens, in blocks of {}",
                slice.unit_tokens, shape.block_tokens
            )));
        }
        Ok(Self {
            slice: Some(slice),
            units_per_block,
            layers,
        })
    }
}

fn cut_layer(
    layer: &LayerShape,
    block_runs: &[Run],
    slice: Slice,
    places_left: &mut u64,
) -> Result<LayerCut, String> {
    let tokens = layer.kernel_tokens();
    let unit = u64::from(slice.unit_tokens);
    if !tokens.is_multiple_of(unit) {
        return Err(format!("units of {unit} tokens, in {tokens}"));
    }
    if unit != tokens && layer.size(Counts::PackedTokens) > 1 {
        return Err(format!(
            "units of {unit} tokens, of {tokens} that are packed together"
        ));
    }
    let heads = layer.size(Counts::Heads);
    let (first_head, head_count) = if layer.has_heads {
        (u64::from(slice.first_head), u64::from(slice.head_count))
    } else {
        (0, 1)
    };
    if first_head + head_count > heads {
        return Err(format!(
            "heads {first_head} to {}, of {heads}",
            first_head + head_count
        ));
    }
    // No product here is larger than a block, whose dimensions were found to have its size; what a stride says is looked up in
    // the block's runs.
    let size =
        |bytes: u64| usize::try_from(bytes).map_err(|_| "a distance beyond the address space".to_owned());
    let far = || "a distance beyond the address space".to_owned();
    let start = first_head
        .checked_mul(layer.stride_bytes(Counts::Heads))
        .ok_or_else(far)?;
    let runs = unit_runs(&layer.unit_digits(slice), start, layer.element_bytes)?;
    let parts = tokens / unit;
    // No more than tokens in a block, which has as many bytes at least.
    let units = layer.size(Counts::KernelBlocks) * parts;
    *places_left = units
        .checked_mul(runs.len() as u64)
        .and_then(|places| places_left.checked_sub(places))
        .ok_or_else(|| format!("a block of more than {MAX_PLACES} pieces"))?;
    let mut offsets = Vec::new();
    for unit_number in 0..units {
        let kernel_block = (unit_number / parts).checked_mul(layer.stride_bytes(Counts::KernelBlocks));
        let token = (unit_number % parts * unit).checked_mul(layer.stride_bytes(Counts::Tokens));
        let offset = kernel_block
            .zip(token)
            .and_then(|(block, token)| block.checked_add(token));
        offsets.push(size(offset.ok_or_else(far)?)?);
    }
    let mut places = Vec::with_capacity(offsets.len());
    for &offset in &offsets {
        let placed: Option<Vec<(usize, usize)>> = runs
            .iter()
            .map(|run| place(block_runs, run.offset_bytes.checked_add(offset)?, run.len_bytes))
            .collect();
        places.push(placed.ok_or("a unit that is not inside the block")?);
    }
    Ok(LayerCut {
        runs,
        offsets,
        places,
    })
}

/// The contiguous stretches of a unit that starts at `start`.
fn unit_runs(digits: &[CountedDigit], start: u64, element_bytes: u64) -> Result<Vec<Run>, String> {
    let mut len = element_bytes;
    let mut outer = digits;
    while let Some((last, rest)) = outer.split_last()
        && last.stride_bytes == len
    {
        len *= last.size;
        outer = rest;
    }
    let mut starts = vec![start];
    for digit in outer {
        let count = (starts.len() as u64).checked_mul(digit.size);
        if count.is_none_or(|count| count > MAX_RUNS as u64) {
            return Err(format!("a unit of more than {MAX_RUNS} pieces"));
        }
        let far = || "a distance beyond the address space".to_owned();
        let mut next = Vec::with_capacity(starts.len() * digit.size as usize);
        for start in &starts {
            for number in 0..digit.size {
                let step = number.checked_mul(digit.stride_bytes).ok_or_else(far)?;
                next.push(start.checked_add(step).ok_or_else(far)?);
            }
        }
        starts = next;
    }
    let mut runs: Vec<Run> = Vec::with_capacity(starts.len());
    for start in starts {
        let beyond = |_| "a distance beyond the address space".to_owned();
        let (offset_bytes, len_bytes) = (
            usize::try_from(start).map_err(beyond)?,
            usize::try_from(len).map_err(beyond)?,
        );
        match runs.last_mut() {
            Some(last) if last.offset_bytes.checked_add(last.len_bytes) == Some(offset_bytes) => {
                last.len_bytes += len_bytes;
            }
            _ => runs.push(Run {
                offset_bytes,
                len_bytes,
            }),
        }
    }
    Ok(runs)
}

/// The run that `len` bytes at `offset` lie in, and where in it.
fn place(runs: &[Run], offset: usize, len: usize) -> Option<(usize, usize)> {
    let after = runs.partition_point(|run| run.offset_bytes <= offset);
    let number = after.checked_sub(1)?;
    let run = &runs[number];
    let inside = offset - run.offset_bytes;
    (inside.checked_add(len)? <= run.len_bytes).then_some((number, inside))
}

#[cfg(test)]
mod tests;
