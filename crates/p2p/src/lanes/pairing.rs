//! Which bytes of a peer's block go where in a local one.
//!
//! The two sides agree on the order of a block's payload but may cut it into runs differently (K and V far apart on one
//! side, behind each other on the other). So each layer's payload is cut once at the run boundaries of both; what lies
//! between two cuts is contiguous on both sides.
//!
//! A span is walked layer by layer, and in a layer run by run *of the peer*, all blocks of a run before the next run:
//! then neighbouring blocks join into one range also where K and V are far apart. Both ends of a data connection walk in
//! this order.
//!
//! Caches whose blocks differ are paired unit by unit; see [`Cut`].

use kvlane_core::Run;
use kvlane_cuda::RunPart;
use std::ops::Range;

use super::{Cut, LaneError, LocalCache, RemoteCache, Span};
use crate::shape::Slice;

/// The local cache and a peer's, whose layers were found to have equal payloads.
#[derive(Debug)]
pub struct Pairing {
    local: LocalCache,
    local_cut: Cut,
    remote: RemoteCache,
    remote_cut: Cut,
    layers: Vec<Layer>,
}

/// How the payload of one layer is cut.
#[derive(Debug)]
struct Layer {
    bytes: usize,
    pieces: Vec<Piece>,
    /// The pieces of each run of the peer.
    groups: Vec<Range<usize>>,
}

/// Bytes that are contiguous in a block on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    local_run: usize,
    /// From the start of the local run.
    local_offset: usize,
    /// From the start of the peer's unit.
    remote_offset: usize,
    len: usize,
}

impl Pairing {
    /// Pairs the layers of two caches block by block; refuses unless each has as many payload bytes on both sides.
    pub fn new(local: impl Into<LocalCache>, remote: RemoteCache) -> Result<Self, LaneError> {
        let local = local.into();
        let local_cut = Cut::whole(local.map().regions().iter().map(|region| region.runs.as_slice()));
        let remote_cut = Cut::whole(remote.regions().iter().map(|region| region.runs.as_slice()));
        Self::cut(local, local_cut, remote, remote_cut)
    }

    /// Pairs the layers of two caches unit by unit, as both are cut.
    pub fn cut(
        local: impl Into<LocalCache>,
        local_cut: Cut,
        remote: RemoteCache,
        remote_cut: Cut,
    ) -> Result<Self, LaneError> {
        let local = local.into();
        let (ours, theirs) = (&local_cut.layers, &remote_cut.layers);
        if ours.len() != theirs.len() || ours.len() != local.map().layer_count() {
            return Err(LaneError::Layout(format!(
                "{} layers; this side has {}",
                theirs.len(),
                ours.len()
            )));
        }
        let blocks = [
            (local.map().block_count(), local_cut.units_per_block),
            (remote.block_count(), remote_cut.units_per_block),
        ];
        if let Some((blocks, units)) = blocks
            .into_iter()
            .find(|(blocks, units)| blocks.checked_mul(*units).is_none())
        {
            return Err(LaneError::Layout(format!(
                "{blocks} blocks of {units} units each"
            )));
        }
        let mut layers = Vec::with_capacity(ours.len());
        for (layer, (our, their)) in ours.iter().zip(theirs).enumerate() {
            let bytes = |runs: &[Run]| runs.iter().map(|run| run.len_bytes).sum::<usize>();
            let (our_bytes, their_bytes) = (bytes(&our.runs), bytes(&their.runs));
            if our_bytes != their_bytes {
                return Err(LaneError::Layout(format!(
                    "layer {layer} has {their_bytes} bytes in a block; this side has {our_bytes}"
                )));
            }
            let (pieces, groups) = cut(&our.runs, &their.runs);
            layers.push(Layer {
                bytes: our_bytes,
                pieces,
                groups,
            });
        }
        Ok(Self {
            local,
            local_cut,
            remote,
            remote_cut,
            layers,
        })
    }

    /// How the peer's blocks are cut. None: they are taken whole.
    pub(super) fn remote_slice(&self) -> Option<Slice> {
        self.remote_cut.slice
    }

    /// Number of units of the peer.
    pub fn remote_units(&self) -> u32 {
        // No overflow: `cut` has multiplied them.
        self.remote.block_count() * self.remote_cut.units_per_block
    }

    /// Number of local units.
    pub fn local_units(&self) -> u32 {
        self.local.map().block_count() * self.local_cut.units_per_block
    }

    /// The cache of this process.
    pub fn local(&self) -> &LocalCache {
        &self.local
    }

    /// The cache of the peer.
    pub fn remote(&self) -> &RemoteCache {
        &self.remote
    }

    /// Refuses a span with blocks or layers that one of the two sides does not have.
    pub fn check(&self, span: &Span) -> Result<(), LaneError> {
        if span.remote.len() != span.local.len() {
            return Err(LaneError::Request(format!(
                "{} blocks of the peer for {} local blocks",
                span.remote.len(),
                span.local.len()
            )));
        }
        check_layers(&span.layers, self.layers.len())?;
        check_blocks("the peer's", &span.remote, self.remote_units())?;
        check_blocks("the local", &span.local, self.local_units())
    }

