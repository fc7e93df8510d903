//! Caches of known layouts, for the tests of lanes and their timing.

use std::sync::Arc;

use kvlane_core::{BlockMap, Device, TensorView};
use kvlane_fs::HostCache;

/// How a layer lies in memory. The payload is the same: K, then V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// `(2, blocks, width)`: two runs a block, far from each other.
    KvOuter,
    /// `(blocks, 2, width)`: one run a block.
    BlockMajor,
}

/// A cache of `layers` tensors, whose blocks have `layer_bytes` each.
pub(crate) fn cache(form: Form, layers: usize, blocks: u32, layer_bytes: usize) -> Arc<HostCache> {
    let sizes = vec![blocks as usize * layer_bytes; layers];
    Arc::new(HostCache::allocate(&sizes, |addresses| {
        map(form, blocks, layer_bytes, addresses, Device::Host)
    }))
}

/// The layout of tensors at these addresses, each of a layer.
pub(crate) fn map(
    form: Form,
    blocks: u32,
    layer_bytes: usize,
    addresses: &[u64],
    device: Device,
) -> BlockMap {
    let half = layer_bytes as i64 / 2;
    let views = addresses.iter().enumerate().map(|(layer, &address)| {
        let (shape, strides) = match form {
            Form::KvOuter => (
                vec![2, u64::from(blocks), 1, 1, half as u64],
                vec![i64::from(blocks) * half, half, half, half, 1],
            ),
            Form::BlockMajor => (
                vec![u64::from(blocks), 2, 1, 1, half as u64],
                vec![2 * half, half, half, half, 1],
            ),
        };
        TensorView {
            name: format!("layer.{layer}"),
            address,
            device,
            element_bytes: 1,
            shape,
            strides,
        }
    });
    let block_dim = usize::from(form == Form::KvOuter);
    BlockMap::from_tensors(views, blocks, Some(block_dim)).expect("the tensors are well formed")
}
