use proptest::prelude::*;

use super::*;

fn chain_of(root: &ChainRoot, images: &[(u64, u64, &str)], tokens: &[u32]) -> Vec<BlockKey> {
    let mut chain = Chain::new(root);
    for &(start, length, identifier) in images {
        chain
            .add_image(start, length, identifier)
            .expect("no token is in the chain yet");
    }
    chain.extend(tokens.iter().copied());
    chain.keys().to_vec()
}

fn root(block_tokens: u32) -> ChainRoot {
    ChainRoot::new(block_tokens).expect("an allowed size")
}

#[test]
fn a_prefix_that_is_not_known_for_sure_is_none() {
    let mut plain = Chain::new(&root(4));
    plain.extend(0..9);
    assert!(plain.prefix(0).is_none());
    assert!(plain.prefix(2).is_some());
    assert!(plain.prefix(3).is_none());

    // The picture reaches over the end of the first block, and the cut copy could not know.
    let mut with_image = Chain::new(&root(4));
    with_image
        .add_image(2, 4, "cat")
        .expect("no token is in the chain yet");
    with_image.extend(0..9);
    assert!(with_image.prefix(1).is_none());
}

/// Keys are stored on disk and compared between machines: a change of the format must be made on purpose, together
/// with the format version. The expected keys are built here field by field.
#[test]
fn the_key_is_the_hash_of_parent_tokens_and_images_as_documented() {
    let mut hasher = blake3::Hasher::new_derive_key("kvlane 2026-11 chain root");
    hasher.update(&1u32.to_le_bytes()).update(&4u32.to_le_bytes());
    hasher
        .update(&[1])
        .update(&4u64.to_le_bytes())
        .update(b"salt")
        .update(&[0]);
    let mut parent = *hasher.finalize().as_bytes();

    let mut keys = Vec::new();
    for (first, start) in [(0u32, 2i64), (4, -2)] {
        let mut input = parent.to_vec();
        (first..first + 4).for_each(|token| input.extend(token.to_le_bytes()));
        input.extend(3u64.to_le_bytes());
        input.extend(b"cat");
        input.extend(start.to_le_bytes());
        input.extend(5u64.to_le_bytes());
        parent = *blake3::hash(&input).as_bytes();
        keys.push(BlockKey(parent));
    }
    let tokens: Vec<u32> = (0..9).collect();
    assert_eq!(
        chain_of(&root(4).with_cache_salt("salt"), &[(2, 5, "cat")], &tokens),
        keys
    );
    assert_eq!(FORMAT_VERSION, 1);
}

#[test]
fn keys_do_not_change_between_releases() {
    let keys = chain_of(&root(16), &[], &(0..32).collect::<Vec<u32>>());
    let hex: Vec<String> = keys.iter().map(ToString::to_string).collect();
    assert_eq!(
        hex,
        [
            "6662f46c50c7afb77155efe91e3b109c971bc5e57c53232e3040895aad26db44",
            "c8d24f72baf69fba40a7c3ed921af2d944611e81238330fa8bc20ed854486f80"
        ]
    );
}

#[test]
fn only_full_blocks_get_a_key_and_the_tail_waits() {
    let mut chain = Chain::new(&root(4));
    assert_eq!(
        (chain.extend(0..3), chain.block_count(), chain.token_count()),
        (0, 0, 3)
    );
    assert_eq!(
        (chain.extend(3..9), chain.block_count(), chain.token_count()),
        (2, 2, 9)
    );
    assert_eq!(
        (chain.extend([]), chain.keys().len(), chain.block_tokens()),
        (2, 2, 4)
    );
}

#[test]
fn salt_and_adapter_do_not_run_into_each_other() {
    let roots = [
        root(4),
        root(5),
        root(4).with_cache_salt(""),
        root(4).with_cache_salt("ab"),
        root(4).with_lora("ab"),
        root(4).with_cache_salt("a").with_lora("b"),
        root(4).with_cache_salt("ab").with_lora(""),
        root(4).with_cache_salt("").with_lora("ab"),
    ];
    for (i, a) in roots.iter().enumerate() {
        for (j, b) in roots.iter().enumerate() {
            assert_eq!(a.id().key == b.id().key, i == j, "{a:?} and {b:?}");
        }
    }
}

