//! Every form in which vLLM 0.15 to 0.33 hands out its KV tensors, as strided views of plain memory.

use kvlane_core::{BlockMap, Device, TensorView};

/// The KV tensors of one cache, at addresses still to be chosen.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Which layout this is.
    pub name: String,
    /// Number of blocks.
    pub block_count: u32,
    /// Bytes that hold all tensors.
    pub storage_bytes: usize,
    /// Which dimension counts blocks, for the naive copy; the map must find it out.
    pub block_dim: usize,
    tensors: Vec<TensorView>,
}

impl Plan {
    /// The tensors in memory that starts at `base`, which must not be null.
    pub fn views(&self, base: u64) -> Vec<TensorView> {
        self.tensors
            .iter()
            .map(|view| TensorView {
                address: base + view.address,
                ..view.clone()
            })
            .collect()
    }

    /// The block map of the tensors in memory that starts at `base`.
    pub fn map(&self, base: u64) -> BlockMap {
        BlockMap::from_tensors(self.views(base), self.block_count, Some(self.block_dim))
            .unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }
}

/// The sizes of a small model's cache.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Blocks.
    pub blocks: u64,
    /// Tokens per block; even.
    pub tokens: u64,
    /// KV heads of one rank.
    pub heads: u64,
    /// Elements of a head.
    pub dim: u64,
    /// Layers.
    pub layers: u64,
    /// Bytes of an element.
    pub element_bytes: u32,
}

impl Sizes {
    /// Small enough to try everything, large enough that no two sizes are equal.
    pub const SMALL: Sizes = Sizes {
        blocks: 12,
        tokens: 16,
        heads: 2,
        dim: 8,
        layers: 3,
        element_bytes: 2,
    };
}

/// All known layouts.
pub fn all(sizes: Sizes) -> Vec<Plan> {
    let Sizes {
        blocks: nb,
        tokens: bs,
        heads: h,
        dim: d,
        layers: l,
        ..
    } = sizes;
    let mut plans = Vec::new();
    let mut own = |name: &str, block_dim: usize, shape: &[u64], order: &[usize]| {
        plans.push(separate(
            name,
            sizes,
            block_dim,
            shape,
            order,
            shape.last().copied().unwrap_or(1),
        ));
    };
    own(
        "FlashAttention to 0.22, NHD",
        1,
        &[2, nb, bs, h, d],
        &[0, 1, 2, 3, 4],
    );
    own(
        "FlashAttention to 0.22, HND",
        1,
        &[2, nb, bs, h, d],
        &[0, 1, 3, 2, 4],
    );
    own(
        "FlashAttention to 0.22, blocks outside in memory",
        1,
        &[2, nb, bs, h, d],
        &[1, 0, 2, 3, 4],
    );
    own("CPU to 0.22", 1, &[2, nb, h, bs, d], &[0, 1, 2, 3, 4]);
    own(
        "K and V behind the blocks, NHD",
        0,
        &[nb, 2, bs, h, d],
        &[0, 1, 2, 3, 4],
    );
    own(
        "K and V behind the blocks, HND",
        0,
        &[nb, 2, bs, h, d],
        &[0, 1, 3, 2, 4],
    );
    own("MLA to 0.28", 0, &[nb, bs, 9 * d], &[0, 1, 2]);
    own("MLA from 0.29", 0, &[nb, 1, bs, 9 * d], &[0, 1, 2, 3]);
    own("K and V in one row, NHD", 0, &[nb, h, bs, 2 * d], &[0, 2, 1, 3]);
    own("K and V in one row, HND", 0, &[nb, h, bs, 2 * d], &[0, 1, 2, 3]);
    own("nvfp4", 0, &[nb, 2 * h, bs, d / 2 + 1], &[0, 1, 2, 3]);
    own(
        "kernel blocks of half the size, HND",
        0,
        &[nb * 2, h, bs / 2, 2 * d],
        &[0, 1, 2, 3],
    );
    own(
        "kernel blocks of half the size, K and V outside",
        1,
        &[2, nb * 2, bs / 2, h, d],
        &[0, 1, 2, 3, 4],
    );
    own(
        "kernel blocks of half the size, K and V behind",
        0,
        &[nb * 2, 2, bs / 2, h, d],
        &[0, 1, 2, 3, 4],
    );
    plans.push(separate(
        "Triton with room for scales",
        sizes,
        0,
        &[nb, 2, bs, h, d],
        &[0, 1, 2, 3, 4],
        d + 4,
    ));

    plans.push(shared(
        "layers packed between blocks",
        sizes,
        0,
        &[l, nb, 2, bs, h, d],
        &[1, 0, 2, 3, 4, 5],
    ));
    let orders: [(&str, [usize; 5]); 6] = [
        ("LBHNC", [0, 1, 2, 3, 4]),
        ("LBNHC", [0, 1, 3, 2, 4]),
        ("LHBNC", [0, 2, 1, 3, 4]),
        ("BLHNC", [1, 0, 2, 3, 4]),
        ("BLNHC", [1, 0, 3, 2, 4]),
        ("BHLNC", [1, 2, 0, 3, 4]),
    ];
    plans.extend(orders.map(|(name, order)| shared(name, sizes, 0, &[l, nb, h, bs, 2 * d], &order)));
    plans
}

