//! Chain hashes: names of KV blocks that say what is in them.
//!
//! The KV of a token depends on every token before it. So the name of a block is a hash of the name of the block before
//! it and of its own content: equal names mean equal prefixes, on any machine and in any process. Whatever else decides
//! the values (cache salt, LoRA adapter, images) is hashed too; what does not change from block to block sits in the
//! root.

use std::fmt;
use std::hash::{Hash, Hasher};

use crate::error::{Error, Result};
use crate::namespace::FORMAT_VERSION;

/// Separates root hashes from every other use of blake3. Changing it changes every key.
const ROOT_CONTEXT: &str = "kvlane 2026-11 chain root";

/// The name of one block's content: a 32-byte hash of the whole prefix that ends with the block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct BlockKey(pub [u8; 32]);

impl BlockKey {
    /// The bytes of the key.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first eight bytes as a number: uniformly spread, good enough for shards and tables, not for identity.
    pub fn prefix(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    /// Splits concatenated keys. `bytes` must be a multiple of 32 long.
    pub fn parse_many(bytes: &[u8]) -> Result<Vec<BlockKey>> {
        let (keys, rest) = bytes.as_chunks::<32>();
        if !rest.is_empty() {
            return Err(Error::InvalidArgument {
                argument: "keys",
                found: format!("{} bytes", bytes.len()),
                allowed: "a multiple of 32 bytes".to_owned(),
            });
        }
        Ok(keys.iter().copied().map(BlockKey).collect())
    }
}

impl From<[u8; 32]> for BlockKey {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

/// The key already is a hash, so eight of its bytes spread a table as well as all of them.
impl Hash for BlockKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.prefix());
    }
}

/// Short form: enough to find a key in a log.
impl fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockKey({:016x})", self.prefix().swap_bytes())
    }
}

/// All 64 hexadecimal digits.
impl fmt::Display for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What all blocks of a chain have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainRoot {
    block_tokens: u32,
    cache_salt: Option<String>,
    lora: Option<Vec<u8>>,
}

impl ChainRoot {
    /// A root for blocks of `block_tokens` tokens, without salt and adapter.
    pub fn new(block_tokens: u32) -> Result<Self> {
        if block_tokens == 0 || block_tokens > MAX_BLOCK_TOKENS {
            return Err(Error::InvalidArgument {
                argument: "block_tokens",
                found: block_tokens.to_string(),
                allowed: format!("1 to {MAX_BLOCK_TOKENS}"),
            });
        }
        Ok(Self {
            block_tokens,
            cache_salt: None,
            lora: None,
        })
    }

    /// Only requests with the same salt share blocks.
    #[must_use]
    pub fn with_cache_salt(mut self, cache_salt: impl Into<String>) -> Self {
        self.cache_salt = Some(cache_salt.into());
        self
    }

    /// Only requests with the same adapter share blocks. `identity` must change when the adapter's weights do.
    #[must_use]
    pub fn with_lora(mut self, identity: impl Into<Vec<u8>>) -> Self {
        self.lora = Some(identity.into());
        self
    }

    /// The id that [`Chain::new`] starts from; hashing it once serves all requests with the same root.
    pub fn id(&self) -> ChainRootId {
        let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
        hasher.update(&FORMAT_VERSION.to_le_bytes());
        hasher.update(&self.block_tokens.to_le_bytes());
        for field in [
            self.cache_salt.as_deref().map(str::as_bytes),
            self.lora.as_deref(),
        ] {
            match field {
                None => {
                    hasher.update(&[0]);
                }
                Some(bytes) => {
                    hasher.update(&[1]);
                    hasher.update(&(bytes.len() as u64).to_le_bytes());
                    hasher.update(bytes);
                }
            }
        }
        ChainRootId {
            key: BlockKey(*hasher.finalize().as_bytes()),
            block_tokens: self.block_tokens,
        }
    }
}

/// A hashed [`ChainRoot`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainRootId {
    key: BlockKey,
    block_tokens: u32,
}

impl From<&ChainRoot> for ChainRootId {
    fn from(root: &ChainRoot) -> Self {
        root.id()
    }
}

/// The keys of one request's blocks, computed as its tokens become known.
///
/// Only full blocks have a key; the tokens behind the last of them wait for more. How the tokens are split over calls
/// of [`extend`](Chain::extend) does not matter.
///
/// ```
/// use kvlane_core::{Chain, ChainRoot};
///
/// let root = ChainRoot::new(16)?;
/// let mut chain = Chain::new(&root);
/// chain.add_image(4, 8, "sha256:77f1")?;
/// chain.extend(0..40);
/// assert_eq!((chain.block_count(), chain.token_count()), (2, 40));
/// # Ok::<(), kvlane_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Chain {
    block_tokens: u64,
    keys: Vec<BlockKey>,
    /// Hash input of the block being filled: parent key, then tokens.
    block: Vec<u8>,
    /// Length of `block` when it holds all its tokens.
    full_bytes: usize,
    /// Items that reach into blocks without a key, by start.
    images: Vec<Image>,
}