    /// Payload bytes of `blocks` blocks of `layers`.
    pub(crate) fn payload_bytes(&self, layers: &Range<usize>, blocks: usize) -> u64 {
        let block_bytes: u64 = self.layers[layers.clone()]
            .iter()
            .map(|layer| layer.bytes as u64)
            .sum();
        block_bytes * blocks as u64
    }

    /// Walks blocks that [`check`](Self::check) has found on both sides.
    pub(crate) fn walk<'a>(&'a self, layers: &Range<usize>, remote: &'a [u32], local: &'a [u32]) -> Walk<'a> {
        Walk {
            pairing: self,
            end: if local.is_empty() {
                layers.start
            } else {
                layers.end
            },
            remote,
            local,
            layer: layers.start,
            group: 0,
            position: 0,
            piece: 0,
            done: 0,
        }
    }
}

/// Refuses layers beyond the last.
pub(crate) fn check_layers(layers: &Range<usize>, layer_count: usize) -> Result<(), LaneError> {
    if layers.start > layers.end || layers.end > layer_count {
        return Err(LaneError::Request(format!(
            "layers {layers:?}; there are {layer_count}"
        )));
    }
    Ok(())
}

/// Refuses blocks beyond the last.
pub(crate) fn check_blocks(whose: &str, blocks: &[u32], block_count: u32) -> Result<(), LaneError> {
    match blocks.iter().find(|&&block| block >= block_count) {
        Some(block) => Err(LaneError::Request(format!(
            "block {block}; {whose} cache has {block_count}"
        ))),
        None => Ok(()),
    }
}

/// Cuts a payload at the boundaries of both sides' runs, whose lengths add up to the same.
fn cut(local: &[Run], remote: &[Run]) -> (Vec<Piece>, Vec<Range<usize>>) {
    let mut pieces = Vec::with_capacity(local.len().max(remote.len()));
    let mut groups = Vec::with_capacity(remote.len());
    let (mut local_run, mut local_offset) = (0, 0);
    for run in remote {
        let first = pieces.len();
        let mut done = 0;
        while done < run.len_bytes {
            let left = local[local_run].len_bytes - local_offset;
            let len = left.min(run.len_bytes - done);
            pieces.push(Piece {
                local_run,
                local_offset,
                remote_offset: run.offset_bytes + done,
                len,
            });
            done += len;
            local_offset += len;
            if len == left {
                local_run += 1;
                local_offset = 0;
            }
        }
        groups.push(first..pieces.len());
    }
    (pieces, groups)
}

/// The block of a unit, and which unit of it that is.
fn split(unit: u32, units_per_block: u32) -> (u32, usize) {
    if units_per_block == 1 {
        return (unit, 0); // as nearly always, and a division for each part would be seen
    }
    (unit / units_per_block, (unit % units_per_block) as usize)
}

/// Bytes to copy: contiguous on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) layer: usize,
    /// The local block, the run in it and the offset in the run.
    pub(crate) block: u32,
    pub(crate) run: usize,
    pub(crate) offset: usize,
    /// In the peer's process.
    pub(crate) address: u64,
    pub(crate) len: usize,
}

impl Part {
    /// Its place in the local cache.
    pub(crate) fn local(&self) -> RunPart {
        RunPart {
            layer: self.layer,
            block: self.block,
            run: self.run,
            offset_bytes: self.offset,
            len_bytes: self.len,
        }
    }
}

/// The parts of a span, one after the other.
#[derive(Debug)]
pub(crate) struct Walk<'a> {
    pairing: &'a Pairing,
    remote: &'a [u32],
    local: &'a [u32],
    layer: usize,
    end: usize,
    group: usize,
    /// Of the block in the span.
    position: usize,
    piece: usize,
    /// Bytes of the piece that were returned already.
    done: usize,
}

