use super::*;

fn view(name: &str, address: u64, shape: &[u64], strides: &[i64]) -> TensorView {
    TensorView {
        name: name.to_owned(),
        address,
        device: Device::Host,
        element_bytes: 2,
        shape: shape.to_vec(),
        strides: strides.to_vec(),
    }
}

fn map_one(shape: &[u64], strides: &[i64], blocks: u32, hint: Option<usize>) -> Result<BlockMap> {
    BlockMap::from_tensors([view("layer.0", 4096, shape, strides)], blocks, hint)
}

#[track_caller]
fn refusal(result: Result<BlockMap>, part: &str) {
    let message = result.expect_err("this form must be refused").to_string();
    assert!(message.contains(part), "'{message}' does not say '{part}'");
}

/// The shapes that were seen on real CPU workers of both ends of the version range.
#[test]
fn tensors_of_vllm_0_15_and_0_32_give_the_expected_runs() {
    let old = map_one(
        &[2, 2048, 2, 128, 64],
        &[33_554_432, 16_384, 8_192, 64, 1],
        2048,
        None,
    )
    .expect("0.15");
    let region = &old.regions()[0];
    assert_eq!(region.block_stride_bytes, 32_768);
    assert_eq!(region.extent_bytes, 134_217_728);
    let halves = [0, 67_108_864].map(|offset_bytes| Run {
        offset_bytes,
        len_bytes: 32_768,
    });
    assert_eq!(region.runs, halves);
    assert_eq!(
        (old.block_bytes(), old.layer_bytes(0), old.block_count()),
        (65_536, 65_536, 2048)
    );

    let new = map_one(&[2048, 2, 128, 128], &[32_768, 16_384, 128, 1], 2048, None).expect("0.32");
    let region = &new.regions()[0];
    assert_eq!(
        region.runs,
        [Run {
            offset_bytes: 0,
            len_bytes: 65_536
        }]
    );
    assert_eq!(region.block_offset_bytes(2047) + 65_536, region.extent_bytes);
}

#[test]
fn layers_are_in_natural_order_of_their_names() {
    let names = [
        "layers.10.attn",
        "layers.9.attn",
        "layers.2.mtp.1",
        "layers.2.attn",
        "embed",
        "layers.010.attn",
    ];
    let views = names
        .iter()
        .enumerate()
        .map(|(i, name)| view(name, 4096 + 640 * i as u64, &[4, 16], &[16, 1]));
    let map = BlockMap::from_tensors(views, 4, None).expect("dense tensors");
    let ordered: Vec<&str> = map.layer_names().collect();
    assert_eq!(
        ordered,
        [
            "embed",
            "layers.2.attn",
            "layers.2.mtp.1",
            "layers.9.attn",
            "layers.010.attn",
            "layers.10.attn"
        ]
    );
    assert!(
        ordered
            .iter()
            .enumerate()
            .all(|(i, name)| map.layer_index(name) == Some(i))
    );
    assert_eq!(map.layer_index("layers.1.attn"), None);
}

#[test]
fn layers_that_share_a_tensor_are_one_region_under_all_names() {
    let shared = |name| view(name, 8192, &[4, 16], &[16, 1]);
    let views = [
        shared("layer.11"),
        view("layer.2", 4096, &[4, 16], &[16, 1]),
        shared("layer.3"),
    ];
    let map = BlockMap::from_tensors(views, 4, None).expect("dense tensors");
    assert_eq!(map.layer_count(), 2);
    assert_eq!(map.regions()[1].names, ["layer.3", "layer.11"]);
    assert_eq!(
        (map.layer_index("layer.3"), map.layer_index("layer.11")),
        (Some(1), Some(1))
    );
    assert_eq!(map.block_bytes(), 2 * 32);

    // A sharing layer adds no bytes, so it does not change the order of a payload.
    let alone = [view("layer.2", 4096, &[4, 16], &[16, 1]), shared("layer.3")];
    assert_eq!(
        BlockMap::from_tensors(alone, 4, None)
            .expect("dense tensors")
            .fingerprint(),
        map.fingerprint()
    );

    refusal(
        BlockMap::from_tensors([shared("a"), shared("a")], 4, None),
        "two tensors named 'a'",
    );
    let bent = view("b", 8192, &[4, 4, 4], &[16, 4, 1]);
    refusal(
        BlockMap::from_tensors([shared("a"), bent], 4, None),
        "different form",
    );
}