/// The layout that vLLM uses by default since 0.29.
pub fn usual(sizes: Sizes) -> Plan {
    let Sizes {
        blocks,
        tokens,
        heads,
        dim,
        layers,
        ..
    } = sizes;
    shared(
        "LBNHC",
        sizes,
        0,
        &[layers, blocks, heads, tokens, 2 * dim],
        &[0, 1, 3, 2, 4],
    )
}

/// One allocation per layer. `row` is how many elements the last dimension takes in memory.
fn separate(name: &str, sizes: Sizes, block_dim: usize, shape: &[u64], order: &[usize], row: u64) -> Plan {
    let mut room = shape.to_vec();
    if let Some(last) = room.last_mut() {
        *last = row;
    }
    let strides = strides(&room, order);
    let layer_bytes = room.iter().product::<u64>() * u64::from(sizes.element_bytes);
    // A gap, so that a copy beyond the end of one layer does not land in the next.
    let step = layer_bytes + 64;
    let tensors = (0..sizes.layers)
        .map(|layer| view(sizes, layer, layer * step, shape, &strides))
        .collect();
    plan(name, sizes, block_dim, tensors, sizes.layers * step)
}

/// One allocation for all layers; `shape` and `order` count the layer as dimension 0.
fn shared(name: &str, sizes: Sizes, block_dim: usize, shape: &[u64], order: &[usize]) -> Plan {
    let strides = strides(shape, order);
    let element_bytes = u64::from(sizes.element_bytes);
    let step = strides[0].unsigned_abs() * element_bytes;
    let tensors = (0..sizes.layers)
        .map(|layer| view(sizes, layer, layer * step, &shape[1..], &strides[1..]))
        .collect();
    plan(
        name,
        sizes,
        block_dim,
        tensors,
        shape.iter().product::<u64>() * element_bytes,
    )
}

fn plan(name: &str, sizes: Sizes, block_dim: usize, tensors: Vec<TensorView>, storage_bytes: u64) -> Plan {
    Plan {
        name: name.to_owned(),
        block_count: sizes.blocks as u32,
        storage_bytes: storage_bytes as usize,
        block_dim,
        tensors,
    }
}

fn view(sizes: Sizes, layer: u64, address: u64, shape: &[u64], strides: &[i64]) -> TensorView {
    TensorView {
        name: format!("model.layers.{layer}.attn"),
        address,
        device: Device::Host,
        element_bytes: sizes.element_bytes,
        shape: shape.to_vec(),
        strides: strides.to_vec(),
    }
}

/// Strides of a dense tensor whose dimensions lie in memory in `order`, outermost first.
fn strides(shape: &[u64], order: &[usize]) -> Vec<i64> {
    let mut strides = vec![0; shape.len()];
    let mut step = 1;
    for &dim in order.iter().rev() {
        strides[dim] = step as i64;
        step *= shape[dim];
    }
    strides
}
