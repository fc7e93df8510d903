//! Where the bytes of a KV block lie, from the tensors' strides alone.
//!
//! vLLM has changed the shape of its KV tensors four times between 0.15 and 0.33, and the same shape comes with
//! different orders in memory. So nothing here looks at what a dimension means. One dimension counts blocks; the elements
//! of a block are everything that the other dimensions reach; in ascending order of address they are the block's
//! payload, and its contiguous stretches are the runs.

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::memory::Device;

/// One registered KV cache tensor, as the inference engine describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorView {
    /// The layer's name.
    pub name: String,
    /// Address of the first element.
    pub address: u64,
    /// Where the memory is.
    pub device: Device,
    /// Bytes of one element.
    pub element_bytes: u32,
    /// Logical shape, in elements.
    pub shape: Vec<u64>,
    /// Step of each dimension, in elements.
    pub strides: Vec<i64>,
}

/// A contiguous byte range of a block inside a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// Distance from the block's first byte.
    pub offset_bytes: usize,
    /// Length, never zero.
    pub len_bytes: usize,
}

/// One tensor: block `b` is the bytes at `address + b * block_stride_bytes + offset_bytes` of every run.
///
/// For every block below `block_count`, all runs lie inside `address .. address + extent_bytes`, and no two blocks
/// share a byte.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Region {
    /// The layer's name, and those of layers that share its tensor, in natural order.
    pub names: Vec<String>,
    /// Address of the first element.
    pub address: u64,
    /// Where the memory is.
    pub device: Device,
    /// Distance between neighbouring blocks. May be smaller than a block's reach (K and V far apart) or larger than a
    /// block (layers packed between them).
    pub block_stride_bytes: usize,
    /// The byte ranges of a block: ascending, not touching.
    pub runs: Vec<Run>,
    /// How the elements of a block are counted, outermost first: what the runs are made of.
    pub digits: Vec<Digit>,
    /// The dimension of the tensor that counts blocks.
    pub block_dim: usize,
    /// Bytes of one element.
    pub element_bytes: usize,
    /// Number of blocks.
    pub block_count: u32,
    /// Bytes from the first element to the end of the last one.
    pub extent_bytes: usize,
}

/// One digit of an element's position in a block: a dimension of the tensor, or a part of the one that counts blocks. Those
/// of size one are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digit {
    /// The dimension of the tensor. None: it counts the kernel's blocks inside a block of the block manager.
    pub dim: Option<usize>,
    /// How many there are, at least two.
    pub size: usize,
    /// Distance between neighbours.
    pub stride_bytes: usize,
}

impl Region {
    /// Payload bytes of one block.
    pub fn layer_bytes(&self) -> usize {
        self.runs.iter().map(|run| run.len_bytes).sum()
    }

    /// Distance of block `block` from `address`; the block must be below `block_count`.
    pub fn block_offset_bytes(&self, block: u32) -> usize {
        assert!(block < self.block_count, "block {block} of {}", self.block_count);
        block as usize * self.block_stride_bytes
    }
}

/// The regions of one worker's KV cache, in the natural order of their layers' names (layer 10 behind layer 9).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMap {
    regions: Vec<Region>,
    index: HashMap<String, usize>,
    block_count: u32,
    block_bytes: usize,
    fingerprint: [u8; 32],
}

/// A block that falls into more pieces than this is refused: the real layouts have at most some hundred, and every
/// piece costs a copy.
pub const MAX_RUNS: usize = 1 << 16;

/// Torch itself stops at 64; KV tensors have three to six.
const MAX_DIMS: usize = 16;

const FINGERPRINT_CONTEXT: &str = "kvlane 2026-11 payload order";

/// Label of the digit that counts kernel blocks inside a block; real dimensions have small numbers.
const SPLIT: u32 = u32::MAX;

/// A digit while the map is made.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// In elements.
    stride: u64,
    size: u64,
    /// For the fingerprint.
    label: u32,
    dim: Option<usize>,
}

