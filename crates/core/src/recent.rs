//! Chains of recent prompts, so that a chat that grew costs the hashing of what is new.

use std::collections::BTreeMap;

use lru::LruCache;

use crate::chain::ChainRootId;

/// What the engine calls the last block of a prefix: a digest of the whole prefix, of which equal ones mean equal tokens
/// as surely as equal [`BlockKey`](crate::BlockKey)s do.
pub type PrefixDigest = [u8; 32];

/// Remembers the last chains by the engine's digest of their last block.
///
/// Good within one process: engines seed their digests. `V` is whatever stands for a chain.
#[derive(Debug)]
pub struct RecentChains<V> {
    limit_chains: usize,
    limit_blocks: usize,
    /// Blocks of all chains together.
    blocks: usize,
    chains: LruCache<(ChainRootId, PrefixDigest), (usize, V)>,
    /// How many chains have so many blocks: what has to be looked for, however many chains there are.
    lengths: BTreeMap<usize, usize>,
}

impl<V> RecentChains<V> {
    /// Remembers at most `limit_chains` chains with at most `limit_blocks` blocks together (32 bytes each).
    pub fn new(limit_chains: usize, limit_blocks: usize) -> Self {
        Self {
            limit_chains,
            limit_blocks,
            blocks: 0,
            chains: LruCache::unbounded(),
            lengths: BTreeMap::new(),
        }
    }

    /// The longest chain that a prompt of `prompt_blocks` full blocks begins with, and its blocks. `digest` gives the
    /// prompt's digest of block `n`, or None if it has none that may be trusted.
    pub fn longest(
        &mut self,
        root: ChainRootId,
        prompt_blocks: usize,
        mut digest: impl FnMut(usize) -> Option<PrefixDigest>,
    ) -> Option<(usize, &V)> {
        let place = self
            .lengths
            .range(..=prompt_blocks)
            .rev()
            .filter_map(|(&blocks, _)| Some((root, digest(blocks - 1)?)))
            .find(|place| self.chains.contains(place))?;
        self.chains.get(&place).map(|(blocks, chain)| (*blocks, chain))
    }

    /// Takes the chain of a whole prompt of `blocks` full blocks, the last of which the engine calls `digest`.
    pub fn remember(&mut self, root: ChainRootId, digest: PrefixDigest, blocks: usize, chain: V) {
        if blocks == 0 || blocks > self.limit_blocks {
            return;
        }
        if let Some((blocks, _)) = self.chains.put((root, digest), (blocks, chain)) {
            self.forget(blocks);
        }
        self.blocks += blocks;
        *self.lengths.entry(blocks).or_default() += 1;
        while self.chains.len() > self.limit_chains || self.blocks > self.limit_blocks {
            let Some((_, (blocks, _))) = self.chains.pop_lru() else {
                break;
            };
            self.forget(blocks);
        }
    }

    /// One chain of so many blocks is gone.
    fn forget(&mut self, blocks: usize) {
        self.blocks -= blocks;
        if let Some(count) = self.lengths.get_mut(&blocks) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&blocks);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::ChainRoot;

    fn root(block_tokens: u32) -> ChainRootId {
        ChainRoot::new(block_tokens).expect("an allowed size").id()
    }

    /// The digest of block `n` of prompt `name`.
    fn digest(name: u8, block: usize) -> PrefixDigest {
        let mut digest = [name; 32];
        digest[..8].copy_from_slice(&(block as u64).to_le_bytes());
        digest
    }

    fn remember(recent: &mut RecentChains<u8>, name: u8, blocks: usize) {
        recent.remember(root(16), digest(name, blocks - 1), blocks, name);
    }

    fn longest(recent: &mut RecentChains<u8>, name: u8, blocks: usize) -> Option<(usize, u8)> {
        let found = recent.longest(root(16), blocks, |block| Some(digest(name, block)));
        found.map(|(blocks, &name)| (blocks, name))
    }

    #[test]
    fn the_longest_chain_that_is_not_longer_than_the_prompt_is_found() {
        let mut recent = RecentChains::new(10, 100);
        for blocks in [2, 4, 9] {
            remember(&mut recent, b'a', blocks);
        }
        remember(&mut recent, b'b', 5);
        assert_eq!(longest(&mut recent, b'a', 1), None);
        assert_eq!(longest(&mut recent, b'a', 3), Some((2, b'a')));
        assert_eq!(longest(&mut recent, b'a', 8), Some((4, b'a')));
        assert_eq!(longest(&mut recent, b'a', 20), Some((9, b'a')));
        assert_eq!(longest(&mut recent, b'c', 20), None);
    }

    #[test]
    fn another_root_and_a_digest_that_is_not_trusted_find_nothing() {
        let mut recent = RecentChains::new(10, 100);
        remember(&mut recent, b'a', 4);
        let other = recent.longest(root(32), 4, |block| Some(digest(b'a', block)));
        assert_eq!(other, None);
        assert_eq!(recent.longest(root(16), 4, |_| None), None);
    }

    #[test]
    fn chains_and_their_blocks_have_a_bound_and_the_longest_unused_go_first() {
        let mut recent = RecentChains::new(3, 20);
        for (name, blocks) in [(b'a', 2), (b'b', 3), (b'c', 4)] {
            remember(&mut recent, name, blocks);
        }
        // Used, so the next one takes the place of another.
        assert_eq!(longest(&mut recent, b'a', 2), Some((2, b'a')));
        remember(&mut recent, b'd', 5);
        let found = [b'a', b'b', b'c', b'd'].map(|name| longest(&mut recent, name, 9).is_some());
        assert_eq!(found, [true, false, true, true]);
        // 16 blocks leave room for 4.
        remember(&mut recent, b'e', 16);
        let found = [b'a', b'c', b'd', b'e'].map(|name| longest(&mut recent, name, 16).is_some());
        assert_eq!(found, [false, false, false, true]);
        // More than all that may be kept: nothing else is given up for it.
        remember(&mut recent, b'f', 21);
        assert_eq!(longest(&mut recent, b'f', 21), None);
        assert_eq!(longest(&mut recent, b'e', 16), Some((16, b'e')));
        assert_eq!((recent.blocks, recent.lengths.len()), (16, 1));
    }

    #[test]
    fn a_chain_that_comes_again_is_counted_once() {
        let mut recent = RecentChains::new(10, 10);
        for _ in 0..100 {
            remember(&mut recent, b'a', 6);
        }
        remember(&mut recent, b'b', 4);
        assert_eq!(longest(&mut recent, b'a', 6), Some((6, b'a')));
        assert_eq!((recent.blocks, recent.lengths.len()), (10, 2));
    }
}