/// The longest block that a chain may have, in tokens; vLLM's are 16 to a few thousand.
pub const MAX_BLOCK_TOKENS: u32 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Image {
    start_token: u64,
    end_token: u64,
    identifier: String,
}

impl Chain {
    /// A chain without tokens.
    pub fn new(root: impl Into<ChainRootId>) -> Self {
        let root = root.into();
        let full_bytes = 32 + 4 * root.block_tokens as usize;
        let mut block = Vec::with_capacity(full_bytes);
        block.extend_from_slice(root.key.as_bytes());
        Self {
            block_tokens: u64::from(root.block_tokens),
            keys: Vec::new(),
            block,
            full_bytes,
            images: Vec::new(),
        }
    }

    /// Declares a multimodal item: `length_tokens` placeholder tokens from `start_token` on stand for what
    /// `identifier` names. Must come before the tokens: placeholders of two images are the same tokens.
    ///
    /// The order of calls does not matter.
    pub fn add_image(
        &mut self,
        start_token: u64,
        length_tokens: u64,
        identifier: impl Into<String>,
    ) -> Result<()> {
        if start_token < self.token_count() {
            return Err(Error::InvalidArgument {
                argument: "start_token",
                found: start_token.to_string(),
                allowed: format!(
                    "at least {}: earlier tokens are in the chain already",
                    self.token_count()
                ),
            });
        }
        let end_token = match start_token.checked_add(length_tokens) {
            Some(end) if length_tokens > 0 && end <= i64::MAX as u64 => end,
            _ => {
                return Err(Error::InvalidArgument {
                    argument: "length_tokens",
                    found: length_tokens.to_string(),
                    allowed: format!("1 to {}", (i64::MAX as u64).saturating_sub(start_token)),
                });
            }
        };
        let image = Image {
            start_token,
            end_token,
            identifier: identifier.into(),
        };
        let place = self.images.partition_point(|other| *other < image);
        self.images.insert(place, image);
        Ok(())
    }

    /// Appends tokens and returns the number of full blocks so far.
    pub fn extend(&mut self, tokens: impl IntoIterator<Item = u32>) -> usize {
        for token in tokens {
            self.block.extend_from_slice(&token.to_le_bytes());
            if self.block.len() == self.full_bytes {
                self.close_block();
            }
        }
        self.keys.len()
    }

    /// The keys of all full blocks, from the start of the request.
    pub fn keys(&self) -> &[BlockKey] {
        &self.keys
    }

    /// Number of full blocks.
    pub fn block_count(&self) -> usize {
        self.keys.len()
    }

    /// Number of tokens so far, those behind the last full block included.
    pub fn token_count(&self) -> u64 {
        self.keys.len() as u64 * self.block_tokens + (self.block.len() as u64 - 32) / 4
    }

    /// Tokens per block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens as u32
    }

    fn close_block(&mut self) {
        let first_token = self.keys.len() as u64 * self.block_tokens;
        let end_token = first_token + self.block_tokens;
        // No lengths are needed before the items: the parent and the tokens have a fixed size under one root.
        let mut ended = false;
        for image in self
            .images
            .iter()
            .take_while(|image| image.start_token < end_token)
        {
            // An item that began in an earlier block starts at a negative place, so its middle differs from its head.
            let start = image.start_token as i64 - first_token as i64;
            self.block
                .extend_from_slice(&(image.identifier.len() as u64).to_le_bytes());
            self.block.extend_from_slice(image.identifier.as_bytes());
            self.block.extend_from_slice(&start.to_le_bytes());
            self.block
                .extend_from_slice(&(image.end_token - image.start_token).to_le_bytes());
            ended |= image.end_token <= end_token;
        }
        let key = BlockKey(*blake3::hash(&self.block).as_bytes());
        if ended {
            self.images.retain(|image| image.end_token > end_token);
        }
        self.keys.push(key);
        self.block.clear();
        self.block.extend_from_slice(key.as_bytes());
    }
}

#[cfg(test)]
mod tests {
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
            chain.keys(),
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
            prop_assert_eq!(chain.keys(), chain_of(&root(block_tokens), &images, &tokens));
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
}