impl BlockMap {
    /// Derives the map. `block_count` is the number of blocks that the engine's block manager counts; a tensor may have
    /// a multiple of it where the kernel uses smaller blocks.
    ///
    /// Tensors may come in any order. Several names for one tensor (the same address, shape and strides) are one region.
    /// `block_dim_hint` is asked only where a tensor of shape `(2, n, ..)` could count its blocks in either of the first
    /// two dimensions, which needs two or fewer blocks; without a hint such a tensor is refused.
    pub fn from_tensors(
        views: impl IntoIterator<Item = TensorView>,
        block_count: u32,
        block_dim_hint: Option<usize>,
    ) -> Result<Self> {
        if block_count == 0 {
            return Err(invalid("block_count", 0, "at least 1"));
        }
        let mut views: Vec<TensorView> = views.into_iter().collect();
        views.sort_by(|a, b| natural_order(&a.name, &b.name));
        if views.is_empty() {
            return Err(invalid("views", "no tensor", "at least one tensor"));
        }

        let mut regions: Vec<Region> = Vec::new();
        let mut distinct: Vec<&TensorView> = Vec::new();
        let mut index = HashMap::new();
        let mut order = blake3::Hasher::new_derive_key(FINGERPRINT_CONTEXT);
        for view in &views {
            // Comparing with every region costs nothing at the number of layers that models have.
            let shared = distinct.iter().position(|other| same_tensor(view, other));
            let place = match shared {
                Some(place) => place,
                None => {
                    if distinct
                        .iter()
                        .any(|other| other.address == view.address && other.device == view.device)
                    {
                        return Err(refuse(view, "another layer has its address but a different form"));
                    }
                    let (region, digits) = derive(view, block_count, block_dim_hint)?;
                    // Every field has a fixed size or a length in front of it.
                    order.update(&view.element_bytes.to_le_bytes());
                    order.update(&(digits.len() as u64).to_le_bytes());
                    for digit in &digits {
                        order.update(&digit.label.to_le_bytes());
                        order.update(&digit.size.to_le_bytes());
                    }
                    regions.push(region);
                    distinct.push(view);
                    regions.len() - 1
                }
            };
            if index.insert(view.name.clone(), place).is_some() {
                return Err(invalid(
                    "views",
                    format!("two tensors named '{}'", view.name),
                    "one tensor per name",
                ));
            }
            regions[place].names.push(view.name.clone());
        }

        let block_bytes = regions
            .iter()
            .try_fold(0usize, |sum, region| sum.checked_add(region.layer_bytes()))
            .ok_or_else(|| invalid("views", "a block of more than 2^64 bytes", "less"))?;
        Ok(Self {
            regions,
            index,
            block_count,
            block_bytes,
            fingerprint: *order.finalize().as_bytes(),
        })
    }

    /// The regions; their order is the order of layers in a block's payload.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Number of regions, which is the number of layers with a KV cache of their own.
    pub fn layer_count(&self) -> usize {
        self.regions.len()
    }

    /// Number of blocks in the cache.
    pub fn block_count(&self) -> u32 {
        self.block_count
    }

    /// Payload bytes of one block in one region. Panics if there is no such region.
    pub fn layer_bytes(&self, region: usize) -> usize {
        self.regions[region].layer_bytes()
    }

    /// Payload bytes of one block over all regions.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// The region of a layer, under any of its names.
    pub fn layer_index(&self, name: &str) -> Option<usize> {
        self.index.get(name).copied()
    }

    /// The first name of every region, in order.
    pub fn layer_names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.regions.iter().map(|region| region.names[0].as_str())
    }

    /// A hash of how a block's payload is ordered: equal fingerprints mean that a payload of one cache may be written
    /// into the other.
    ///
    /// It covers, layer by layer, the element size and the tensor's dimensions in their order in memory, the one that
    /// counts blocks and those of size one left out. It does not cover addresses, the number of blocks, the distance
    /// between blocks or names. So K and V in front of the blocks `(2, blocks, ..)` and behind them `(blocks, 2, ..)`
    /// agree, while NHD and HND do not. What a dimension means cannot be read from a tensor: `(2, n, 16, 16, 64)` is
    /// tokens before heads for one attention backend and heads before tokens for another, so the namespace must name
    /// the attention backend as well. Two orders that differ only in how a kernel splits blocks count as different even
    /// where the bytes would agree; that costs a miss, never a wrong byte.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }
}