#[test]
fn images_must_come_before_their_tokens_and_have_a_length() {
    let mut chain = Chain::new(&root(4));
    chain.extend(0..6);
    assert!(chain.add_image(5, 3, "late").is_err());
    assert!(chain.add_image(6, 0, "empty").is_err());
    assert!(chain.add_image(u64::MAX, 2, "beyond").is_err());
    assert!(chain.add_image(8, i64::MAX as u64, "beyond").is_err());
    // Refused images left nothing behind.
    chain.extend(6..12);
    assert_eq!(
        chain.keys().to_vec(),
        chain_of(&root(4), &[], &(0..12).collect::<Vec<u32>>())
    );
    assert!(chain.add_image(12, 3, "in time").is_ok());
}

#[test]
fn an_image_changes_the_blocks_it_overlaps_and_all_behind() {
    let tokens: Vec<u32> = (0..24).collect();
    let plain = chain_of(&root(4), &[], &tokens);
    let seen = chain_of(&root(4), &[(6, 8, "cat")], &tokens);
    let first_different = plain.iter().zip(&seen).position(|(a, b)| a != b);
    assert_eq!(first_different, Some(1));
    assert!(plain[1..].iter().all(|key| !seen.contains(key)));

    for other in [(6, 8, "dog"), (7, 8, "cat"), (6, 9, "cat"), (6, 7, "cat")] {
        let changed = chain_of(&root(4), &[other], &tokens);
        assert_eq!(changed[0], plain[0]);
        assert!(
            changed[1..]
                .iter()
                .all(|key| !seen.contains(key) && !plain.contains(key)),
            "{other:?}"
        );
    }
    // Two neighbours are not one long one, and the order of declaring them does not matter.
    let two = chain_of(&root(4), &[(6, 4, "cat"), (10, 4, "cat")], &tokens);
    assert_eq!(two, chain_of(&root(4), &[(10, 4, "cat"), (6, 4, "cat")], &tokens));
    assert_ne!(two[1..], seen[1..]);
}

#[test]
fn concatenated_keys_can_be_split_again() {
    let keys = chain_of(&root(4), &[], &(0..12).collect::<Vec<u32>>());
    let bytes: &[u8] = bytemuck::cast_slice(&keys);
    assert_eq!(BlockKey::parse_many(bytes).expect("96 bytes"), keys);
    assert!(BlockKey::parse_many(&bytes[1..]).is_err());
    let hex = keys[0].to_string();
    assert_eq!(hex.len(), 64);
    assert_eq!(format!("{:?}", keys[0]), format!("BlockKey({})", &hex[..16]));
}

#[test]
fn impossible_block_sizes_are_refused() {
    assert!(ChainRoot::new(0).is_err());
    assert!(ChainRoot::new(MAX_BLOCK_TOKENS + 1).is_err());
    assert!(ChainRoot::new(MAX_BLOCK_TOKENS).is_ok());
}

#[test]
fn chains_that_are_continued_at_once_keep_their_own_keys() {
    let mut first = Chain::new(&root(4));
    first.extend(0..40);
    for _ in 0..200 {
        let continued = |tail: u32| {
            let mut chain = first.prefix(10).expect("it has ten blocks");
            move || {
                chain.extend((0..20).map(|token| token + tail));
                chain.keys().to_vec()
            }
        };
        let (mut one, other) = (continued(100), continued(1000));
        let (one, other) = std::thread::scope(|scope| {
            let other = scope.spawn(other);
            (one(), other.join().expect("it does not panic"))
        });
        let expected = |tail: u32| {
            let tokens: Vec<u32> = (0..40).chain(tail..tail + 20).collect();
            chain_of(&root(4), &[], &tokens)
        };
        assert_eq!((one, other), (expected(100), expected(1000)));
    }
    let second = first.prefix(10).expect("it has ten blocks");
    assert_eq!(first.keys()[..10], second.keys()[..], "both at once");
}

