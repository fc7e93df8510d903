//! The block map against a copy that reads element by element, for every layout of vLLM 0.15 to 0.33 and for tensors
//! that nobody has thought of. The risk: bytes of another block or layer, silently.

use std::collections::BTreeMap;

use kvlane_core::{BlockMap, Device, OwnedCache, PagedMemory, TensorView};
use kvlane_tests::layouts::{self, Plan, Sizes};
use proptest::prelude::*;

/// Address at which the tests pretend that a cache lies.
const BASE: u64 = 0x20_0000;

/// Addresses of the elements of one block, ascending: what the payload is by definition.
fn element_addresses(view: &TensorView, block_dim: usize, block_count: u64, block: u64) -> Vec<u64> {
    let split = view.shape[block_dim] / block_count;
    let mut addresses = vec![view.address];
    for (dim, &size) in view.shape.iter().enumerate() {
        let places = if dim == block_dim {
            block * split..(block + 1) * split
        } else {
            0..size
        };
        let step = view.strides[dim] as u64 * u64::from(view.element_bytes);
        addresses = addresses
            .iter()
            .flat_map(|address| places.clone().map(move |place| address + place * step))
            .collect();
    }
    addresses.sort_unstable();
    addresses
}

/// Memory from `BASE` on in which no two neighbouring bytes can be mistaken for each other.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes as u64)
        .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

fn naive_layer(memory: &[u8], view: &TensorView, block_dim: usize, block_count: u64, block: u64) -> Vec<u8> {
    element_addresses(view, block_dim, block_count, block)
        .iter()
        .flat_map(|address| &memory[(address - BASE) as usize..][..view.element_bytes as usize])
        .copied()
        .collect()
}

/// A cache that holds `memory`, the bytes between the tensors aside.
fn filled_cache(map: BlockMap, memory: &[u8]) -> OwnedCache {
    let cache = OwnedCache::new(map);
    for region in 0..cache.map().layer_count() {
        let place = &cache.map().regions()[region];
        let start = (place.address - BASE) as usize;
        cache.set_extent(region, &memory[start..start + place.extent_bytes]);
    }
    cache
}

fn check_against_naive_copy(views: &[TensorView], map: BlockMap, block_dim: usize, bytes: usize, what: &str) {
    let memory = pattern(bytes);
    let block_count = map.block_count();
    let cache = filled_cache(map, &memory);
    for view in views {
        let region = cache
            .map()
            .layer_index(&view.name)
            .expect("every view has a region");
        for block in 0..block_count {
            let wanted = naive_layer(&memory, view, block_dim, u64::from(block_count), u64::from(block));
            assert!(
                cache.layer(region, block) == wanted,
                "{what}: block {block} of {}",
                view.name
            );
        }
    }

    // Writing puts every byte back where it was read, and touches nothing else.
    let target = OwnedCache::new(cache.map().clone());
    for region in 0..target.map().layer_count() {
        let extent = target.map().regions()[region].extent_bytes;
        target.set_extent(region, &vec![0; extent]);
    }
    let block = block_count / 2;
    target.set_payload(block, &cache.payload(block));
    for view in views {
        let region = target
            .map()
            .layer_index(&view.name)
            .expect("every view has a region");
        for other in 0..block_count {
            let written = target.layer(region, other);
            let right = if other == block {
                written == cache.layer(region, block)
            } else {
                written.iter().all(|&byte| byte == 0)
            };
            assert!(
                right,
                "{what}: writing block {block} left block {other} of {} wrong",
                view.name
            );
        }
    }
}

#[test]
fn every_known_layout_is_read_and_written_like_a_naive_copy() {
    for element_bytes in [1, 2, 4] {
        for blocks in [1, 2, 3, 12] {
            for plan in layouts::all(Sizes {
                blocks,
                element_bytes,
                ..Sizes::SMALL
            }) {
                let what = format!("{}, {blocks} blocks of {element_bytes}-byte elements", plan.name);
                check_against_naive_copy(
                    &plan.views(BASE),
                    plan.map(BASE),
                    plan.block_dim,
                    plan.storage_bytes,
                    &what,
                );
            }
        }
    }
}