/// Returns the region of a tensor, without names, and the digits of a block's payload, outermost first.
fn derive(view: &TensorView, block_count: u32, hint: Option<usize>) -> Result<(Region, Vec<Place>)> {
    check_form(view)?;
    let blocks = u64::from(block_count);
    let block_dim = block_dim(view, blocks, hint)?;
    let split = view.shape[block_dim] / blocks;
    // Signs were checked; a dimension of size one has no step that matters.
    let stride = |dim: usize| view.strides[dim].unsigned_abs();

    let mut digits: Vec<Place> = (0..view.shape.len())
        .filter(|&dim| dim != block_dim && view.shape[dim] > 1)
        .enumerate()
        .map(|(label, dim)| Place {
            stride: stride(dim),
            size: view.shape[dim],
            label: label as u32,
            dim: Some(dim),
        })
        .collect();
    if split > 1 {
        digits.push(Place {
            stride: stride(block_dim),
            size: split,
            label: SPLIT,
            dim: None,
        });
    }

    let extent_bytes = check_extent(view)?;
    // From here on no product or sum can overflow: each is the position of an element, and the last one fits.
    check_overlap(view, block_dim)?;

    let element_bytes = view.element_bytes as usize;
    digits.sort_by_key(|digit| digit.stride);
    let runs = runs(&digits, element_bytes).ok_or_else(|| {
        refuse(
            view,
            format!("a block falls into more than {MAX_RUNS} pieces; its innermost dimensions have gaps"),
        )
    })?;
    digits.reverse();

    let block_stride_bytes = if blocks > 1 {
        (stride(block_dim) * split) as usize * element_bytes
    } else {
        extent_bytes
    };
    let last = (block_count as usize - 1) * block_stride_bytes;
    let reach = runs.last().map_or(0, |run| run.offset_bytes + run.len_bytes);
    if last + reach != extent_bytes {
        // Cannot happen; but memory is written by these numbers, so they are not trusted.
        return Err(refuse(
            view,
            format!("its last block ends at {} of {extent_bytes} bytes", last + reach),
        ));
    }

    let region = Region {
        names: Vec::new(),
        address: view.address,
        device: view.device,
        block_stride_bytes,
        runs,
        digits: digits
            .iter()
            .map(|place| Digit {
                dim: place.dim,
                size: place.size as usize,
                stride_bytes: place.stride as usize * element_bytes,
            })
            .collect(),
        block_dim,
        element_bytes,
        block_count,
        extent_bytes,
    };
    Ok((region, digits))
}

/// The dimension that counts blocks.
fn block_dim(view: &TensorView, blocks: u64, hint: Option<usize>) -> Result<usize> {
    let counts = |dim: usize| {
        view.shape
            .get(dim)
            .is_some_and(|size| size.is_multiple_of(blocks))
    };
    // Up to vLLM 0.22 (ROCm: 0.28) K and V are the outer dimension of a five-dimensional tensor.
    let outer_kv = view.shape.len() == 5 && view.shape[0] == 2 && counts(1);
    match (counts(0), outer_kv) {
        (true, false) => Ok(0),
        (false, true) => Ok(1),
        (true, true) => match hint {
            Some(dim @ (0 | 1)) => Ok(dim),
            Some(dim) => Err(invalid("block_dim", dim, "0 or 1")),
            None => Err(refuse(
                view,
                format!("with {blocks} blocks, dimension 0 or 1 may count them; give the block dimension"),
            )),
        },
        (false, false) => Err(refuse(
            view,
            format!("no dimension is a multiple of the {blocks} blocks"),
        )),
    }
}

fn check_form(view: &TensorView) -> Result<()> {
    let dims = view.shape.len();
    if dims == 0 || dims > MAX_DIMS || dims != view.strides.len() {
        let strides = view.strides.len();
        return Err(refuse(
            view,
            format!("{dims} dimensions with {strides} strides; allowed: 1 to {MAX_DIMS} of each"),
        ));
    }
    if view.element_bytes == 0 {
        return Err(refuse(view, "its elements have no bytes"));
    }
    if view.address == 0 {
        return Err(refuse(view, "its address is null"));
    }
    if view.shape.contains(&0) {
        return Err(refuse(view, "it has no elements"));
    }
    if view.strides.iter().any(|&stride| stride < 0) {
        return Err(refuse(view, "a stride is negative"));
    }
    if view
        .shape
        .iter()
        .zip(&view.strides)
        .any(|(&size, &stride)| size > 1 && stride == 0)
    {
        return Err(refuse(view, "a stride is zero, so elements share their bytes"));
    }
    Ok(())
}