#[test]
fn two_or_fewer_blocks_in_doubt_need_the_hint() {
    let (shape, strides) = ([2, 2, 16, 2, 8], [512, 256, 16, 8, 1]);
    refusal(
        map_one(&shape, &strides, 2, None),
        "dimension 0 or 1 may count them",
    );
    refusal(map_one(&shape, &strides, 2, Some(4)), "block_dim is 4");
    let outer = map_one(&shape, &strides, 2, Some(1)).expect("K and V outside");
    let inner = map_one(&shape, &strides, 2, Some(0)).expect("K and V inside");
    assert_eq!(
        (
            outer.regions()[0].runs.len(),
            outer.regions()[0].block_stride_bytes
        ),
        (2, 512)
    );
    assert_eq!(
        (
            inner.regions()[0].runs.len(),
            inner.regions()[0].block_stride_bytes
        ),
        (1, 1024)
    );
    // One block: the same doubt. Three: none, and the hint of another layer's form is not asked.
    refusal(
        map_one(&[2, 1, 16, 2, 8], &[256, 256, 16, 8, 1], 1, None),
        "dimension 0 or 1 may count them",
    );
    assert!(map_one(&[1, 2, 16, 2, 8], &[512, 256, 16, 8, 1], 1, None).is_ok());
    let three = map_one(&[3, 2, 16, 2, 8], &[512, 256, 16, 8, 1], 3, Some(1)).expect("no doubt");
    assert_eq!(three.regions()[0].block_stride_bytes, 1024);
}

#[test]
fn unusable_tensors_are_refused_with_the_reason() {
    refusal(
        map_one(&[5, 16], &[16, 1], 2, None),
        "no dimension is a multiple of the 2 blocks",
    );
    refusal(map_one(&[4, 16], &[16, 0], 4, None), "a stride is zero");
    refusal(map_one(&[4, 16], &[-16, 1], 4, None), "a stride is negative");
    refusal(map_one(&[4, 16], &[15, 1], 4, None), "elements overlap");
    refusal(map_one(&[4, 4, 4], &[16, 2, 2], 4, None), "elements overlap");
    // Blocks that reach into each other, though each alone is in order.
    refusal(map_one(&[4, 4, 4], &[8, 4, 1], 4, None), "elements overlap");
    refusal(map_one(&[4, 0], &[16, 1], 4, None), "no elements");
    refusal(map_one(&[4, 16], &[16], 4, None), "2 dimensions with 1 strides");
    refusal(map_one(&[], &[], 4, None), "0 dimensions");
    refusal(map_one(&[4; 17], &[1; 17], 4, None), "17 dimensions");
    refusal(
        map_one(&[4, 1 << 20], &[1 << 21, 2], 4, None),
        "more than 65536 pieces",
    );
    refusal(map_one(&[4, 16], &[16, 1], 0, None), "block_count is 0");
    refusal(BlockMap::from_tensors([], 4, None), "no tensor");
    refusal(
        BlockMap::from_tensors([view("null", 0, &[4, 16], &[16, 1])], 4, None),
        "null",
    );
    let no_bytes = TensorView {
        element_bytes: 0,
        ..view("a", 4096, &[4, 16], &[16, 1])
    };
    refusal(BlockMap::from_tensors([no_bytes], 4, None), "no bytes");
}

#[test]
fn tensors_beyond_the_address_space_are_refused_not_wrapped() {
    let beyond = "beyond the address space";
    refusal(map_one(&[1 << 40, 1 << 30], &[1 << 30, 1], 1 << 20, None), beyond);
    refusal(map_one(&[4, u64::MAX], &[1, 4], 4, None), beyond);
    refusal(map_one(&[4, 16], &[i64::MAX, 1], 4, None), beyond);
    refusal(map_one(&[4, 2], &[1 << 61, 1], 4, None), beyond);
    refusal(
        BlockMap::from_tensors([view("a", u64::MAX - 100, &[4, 16], &[16, 1])], 4, None),
        beyond,
    );
    assert!(BlockMap::from_tensors([view("a", u64::MAX - 128, &[4, 16], &[16, 1])], 4, None).is_ok());
}

#[test]
fn pieces_that_touch_behind_a_gap_are_one_run() {
    // Elements 0, 2, 3, 5 of each block: the second pair begins where the first ended.
    let map = map_one(&[4, 2, 2], &[8, 3, 2], 4, None).expect("no overlap");
    let runs = [(0, 2), (4, 4), (10, 2)].map(|(offset_bytes, len_bytes)| Run {
        offset_bytes,
        len_bytes,
    });
    assert_eq!(map.regions()[0].runs, runs);
}

#[test]
fn strides_of_dimensions_of_size_one_mean_nothing() {
    let odd = map_one(&[4, 1, 16], &[16, i64::MAX, 1], 4, None).expect("one element has no step");
    let even = map_one(&[4, 1, 16], &[16, 16, 1], 4, None).expect("dense");
    assert_eq!(odd, even);
    let one_block = map_one(&[1, 16], &[0, 1], 1, None).expect("one block has no step");
    assert_eq!(
        one_block.regions()[0].runs,
        [Run {
            offset_bytes: 0,
            len_bytes: 32
        }]
    );
    assert_eq!(one_block.regions()[0].extent_bytes, 32);
}

#[test]
fn numbers_in_names_compare_as_numbers_of_any_length() {
    let mut names = [
        "a2",
        "a10",
        "a",
        "a1",
        "b",
        "a99999999999999999999999",
        "a3",
        "a01",
        "a1b",
        "",
        "7",
        "10",
    ];
    names.sort_by(|a, b| natural_order(a, b));
    assert_eq!(
        names,
        [
            "",
            "7",
            "10",
            "a",
            "a01",
            "a1",
            "a1b",
            "a2",
            "a3",
            "a10",
            "a99999999999999999999999",
            "b"
        ]
    );
}