#[test]
fn the_block_dimension_of_every_known_layout_is_found_without_a_hint() {
    for plan in layouts::all(Sizes::SMALL) {
        let found = BlockMap::from_tensors(plan.views(BASE), plan.block_count, None);
        assert_eq!(
            found.unwrap_or_else(|error| panic!("{}: {error}", plan.name)),
            plan.map(BASE),
            "{}",
            plan.name
        );
    }
}

#[test]
fn known_layouts_have_as_few_runs_as_their_memory_allows() {
    // Tokens 16, heads 2, head dimension 8, layers 3: counted by hand from the order of dimensions in memory.
    let wanted: BTreeMap<&str, usize> = BTreeMap::from([
        ("FlashAttention to 0.22, NHD", 2),
        ("FlashAttention to 0.22, HND", 2),
        ("FlashAttention to 0.22, blocks outside in memory", 1),
        ("CPU to 0.22", 2),
        ("K and V behind the blocks, NHD", 1),
        ("K and V behind the blocks, HND", 1),
        ("MLA to 0.28", 1),
        ("MLA from 0.29", 1),
        ("K and V in one row, NHD", 1),
        ("K and V in one row, HND", 1),
        ("nvfp4", 1),
        ("kernel blocks of half the size, HND", 1),
        ("kernel blocks of half the size, K and V outside", 2),
        ("kernel blocks of half the size, K and V behind", 1),
        ("Triton with room for scales", 2 * 16 * 2),
        ("layers packed between blocks", 1),
        ("LBHNC", 1),
        ("LBNHC", 1),
        ("LHBNC", 2),
        ("BLHNC", 1),
        ("BLNHC", 1),
        ("BHLNC", 2),
    ]);
    let found: BTreeMap<String, usize> = layouts::all(Sizes::SMALL)
        .into_iter()
        .map(|plan| (plan.name.clone(), plan.map(BASE).regions()[0].runs.len()))
        .collect();
    assert_eq!(
        found,
        wanted
            .into_iter()
            .map(|(name, runs)| (name.to_owned(), runs))
            .collect()
    );
}

/// What a payload means: for every element, in payload order, its kernel block and its place in the logical form of
/// that, sizes of one left out. Tensors with equal lists of such places hold the same values in the same order.
fn meaning(plan: &Plan) -> Vec<Vec<u64>> {
    let view = &plan.views(BASE)[0];
    let step = |dim: usize| view.strides[dim] as u64;
    let split = view.shape[plan.block_dim] / u64::from(plan.block_count);
    let mut elements: Vec<(u64, Vec<u64>)> =
        (0..split).map(|i| (i * step(plan.block_dim), vec![i])).collect();
    for (dim, &size) in view.shape.iter().enumerate() {
        if dim == plan.block_dim || size == 1 {
            continue;
        }
        elements = elements
            .iter()
            .flat_map(|(address, place)| {
                (0..size).map(move |i| (address + i * step(dim), [place.as_slice(), &[i]].concat()))
            })
            .collect();
    }
    elements.sort_unstable();
    elements.into_iter().map(|(_, place)| place).collect()
}

#[test]
fn fingerprints_are_equal_exactly_when_payloads_are_ordered_alike() {
    let plans = layouts::all(Sizes::SMALL);
    let mut agreeing = 0;
    for (i, a) in plans.iter().enumerate() {
        for b in &plans[..i] {
            let alike = meaning(a) == meaning(b);
            let equal = a.map(BASE).fingerprint() == b.map(BASE).fingerprint();
            assert_eq!(equal, alike, "{} and {}", a.name, b.name);
            agreeing += usize::from(alike);
        }
    }
    assert!(agreeing >= 10, "the layouts contain pairs that agree");
}

