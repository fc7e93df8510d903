//! What is in the blocks of a worker: tokens and heads, and in which order. Two workers whose blocks differ find out from it
//! how to meet.
//!
//! Blocks are cut into *units*: as many tokens as fit both sides, of the heads that both have. A unit has the same payload on
//! both sides, in the same order. Unit `u` is the part `u % units_per_block` of block `u / units_per_block`.
//!
//! What a dimension counts cannot be read from a tensor: whoever opens a worker says it ([`Axes`]).

use std::cmp::Reverse;
use std::ops::Range;

use kvlane_core::{BlockMap, Run};
use serde::{Deserialize, Serialize};

/// Which dimensions of a layer's tensor count tokens and heads, the one that counts blocks included in the numbering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axes {
    /// Counts the tokens of a block of the kernel.
    pub tokens: usize,
    /// The kernel mixes the tokens of its block in a way of its own, inside a head: they are moved together or not at all.
    pub are_tokens_packed: bool,
    /// Counts KV heads. None: the layer has none to be shared out, and all ranks have the same bytes.
    pub heads: Option<usize>,
}

/// Most workers that share out the heads of a server; those of known ones have at most 32.
pub const TENSOR_RANKS_MAX: u32 = 64;
/// More dimensions than a tensor may have.
const DIGITS_MAX: usize = 17;

/// What a dimension counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Counts {
    /// The kernel's blocks inside a block.
    KernelBlocks,
    /// Tokens of a block of the kernel.
    Tokens,
    /// The same, where they must stay together.
    PackedTokens,
    /// KV heads of the worker.
    Heads,
    /// Anything else: the dimension's number, without the one that counts blocks.
    Other(u32),
}

/// A dimension of a block's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountedDigit {
    /// What it counts.
    pub counts: Counts,
    /// How many, at least two.
    pub size: u64,
    /// Distance between neighbours.
    pub stride_bytes: u64,
}

/// How a layer's payload is made up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerShape {
    /// Its dimensions, in any order.
    pub digits: Vec<CountedDigit>,
    /// Bytes of an element.
    pub element_bytes: u64,
    /// Whether its heads are shared out over the ranks.
    pub has_heads: bool,
}

/// What is in a worker's blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheShape {
    /// Tokens per block.
    pub block_tokens: u32,
    /// The worker's first KV head of the model's.
    pub first_head: u32,
    /// How many it has.
    pub head_count: u32,
    /// Workers that share out the heads between them.
    pub tensor_ranks: u32,
    /// In the order of the payload.
    pub layers: Vec<LayerShape>,
}

/// Which part of a worker's blocks a lane moves, unit by unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Tokens of a unit.
    pub unit_tokens: u32,
    /// First head, counted from the worker's first one.
    pub first_head: u32,
    /// How many.
    pub head_count: u32,
}

impl CacheShape {
    /// The shape of a cache whose layers have `axes`, in the order of the map's regions. An error is a sentence that says
    /// which number does not fit.
    pub fn of(
        map: &BlockMap,
        block_tokens: u32,
        heads: Range<u32>,
        tensor_ranks: u32,
        axes: &[Axes],
    ) -> Result<Self, String> {
        if axes.len() != map.layer_count() {
            return Err(format!("axes of {} layers, of {}", axes.len(), map.layer_count()));
        }
        let layer = |(region, axes): (&kvlane_core::Region, &Axes)| {
            let block_dim = region.block_dim;
            let digit = |digit: &kvlane_core::Digit| CountedDigit {
                counts: match digit.dim {
                    None => Counts::KernelBlocks,
                    Some(dim) if dim == axes.tokens && axes.are_tokens_packed => Counts::PackedTokens,
                    Some(dim) if dim == axes.tokens => Counts::Tokens,
                    Some(dim) if Some(dim) == axes.heads => Counts::Heads,
                    Some(dim) => Counts::Other((dim - usize::from(dim > block_dim)) as u32),
                },
                size: digit.size as u64,
                stride_bytes: digit.stride_bytes as u64,
            };
            LayerShape {
                digits: region.digits.iter().map(digit).collect(),
                element_bytes: region.element_bytes as u64,
                has_heads: axes.heads.is_some(),
            }
        };
        let shape = Self {
            block_tokens,
            first_head: heads.start,
            head_count: heads.end.saturating_sub(heads.start),
            tensor_ranks,
            layers: map.regions().iter().zip(axes).map(layer).collect(),
        };
        let runs = map.regions().iter().map(|region| region.runs.as_slice());
        shape.check(runs)?;
        Ok(shape)
    }