impl Walk<'_> {
    /// Whether all parts were returned.
    pub(crate) fn is_done(&self) -> bool {
        self.layer == self.end
    }

    /// The next part, of at most `most_bytes`.
    pub(crate) fn next(&mut self, most_bytes: usize) -> Option<Part> {
        if self.is_done() || most_bytes == 0 {
            return None;
        }
        let layer = &self.pairing.layers[self.layer];
        let region = &self.pairing.remote.regions[self.layer];
        let piece = layer.pieces[self.piece];
        let len = (piece.len - self.done).min(most_bytes);
        let (remote_cut, local_cut) = (&self.pairing.remote_cut, &self.pairing.local_cut);
        let (remote_block, remote_unit) = split(self.remote[self.position], remote_cut.units_per_block);
        let (block, unit) = split(self.local[self.position], local_cut.units_per_block);
        // No overflow: every run of every block was found inside its region, and every unit inside a block.
        let address = region.address
            + u64::from(remote_block) * region.block_stride_bytes
            + (remote_cut.layers[self.layer].offsets[remote_unit] + piece.remote_offset + self.done) as u64;
        let (run, run_offset) = local_cut.layers[self.layer].places[unit][piece.local_run];
        let part = Part {
            layer: self.layer,
            block,
            run,
            offset: run_offset + piece.local_offset + self.done,
            address,
            len,
        };
        self.done += len;
        if self.done == piece.len {
            self.advance();
        }
        Some(part)
    }

    fn advance(&mut self) {
        let layer = &self.pairing.layers[self.layer];
        let group = &layer.groups[self.group];
        self.done = 0;
        self.piece += 1;
        if self.piece < group.end {
            return;
        }
        self.position += 1;
        self.piece = group.start;
        if self.position < self.local.len() {
            return;
        }
        self.position = 0;
        self.piece = group.end;
        self.group += 1;
        if self.group < layer.groups.len() {
            return;
        }
        self.group = 0;
        self.piece = 0;
        self.layer += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kvlane_core::PagedMemory;

    use super::super::fixture::{Form, cache};
    use super::*;

    fn run(offset_bytes: usize, len_bytes: usize) -> Run {
        Run {
            offset_bytes,
            len_bytes,
        }
    }

    fn pairing(local: Form, remote: Form) -> Pairing {
        let remote = cache(remote, 2, 8, 64);
        Pairing::new(cache(local, 2, 8, 64), RemoteCache::of(remote.map()).unwrap()).unwrap()
    }

    fn span(layers: Range<usize>, remote: &[u32], local: &[u32]) -> Span {
        Span {
            layers,
            remote: remote.to_vec(),
            local: local.to_vec(),
        }
    }

    #[test]
    fn a_payload_is_cut_at_the_boundaries_of_both_sides() {
        let (pieces, groups) = cut(
            &[run(0, 10), run(100, 20)],
            &[run(5, 4), run(50, 12), run(70, 14)],
        );
        let piece = |local_run, local_offset, remote_offset, len| Piece {
            local_run,
            local_offset,
            remote_offset,
            len,
        };
        assert_eq!(
            pieces,
            [
                piece(0, 0, 5, 4),
                piece(0, 4, 50, 6),
                piece(1, 0, 56, 6),
                piece(1, 6, 70, 14)
            ]
        );
        assert_eq!(groups, [0..1, 1..3, 3..4]);
    }

    #[test]
    fn all_blocks_of_a_run_come_before_the_next_run_of_the_peer() {
        let pairing = pairing(Form::KvOuter, Form::KvOuter);
        let mut walk = pairing.walk(&(1..2), &[3, 4], &[5, 6]);
        let order: Vec<_> = std::iter::from_fn(|| walk.next(usize::MAX))
            .map(|part| (part.layer, part.block, part.run, part.len))
            .collect();
        assert_eq!(
            order,
            [(1, 5, 0, 32), (1, 6, 0, 32), (1, 5, 1, 32), (1, 6, 1, 32)]
        );
        assert!(walk.is_done());
    }

    #[test]
    fn parts_end_where_the_caller_has_no_room_and_go_on_there() {
        let pairing = pairing(Form::KvOuter, Form::BlockMajor);
        let mut walk = pairing.walk(&(0..2), &[3, 1], &[2, 0]);
        let (mut bytes, mut last) = (0, 0);
        while let Some(part) = walk.next(7) {
            assert!(part.len <= 7);
            bytes += part.len;
            last = part.address + part.len as u64;
        }
        assert_eq!(bytes as u64, pairing.payload_bytes(&(0..2), 2));
        let region = &pairing.remote().regions()[1];
        assert_eq!(last, region.address + 2 * region.block_stride_bytes);
    }

    #[test]
    fn spans_beyond_either_cache_are_refused() {
        let pairing = pairing(Form::KvOuter, Form::BlockMajor);
        assert!(pairing.check(&span(0..2, &[0, 7], &[7, 0])).is_ok());
        assert!(pairing.check(&span(2..2, &[], &[])).is_ok());
        for (case, span) in [
            ("a layer too many", span(0..3, &[0], &[0])),
            (
                "layers backwards",
                Span {
                    layers: Range { start: 2, end: 1 },
                    ..span(0..1, &[0], &[0])
                },
            ),
            ("the peer's block", span(0..1, &[8], &[0])),
            ("a local block", span(0..1, &[0], &[8])),
            ("unequal lists", span(0..1, &[0, 1], &[0])),
        ] {
            assert!(
                matches!(pairing.check(&span), Err(LaneError::Request(_))),
                "{case}"
            );
        }
        assert_eq!(pairing.walk(&(0..2), &[], &[]).next(usize::MAX), None);
    }

    #[test]
    fn layers_of_other_lengths_or_another_number_are_refused() {
        let local = cache(Form::KvOuter, 2, 8, 64);
        for (layers, bytes) in [(3, 64), (2, 128)] {
            let remote = cache(Form::KvOuter, layers, 8, bytes);
            let refused = Pairing::new(Arc::clone(&local), RemoteCache::of(remote.map()).unwrap());
            assert!(matches!(refused, Err(LaneError::Layout(_))), "{layers} x {bytes}");
        }
    }
}