#[test]
fn fingerprints_tell_orders_of_heads_and_tokens_apart_and_ignore_where_blocks_lie() {
    let plans = layouts::all(Sizes::SMALL);
    let fingerprint = |name: &str| {
        let plan = plans
            .iter()
            .find(|plan| plan.name == name)
            .unwrap_or_else(|| panic!("no layout {name}"));
        plan.map(BASE).fingerprint()
    };
    let same = [
        ("FlashAttention to 0.22, NHD", "K and V behind the blocks, NHD"),
        ("FlashAttention to 0.22, HND", "K and V behind the blocks, HND"),
        ("FlashAttention to 0.22, NHD", "layers packed between blocks"),
        ("FlashAttention to 0.22, NHD", "Triton with room for scales"),
        ("MLA to 0.28", "MLA from 0.29"),
        ("LBHNC", "BLHNC"),
        ("LBHNC", "LHBNC"),
        ("LBHNC", "BHLNC"),
        ("LBNHC", "BLNHC"),
        ("LBHNC", "K and V in one row, HND"),
        ("LBNHC", "K and V in one row, NHD"),
    ];
    for (a, b) in same {
        assert_eq!(fingerprint(a), fingerprint(b), "{a} and {b}");
    }
    let different = [
        ("FlashAttention to 0.22, NHD", "FlashAttention to 0.22, HND"),
        ("LBHNC", "LBNHC"),
        ("K and V in one row, HND", "K and V in one row, NHD"),
        ("K and V behind the blocks, NHD", "K and V in one row, NHD"),
        ("K and V behind the blocks, HND", "K and V in one row, HND"),
        ("K and V in one row, HND", "kernel blocks of half the size, HND"),
    ];
    for (a, b) in different {
        assert_ne!(fingerprint(a), fingerprint(b), "{a} and {b}");
    }

    let usual = |sizes| layouts::usual(sizes).map(BASE).fingerprint();
    let small = usual(Sizes::SMALL);
    assert_eq!(
        small,
        usual(Sizes {
            blocks: 40,
            ..Sizes::SMALL
        })
    );
    assert_eq!(small, layouts::usual(Sizes::SMALL).map(BASE + 4096).fingerprint());
    for other in [
        Sizes {
            layers: 4,
            ..Sizes::SMALL
        },
        Sizes {
            element_bytes: 1,
            ..Sizes::SMALL
        },
        Sizes {
            heads: 4,
            ..Sizes::SMALL
        },
        Sizes {
            tokens: 32,
            ..Sizes::SMALL
        },
        // As many bytes as before.
        Sizes {
            heads: 4,
            tokens: 8,
            ..Sizes::SMALL
        },
        Sizes {
            dim: 16,
            element_bytes: 1,
            ..Sizes::SMALL
        },
    ] {
        assert_ne!(small, usual(other), "{other:?}");
    }
}

#[test]
fn layers_of_different_forms_are_told_apart_by_their_order() {
    let form = |name: &str, address, heads: u64| TensorView {
        name: name.to_owned(),
        address,
        device: Device::Host,
        element_bytes: 2,
        shape: vec![4, heads, 8],
        strides: vec![heads as i64 * 8, 8, 1],
    };
    let map = |views: [TensorView; 2]| {
        BlockMap::from_tensors(views, 4, None)
            .expect("dense tensors")
            .fingerprint()
    };
    let (wide, narrow) = (4, 2);
    let wide_first = map([form("layer.0", BASE, wide), form("layer.1", BASE + 4096, narrow)]);
    assert_eq!(
        wide_first,
        map([form("layer.1", BASE, narrow), form("layer.0", BASE + 8192, wide)])
    );
    assert_ne!(
        wide_first,
        map([form("layer.0", BASE, narrow), form("layer.1", BASE + 4096, wide)])
    );
}