    /// Whether it can be the shape of a cache with these runs, layer by layer. It may come from a peer.
    pub fn check<'a>(&self, runs: impl ExactSizeIterator<Item = &'a [Run]>) -> Result<(), String> {
        if runs.len() != self.layers.len() {
            return Err(format!("{} layers, of {}", self.layers.len(), runs.len()));
        }
        if self.block_tokens == 0
            || self.head_count == 0
            || !(1..=TENSOR_RANKS_MAX).contains(&self.tensor_ranks)
        {
            return Err("no tokens, heads or ranks, or too many ranks".to_owned());
        }
        for (number, (layer, runs)) in self.layers.iter().zip(runs).enumerate() {
            let refused = |what: String| Err(format!("layer {number}: {what}"));
            let product = layer
                .digits
                .iter()
                .try_fold(layer.element_bytes, |product, digit| {
                    product.checked_mul(digit.size)
                });
            let bytes: usize = runs.iter().map(|run| run.len_bytes).sum();
            // None of them is zero then, so no product of some of them is larger.
            if bytes == 0 || product != Some(bytes as u64) {
                return refused(format!("dimensions of another size than its {bytes} bytes"));
            }
            let mut seen: Vec<Counts> = layer.digits.iter().map(|digit| digit.counts).collect();
            seen.sort_unstable();
            seen.dedup();
            if seen.len() != layer.digits.len() || seen.len() > DIGITS_MAX {
                return refused("two dimensions that count the same, or too many".to_owned());
            }
            if layer.digit(Counts::Tokens).is_some() && layer.digit(Counts::PackedTokens).is_some() {
                return refused("tokens that are packed together, and tokens that are not".to_owned());
            }
            let tokens = layer.size(Counts::KernelBlocks) * layer.kernel_tokens();
            if tokens != u64::from(self.block_tokens) {
                return refused(format!("{tokens} tokens in a block of {}", self.block_tokens));
            }
            let heads = layer.size(Counts::Heads);
            if heads != u64::from(self.layer_heads(layer)) {
                return refused(format!("{heads} heads, of {}", self.head_count));
            }
        }
        Ok(())
    }

    fn layer_heads(&self, layer: &LayerShape) -> u32 {
        if layer.has_heads { self.head_count } else { 1 }
    }

    /// Its heads, of the model's.
    pub fn heads(&self) -> Range<u32> {
        self.first_head..self.first_head.saturating_add(self.head_count)
    }
}

impl LayerShape {
    fn digit(&self, counts: Counts) -> Option<&CountedDigit> {
        self.digits.iter().find(|digit| digit.counts == counts)
    }

    /// One where there is no such dimension.
    pub(crate) fn size(&self, counts: Counts) -> u64 {
        self.digit(counts).map_or(1, |digit| digit.size)
    }

    /// Tokens of a block of the kernel.
    pub(crate) fn kernel_tokens(&self) -> u64 {
        self.size(Counts::Tokens) * self.size(Counts::PackedTokens)
    }

    pub(crate) fn stride_bytes(&self, counts: Counts) -> u64 {
        self.digit(counts).map_or(0, |digit| digit.stride_bytes)
    }

