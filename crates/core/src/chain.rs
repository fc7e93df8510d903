//! Chain hashes: names of KV blocks that say what is in them.
//!
//! The KV of a token depends on every token before it. So the name of a block is a hash of the name of the block before
//! it and of its own content: equal names mean equal prefixes, on any machine and in any process. Whatever else decides
//! the values (cache salt, LoRA adapter, images) is hashed too; what does not change from block to block sits in the
//! root.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::namespace::FORMAT_VERSION;

/// Separates root hashes from every other use of blake3. Changing it changes every key.
const ROOT_CONTEXT: &str = "kvlane 2026-11 chain root";

/// Separates the hash of a whole prompt from those of its blocks.
const DIGEST_CONTEXT: &str = "kvlane 2026-11 chain digest";

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// Keys only ever come on, so chains that begin alike share them: this one has the first `block_count`. The lock is
    /// held to add some, and to take hold of them, but not while they are looked at.
    keys: Arc<Mutex<Arc<Vec<BlockKey>>>>,
    block_count: usize,
    /// Hash input of the block being filled: parent key, then tokens.
    block: Vec<u8>,
    /// Length of `block` when it holds all its tokens.
    full_bytes: usize,
    /// Items that reach into blocks without a key, by start.
    images: Vec<Image>,
    /// Whether an item was ever declared.
    has_images: bool,
}

/// The longest block that a chain may have, in tokens; vLLM's are 16 to a few thousand.
pub const MAX_BLOCK_TOKENS: u32 = 1 << 20;

/// The keys of a chain, as a slice, as they were when it was asked for them.
#[derive(Clone, Debug)]
pub struct Keys {
    all: Arc<Vec<BlockKey>>,
    block_count: usize,
}

impl Deref for Keys {
    type Target = [BlockKey];

    fn deref(&self) -> &[BlockKey] {
        &self.all[..self.block_count]
    }
}

/// Locks even if a thread died while it had the lock: between statements the keys are valid.
fn lock(keys: &Mutex<Arc<Vec<BlockKey>>>) -> MutexGuard<'_, Arc<Vec<BlockKey>>> {
    keys.lock().unwrap_or_else(PoisonError::into_inner)
}

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
            keys: Arc::default(),
            block_count: 0,
            block,
            full_bytes,
            images: Vec::new(),
            has_images: false,
        }
    }

    /// A chain of its own with the first `block_count` blocks of this one, to be continued with other tokens.
    ///
    /// None where that is not known: for no blocks, for more than there are, and for a chain with multimodal items, which
    /// may reach over the cut.
    #[must_use]
    pub fn prefix(&self, block_count: usize) -> Option<Self> {
        if self.has_images {
            return None;
        }
        let last = self.keys().get(..block_count)?.last().copied()?;
        let mut block = Vec::with_capacity(self.full_bytes);
        block.extend_from_slice(last.as_bytes());
        Some(Self {
            block_tokens: self.block_tokens,
            keys: Arc::clone(&self.keys),
            block_count,
            block,
            full_bytes: self.full_bytes,
            images: Vec::new(),
            has_images: false,
        })
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
        self.has_images = true;
        Ok(())
    }

    /// Appends tokens and returns the number of full blocks so far.
    pub fn extend(&mut self, tokens: impl IntoIterator<Item = u32>) -> usize {
        let tokens = tokens.into_iter();
        // Room for what comes next, too: a prompt that grows by a block must not move all its keys.
        let blocks = tokens.size_hint().0 / self.block_tokens as usize;
        let room = |keys: &mut Vec<BlockKey>| {
            if keys.capacity() < keys.len() + blocks {
                keys.reserve(blocks + blocks / 4 + 16);
            }
        };
        let mut shared = Arc::clone(&self.keys);
        let mut guard = lock(&shared);
        if guard.len() > self.block_count {
            // Another chain has continued them already: this one goes on with a copy, which nobody else has.
            let mut own = Vec::with_capacity(self.block_count + self.block_count / 4 + 16);
            own.extend_from_slice(&guard[..self.block_count]);
            drop(guard);
            shared = Arc::new(Mutex::new(Arc::new(own)));
            self.keys = Arc::clone(&shared);
            guard = lock(&shared);
        }
        // A copy only if somebody looks at them right now.
        let keys = Arc::make_mut(&mut guard);
        room(keys);
        for token in tokens {
            self.block.extend_from_slice(&token.to_le_bytes());
            if self.block.len() == self.full_bytes {
                let key = self.close_block();
                keys.push(key);
                self.block_count += 1;
            }
        }
        self.block_count
    }

    /// The keys of all full blocks, from the start of the request.
    pub fn keys(&self) -> Keys {
        Keys {
            all: Arc::clone(&lock(&self.keys)),
            block_count: self.block_count,
        }
    }

    /// Names all tokens so far, those behind the last full block included, and what else decides their KV.
    pub fn digest(&self) -> BlockKey {
        let mut hasher = blake3::Hasher::new_derive_key(DIGEST_CONTEXT);
        hasher.update(&self.token_count().to_le_bytes());
        // The key of the last full block, or the root, and the tokens behind it.
        hasher.update(&self.block);
        self.hash_images(self.token_count(), |bytes| {
            hasher.update(bytes);
        });
        BlockKey(*hasher.finalize().as_bytes())
    }

    /// Number of full blocks.
    pub fn block_count(&self) -> usize {
        self.block_count
    }

    /// Number of tokens so far, those behind the last full block included.
    pub fn token_count(&self) -> u64 {
        self.block_count as u64 * self.block_tokens + (self.block.len() as u64 - 32) / 4
    }

    /// Tokens per block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens as u32
    }

    /// The key of the block that is full now.
    fn close_block(&mut self) -> BlockKey {
        let end_token = (self.block_count as u64 + 1) * self.block_tokens;
        // No lengths are needed before the items: the parent and the tokens have a fixed size under one root.
        let mut items = Vec::new();
        self.hash_images(end_token, |bytes| items.extend_from_slice(bytes));
        self.block.extend_from_slice(&items);
        let ended = self.images.iter().any(|image| image.end_token <= end_token);
        let key = BlockKey(*blake3::hash(&self.block).as_bytes());
        if ended {
            self.images.retain(|image| image.end_token > end_token);
        }
        self.block.clear();
        self.block.extend_from_slice(key.as_bytes());
        key
    }

    /// Hands on the items that reach into the tokens from the block being filled to `end_token`.
    fn hash_images(&self, end_token: u64, mut add: impl FnMut(&[u8])) {
        let first_token = self.block_count as u64 * self.block_tokens;
        let in_reach = self
            .images
            .iter()
            .take_while(|image| image.start_token < end_token);
        for image in in_reach {
            // An item that began in an earlier block starts at a negative place, so its middle differs from its head.
            let start = image.start_token as i64 - first_token as i64;
            add(&(image.identifier.len() as u64).to_le_bytes());
            add(image.identifier.as_bytes());
            add(&start.to_le_bytes());
            add(&(image.end_token - image.start_token).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests;