proptest! {
    #[test]
    fn a_longer_prompt_begins_with_the_keys_of_its_prefix(
        block_tokens in 1u32..40,
        tokens in prop::collection::vec(any::<u32>(), 0..300),
        cut in 0usize..300,
    ) {
        let cut = cut.min(tokens.len());
        let whole = chain_of(&root(block_tokens), &[], &tokens);
        let part = chain_of(&root(block_tokens), &[], &tokens[..cut]);
        prop_assert_eq!(part.len(), cut / block_tokens as usize);
        prop_assert_eq!(&whole[..part.len()], &part[..]);
    }

    #[test]
    fn how_tokens_are_split_over_calls_does_not_matter(
        block_tokens in 1u32..40,
        pieces in prop::collection::vec(prop::collection::vec(any::<u32>(), 0..50), 0..12),
        image in (0u64..200, 1u64..200),
    ) {
        let images = [(image.0, image.1, "image")];
        let mut chain = Chain::new(&root(block_tokens));
        chain.add_image(image.0, image.1, "image").expect("no token is in the chain yet");
        for piece in &pieces {
            let blocks = chain.extend(piece.iter().copied());
            prop_assert_eq!(blocks, chain.block_count());
        }
        let tokens = pieces.concat();
        prop_assert_eq!(chain.token_count(), tokens.len() as u64);
        prop_assert_eq!(chain.keys().to_vec(), chain_of(&root(block_tokens), &images, &tokens));
    }

    #[test]
    fn one_other_token_changes_its_block_and_all_behind(
        block_tokens in 1u32..20,
        mut tokens in prop::collection::vec(any::<u32>(), 1..200),
        place in any::<prop::sample::Index>(),
        change in 1u32..,
    ) {
        let before = chain_of(&root(block_tokens), &[], &tokens);
        let place = place.index(tokens.len());
        tokens[place] ^= change;
        let after = chain_of(&root(block_tokens), &[], &tokens);
        let block = place / block_tokens as usize;
        for (i, key) in after.iter().enumerate() {
            prop_assert_eq!(before.contains(key), i < block, "block {}", i);
        }
    }

    #[test]
    fn a_prefix_continues_like_a_chain_of_its_own_and_leaves_the_first_alone(
        block_tokens in 1u32..20,
        head in prop::collection::vec(any::<u32>(), 20..100),
        tail in prop::collection::vec(any::<u32>(), 0..60),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut first = Chain::new(&root(block_tokens));
        first.extend(head.iter().copied());
        let before = first.keys().to_vec();
        let blocks = 1 + cut.index(first.block_count());
        let mut second = first.prefix(blocks).expect("the chain has that many blocks");
        prop_assert_eq!(second.token_count(), blocks as u64 * u64::from(block_tokens));
        second.extend(tail.iter().copied());
        // And a third one beside it, which the second must not see.
        let mut third = first.prefix(blocks).expect("the chain has that many blocks");
        third.extend(tail.iter().rev().copied());
        let mut tokens = head[..blocks * block_tokens as usize].to_vec();
        tokens.extend(&tail);
        prop_assert_eq!(second.keys().to_vec(), chain_of(&root(block_tokens), &[], &tokens));
        tokens.truncate(blocks * block_tokens as usize);
        tokens.extend(tail.iter().rev());
        prop_assert_eq!(third.keys().to_vec(), chain_of(&root(block_tokens), &[], &tokens));
        prop_assert_eq!(first.keys().to_vec(), before);
    }

    #[test]
    fn another_root_changes_every_key(
        block_tokens in 1u32..20,
        tokens in prop::collection::vec(any::<u32>(), 40..100),
        salt in ".{1,8}",
        lora in prop::collection::vec(any::<u8>(), 1..8),
    ) {
        let plain = root(block_tokens);
        let sets = [
            chain_of(&plain, &[], &tokens),
            chain_of(&plain.clone().with_cache_salt(salt.clone()), &[], &tokens),
            chain_of(&plain.clone().with_lora(lora.clone()), &[], &tokens),
            chain_of(&plain.with_cache_salt(salt).with_lora(lora), &[], &tokens),
            chain_of(&root(block_tokens + 1), &[], &tokens),
        ];
        for (i, a) in sets.iter().enumerate() {
            for b in &sets[..i] {
                prop_assert!(a.iter().all(|key| !b.contains(key)));
            }
        }
    }
}