/// Bytes from the first element to the end of the last. They fit the address space, with sign.
fn check_extent(view: &TensorView) -> Result<usize> {
    let overflow = || refuse(view, "its last element lies beyond the address space");
    let last = view
        .shape
        .iter()
        .zip(&view.strides)
        .filter(|&(&size, _)| size > 1)
        .try_fold(0u64, |sum, (&size, stride)| {
            (size - 1)
                .checked_mul(stride.unsigned_abs())
                .and_then(|step| sum.checked_add(step))
        })
        .ok_or_else(overflow)?;
    let extent = last
        .checked_add(1)
        .and_then(|elements| elements.checked_mul(u64::from(view.element_bytes)))
        .filter(|&bytes| bytes <= i64::MAX as u64 && view.address.checked_add(bytes).is_some())
        .ok_or_else(overflow)?;
    usize::try_from(extent).map_err(|_| overflow())
}

/// Each step must clear everything that the smaller steps reach: then two elements never share a byte, and ascending
/// addresses count the dimensions like digits of a number.
fn check_overlap(view: &TensorView, block_dim: usize) -> Result<()> {
    let mut steps: Vec<(u64, u64)> = view
        .strides
        .iter()
        .zip(&view.shape)
        .filter(|&(_, &size)| size > 1)
        .map(|(stride, &size)| (stride.unsigned_abs(), size))
        .collect();
    steps.sort_unstable();
    let mut reach = 1;
    for (stride, size) in steps {
        if stride < reach {
            return Err(refuse(
                view,
                format!(
                    "elements overlap: a stride of {stride} is inside {reach} elements (dimension {block_dim} counts blocks)"
                ),
            ));
        }
        reach += (size - 1) * stride;
    }
    Ok(())
}

/// The runs of a block whose digits are sorted by stride; `None` if there are more than [`MAX_RUNS`].
fn runs(digits: &[Place], element_bytes: usize) -> Option<Vec<Run>> {
    let mut run = 1u64;
    let mut inner = 0;
    while inner < digits.len() && digits[inner].stride == run {
        run *= digits[inner].size;
        inner += 1;
    }
    let outer = &digits[inner..];
    let count = outer
        .iter()
        .try_fold(1u64, |count, digit| count.checked_mul(digit.size))?;
    if count > MAX_RUNS as u64 {
        return None;
    }
    let mut starts = vec![0u64];
    for digit in outer {
        starts = (0..digit.size)
            .flat_map(|k| starts.iter().map(move |start| start + k * digit.stride))
            .collect();
    }
    let len_bytes = run as usize * element_bytes;
    let mut runs: Vec<Run> = Vec::with_capacity(starts.len());
    for start in starts {
        let offset_bytes = start as usize * element_bytes;
        match runs.last_mut() {
            // Behind a gap, the next larger step may begin exactly where the last piece ended.
            Some(last) if last.offset_bytes + last.len_bytes == offset_bytes => last.len_bytes += len_bytes,
            _ => runs.push(Run {
                offset_bytes,
                len_bytes,
            }),
        }
    }
    Some(runs)
}

fn same_tensor(a: &TensorView, b: &TensorView) -> bool {
    a.address == b.address
        && a.device == b.device
        && a.element_bytes == b.element_bytes
        && a.shape == b.shape
        && a.strides == b.strides
}

/// Compares names so that numbers in them count as numbers.
fn natural_order(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (a.as_bytes(), b.as_bytes());
    while let (Some(&l), Some(&r)) = (left.first(), right.first()) {
        let order = if l.is_ascii_digit() && r.is_ascii_digit() {
            let (x, y) = (take_number(&mut left), take_number(&mut right));
            x.len().cmp(&y.len()).then_with(|| x.cmp(y))
        } else {
            left = &left[1..];
            right = &right[1..];
            l.cmp(&r)
        };
        if order.is_ne() {
            return order;
        }
    }
    // Equal up to leading zeros, or one is the start of the other.
    left.len().cmp(&right.len()).then_with(|| a.cmp(b))
}

/// Takes the digits at the start of `text`, leading zeros dropped.
fn take_number<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let end = text
        .iter()
        .position(|byte| !byte.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    *text = rest;
    let zeros = digits.iter().take_while(|&&digit| digit == b'0').count();
    &digits[zeros..]
}

fn refuse(view: &TensorView, reason: impl Into<String>) -> Error {
    Error::UnsupportedLayout {
        tensor: view.name.clone(),
        shape: view.shape.clone(),
        strides: view.strides.clone(),
        reason: reason.into(),
    }
}

fn invalid(argument: &'static str, found: impl ToString, allowed: &str) -> Error {
    Error::InvalidArgument {
        argument,
        found: found.to_string(),
        allowed: allowed.to_owned(),
    }
}

#[cfg(test)]
mod tests;