/// Any dense order of any dimensions, with gaps thrown in.
fn any_tensor() -> impl Strategy<Value = (TensorView, u32)> {
    let dims = prop::collection::vec((1u64..5, 0u64..3), 1..5);
    (
        dims,
        1u32..6,
        1u64..4,
        0usize..100,
        prop::sample::select(vec![1u32, 2, 4, 8]),
        any::<u64>(),
    )
        .prop_map(|(others, blocks, split, gap, element_bytes, seed)| {
            let mut shape = vec![u64::from(blocks) * split];
            shape.extend(others.iter().map(|(size, _)| size));
            // Five dimensions with two in front would mean K and V outside; that form has its tests above.
            if shape.len() == 5 && shape[0] == 2 {
                shape.push(1);
            }
            let mut order: Vec<usize> = (0..shape.len()).collect();
            let mut state = seed | 1;
            for i in (1..order.len()).rev() {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                order.swap(i, (state >> 33) as usize % (i + 1));
            }
            let mut strides = vec![0i64; shape.len()];
            let mut step = 1;
            for (i, &dim) in order.iter().enumerate() {
                strides[dim] = step;
                step *= shape[dim] as i64;
                // A gap behind one of the dimensions.
                if i == gap % 7 {
                    step += others[gap % others.len()].1 as i64;
                }
            }
            let view = TensorView {
                name: "any".to_owned(),
                address: BASE,
                device: Device::Host,
                element_bytes,
                shape,
                strides,
            };
            (view, blocks)
        })
}

proptest! {
    #[test]
    fn any_strided_tensor_is_read_and_written_like_a_naive_copy((view, blocks) in any_tensor()) {
        let map = BlockMap::from_tensors([view.clone()], blocks, Some(0)).expect("no elements overlap");
        let region = &map.regions()[0];
        let ends: Vec<usize> = region.runs.iter().map(|run| run.offset_bytes + run.len_bytes).collect();
        for (run, end) in region.runs[1..].iter().zip(&ends) {
            prop_assert!(run.offset_bytes > *end, "runs ascend and do not touch");
        }
        prop_assert!(region.block_offset_bytes(blocks - 1) + ends[ends.len() - 1] <= region.extent_bytes);
        let bytes = region.extent_bytes;
        check_against_naive_copy(&[view], map, 0, bytes, "any");
    }

    /// Whatever numbers come in, the answer is a map inside the tensor or a refusal; never a panic or a wrapped sum.
    #[test]
    fn any_numbers_give_a_map_within_the_tensor_or_a_refusal(
        shape in prop::collection::vec(prop_oneof![0u64..8, any::<u64>()], 0..6),
        strides in prop::collection::vec(prop_oneof![-2i64..300, any::<i64>()], 0..6),
        address in any::<u64>(),
        element_bytes in 0u32..9,
        blocks in 0u32..5,
        hint in prop::option::of(0usize..7),
    ) {
        let view = TensorView { name: "any".to_owned(), address, device: Device::Cuda(1), element_bytes, shape, strides };
        if let Ok(map) = BlockMap::from_tensors([view.clone()], blocks, hint) {
            let region = &map.regions()[0];
            let last: i128 = view.shape.iter().zip(&view.strides)
                .map(|(&size, &stride)| if size > 1 { i128::from(size - 1) * i128::from(stride) } else { 0 })
                .sum();
            let bytes = (last + 1) * i128::from(element_bytes);
            prop_assert_eq!(region.extent_bytes as i128, bytes);
            let run = region.runs[region.runs.len() - 1];
            prop_assert!((region.block_offset_bytes(blocks - 1) + run.offset_bytes + run.len_bytes) as i128 <= bytes);
            let elements: u128 = view.shape.iter().map(|&size| u128::from(size)).product();
            prop_assert_eq!(region.layer_bytes() as u128 * u128::from(blocks), elements * u128::from(element_bytes));
        }
    }
}