    /// The dimensions of a unit, outermost first.
    pub(crate) fn unit_digits(&self, slice: Slice) -> Vec<CountedDigit> {
        let head_count = if self.has_heads { slice.head_count } else { 1 };
        let mut digits: Vec<CountedDigit> = self
            .digits
            .iter()
            .filter_map(|digit| {
                let size = match digit.counts {
                    Counts::KernelBlocks => 1,
                    Counts::Tokens => u64::from(slice.unit_tokens),
                    Counts::Heads => u64::from(head_count),
                    Counts::PackedTokens | Counts::Other(_) => digit.size,
                };
                (size > 1).then_some(CountedDigit { size, ..*digit })
            })
            .collect();
        digits.sort_by_key(|digit| Reverse(digit.stride_bytes));
        digits
    }
}

/// How `ours` and `theirs` are cut so that units of both have equal payloads. An error is a sentence that says why they cannot.
pub fn agree(ours: &CacheShape, theirs: &CacheShape) -> Result<(Slice, Slice), String> {
    if ours.layers.len() != theirs.layers.len() {
        return Err(format!(
            "it has {} layers and this server {}",
            theirs.layers.len(),
            ours.layers.len()
        ));
    }
    let has_heads = ours.layers.iter().any(|layer| layer.has_heads);
    let (our_heads, their_heads) = (ours.heads(), theirs.heads());
    let heads = our_heads.start.max(their_heads.start)..our_heads.end.min(their_heads.end);
    if has_heads && heads.is_empty() {
        return Err(format!(
            "its KV heads are {their_heads:?} and ours {our_heads:?}: it is not the worker that has ours"
        ));
    }
    let layers = ours.layers.iter().chain(&theirs.layers);
    let unit_tokens = layers
        .map(LayerShape::kernel_tokens)
        .fold(0, greatest_common_divisor);
    for (our, their) in ours.layers.iter().zip(&theirs.layers) {
        let is_packed = |layer: &LayerShape| layer.digit(Counts::PackedTokens).is_some();
        let sizes = [our.kernel_tokens(), their.kernel_tokens()];
        if (is_packed(our) || is_packed(their)) && sizes.iter().any(|&tokens| tokens != unit_tokens) {
            return Err(format!(
                "its attention kernel has blocks of {} tokens and ours of {}, and this kernel packs the tokens of a block \
                 together: the block sizes must be equal",
                sizes[1], sizes[0]
            ));
        }
    }
    let slice = |own: &Range<u32>| Slice {
        unit_tokens: u32::try_from(unit_tokens).unwrap_or(1),
        first_head: if has_heads { heads.start - own.start } else { 0 },
        head_count: if has_heads { heads.len() as u32 } else { 1 },
    };
    let (our_slice, their_slice) = (slice(&our_heads), slice(&their_heads));
    let order = |layer: &LayerShape, slice: Slice| -> Vec<(Counts, u64)> {
        let digits = layer.unit_digits(slice);
        digits.iter().map(|digit| (digit.counts, digit.size)).collect()
    };
    for (number, (our, their)) in ours.layers.iter().zip(&theirs.layers).enumerate() {
        let (our_order, their_order) = (order(our, our_slice), order(their, their_slice));
        if our_order != their_order || our.element_bytes != their.element_bytes {
            return Err(format!(
                "the bytes of layer {number} are in another order: its {}, ours {} (VLLM_KV_CACHE_LAYOUT must be the same on \
                 both sides)",
                told(&their_order, their.element_bytes),
                told(&our_order, our.element_bytes),
            ));
        }
    }
    Ok((our_slice, their_slice))
}

fn told(order: &[(Counts, u64)], element_bytes: u64) -> String {
    let digits = order.iter().map(|(counts, size)| match counts {
        Counts::KernelBlocks => format!("{size} kernel blocks"),
        Counts::Tokens | Counts::PackedTokens => format!("{size} tokens"),
        Counts::Heads => format!("{size} heads"),
        Counts::Other(_) => size.to_string(),
    });
    let digits: Vec<String> = digits.collect();
    format!("[{}] of {element_bytes} bytes", digits.join(", "))
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 {
        a
    } else {
        greatest_common_divisor(b, a % b)
    }
}

#[cfg(test)]
mod tests;
