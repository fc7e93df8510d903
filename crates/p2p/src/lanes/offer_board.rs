//! Prompts that are computed whole, posted where a peer that reads this process' memory finds them without asking.
//!
//! A peer asks, waits until this process has run and answered, and only then knows which blocks to read. Where it can
//! read this process' memory, it can as well look itself. What it finds is no promise: it names a lease, and bytes
//! that are copied by it count as all others do, if the lease is held after the last one.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::Lease;
use crate::key::{Prompt, TransferKey};

/// Most blocks of a prompt that is posted. Copying more takes so long that asking first costs nothing.
pub const POSTED_BLOCKS_MAX: usize = 512;
/// Words in front of the block numbers: check (2), key (4), digest (4), slot and count, epoch.
const HEAD_WORDS: usize = 12;
const ENTRY_WORDS: usize = HEAD_WORDS + POSTED_BLOCKS_MAX / 2;
/// Size of an entry.
pub(super) const ENTRY_BYTES: usize = 8 * ENTRY_WORDS;

/// The blocks of a prompt, and the lease under which they are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostedPrompt {
    /// What must be held after the last byte was copied.
    pub lease: Lease,
    /// Blocks of the peer's cache, from the prompt's first one on.
    pub blocks: Vec<u32>,
}

#[repr(align(64))]
struct Entry([AtomicU64; ENTRY_WORDS]);

/// A process' posted prompts. A key has one entry that it may be in; the prompt that was posted there last is.
///
/// One thread posts at a time; peers read meanwhile, with no order between words. So an entry begins with a hash of the
/// rest: a mixture of two is none.
pub struct OfferBoard {
    entries: Box<[Entry]>,
}

impl OfferBoard {
    /// A board with so many entries, all empty.
    pub fn new(entry_count: u32) -> Self {
        let empty = || Entry([const { AtomicU64::new(0) }; ENTRY_WORDS]);
        Self {
            entries: (0..entry_count).map(|_| empty()).collect(),
        }
    }

    /// Posts a prompt; one with too many blocks is left out.
    pub fn post(&self, key: &TransferKey, prompt: &Prompt, posted: &PostedPrompt) {
        let key = key_hash(key);
        let Some(entry) = place(&key, self.entry_count()).map(|place| &self.entries[place]) else {
            return;
        };
        if posted.blocks.len() > POSTED_BLOCKS_MAX {
            return;
        }
        let words = words(&key, prompt, posted);
        // The blocks were written before; whoever finds the entry must find them.
        fence(Ordering::SeqCst);
        for (slot, word) in entry.0.iter().zip(words) {
            slot.store(word, Ordering::Release);
        }
    }

    /// The prompt, for a thread of this process that knows the hash of its key.
    pub fn find(&self, key: &[u8; 32], digest: &[u8; 32]) -> Option<PostedPrompt> {
        let entry = &self.entries[place(key, self.entry_count())?];
        let mut bytes = [0; ENTRY_BYTES];
        for (bytes, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(&entry.0) {
            *bytes = word.load(Ordering::Acquire).to_ne_bytes();
        }
        // The blocks are read behind the entry that names them.
        fence(Ordering::SeqCst);
        parse_hashed(&bytes, key, digest)
    }

    /// Number of entries.
    pub fn entry_count(&self) -> u32 {
        self.entries.len() as u32
    }

    /// Where the board lies in this process.
    pub fn address(&self) -> u64 {
        self.entries.as_ptr().expose_provenance() as u64
    }
}

impl Drop for OfferBoard {
    /// A peer that reads freed memory finds nothing in it.
    fn drop(&mut self) {
        for entry in &self.entries {
            entry.0[0].store(0, Ordering::SeqCst);
        }
    }
}

impl std::fmt::Debug for OfferBoard {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("OfferBoard")
            .field("entry_count", &self.entry_count())
            .finish_non_exhaustive()
    }
}

/// Offset in a board of the entry that a key may be in. `None`: the board has no entries.
pub(super) fn entry_offset(key: &TransferKey, entry_count: u32) -> Option<u64> {
    place(&key_hash(key), entry_count).map(|place| (place * size_of::<Entry>()) as u64)
}

/// Distance between two entries.
pub(super) fn entry_stride_bytes() -> u64 {
    size_of::<Entry>() as u64
}

/// What an entry that was read says of a prompt. `None`: it is empty, of something else, or was being written.
pub(super) fn parse(bytes: &[u8; ENTRY_BYTES], key: &TransferKey, prompt: &Prompt) -> Option<PostedPrompt> {
    parse_hashed(bytes, &key_hash(key), &prompt.digest)
}

fn parse_hashed(bytes: &[u8; ENTRY_BYTES], key: &[u8; 32], digest: &[u8; 32]) -> Option<PostedPrompt> {
    let (words, _) = bytes.as_chunks::<8>();
    let word = |index: usize| u64::from_ne_bytes(words[index]);
    let (slot, count) = (word(10) as u32, (word(10) >> 32) as usize);
    if count > POSTED_BLOCKS_MAX {
        return None;
    }
    let rest = &bytes[16..8 * used_words(count)];
    let is_whole = bytes[..16] == blake3::hash(rest).as_bytes()[..16];
    let is_it = bytes[16..48] == *key && bytes[48..80] == *digest;
    if !is_whole || !is_it {
        return None;
    }
    let block = |index: usize| (word(HEAD_WORDS + index / 2) >> (32 * (index % 2))) as u32;
    Some(PostedPrompt {
        lease: Lease {
            slot,
            epoch: word(11),
        },
        blocks: (0..count).map(block).collect(),
    })
}

fn words(key: &[u8; 32], prompt: &Prompt, posted: &PostedPrompt) -> [u64; ENTRY_WORDS] {
    let mut words = [0; ENTRY_WORDS];
    let texts = [key, &prompt.digest].into_iter();
    let texts = texts.flat_map(|text| text.as_chunks::<8>().0);
    for (word, bytes) in words[2..10].iter_mut().zip(texts) {
        *word = u64::from_ne_bytes(*bytes);
    }
    words[10] = u64::from(posted.lease.slot) | (posted.blocks.len() as u64) << 32;
    words[11] = posted.lease.epoch;
    for (index, &block) in posted.blocks.iter().enumerate() {
        words[HEAD_WORDS + index / 2] |= u64::from(block) << (32 * (index % 2));
    }
    let rest = &words[2..used_words(posted.blocks.len())];
    let check = blake3::hash(bytemuck::cast_slice(rest));
    let check = check.as_bytes().as_chunks::<8>().0;
    words[0] = u64::from_ne_bytes(check[0]);
    words[1] = u64::from_ne_bytes(check[1]);
    words
}

fn used_words(blocks: usize) -> usize {
    HEAD_WORDS + blocks.div_ceil(2)
}

pub(super) fn key_hash(key: &TransferKey) -> [u8; 32] {
    *blake3::hash(key.as_str().as_bytes()).as_bytes()
}

fn place(key_hash: &[u8; 32], entry_count: u32) -> Option<usize> {
    let [first, ..] = key_hash.as_chunks::<4>().0 else {
        return None;
    };
    u32::from_le_bytes(*first)
        .checked_rem(entry_count)
        .map(|place| place as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRIES: u32 = 7;

    fn key(text: &str) -> TransferKey {
        TransferKey::new(text).unwrap()
    }

    fn prompt(digest: u8) -> Prompt {
        Prompt {
            tokens: 100,
            digest: [digest; 32],
        }
    }

    fn posted(slot: u32, epoch: u64, blocks: std::ops::Range<u32>) -> PostedPrompt {
        PostedPrompt {
            lease: Lease { slot, epoch },
            blocks: blocks.collect(),
        }
    }

    /// What a peer would read.
    fn entry(board: &OfferBoard, key: &TransferKey) -> [u8; ENTRY_BYTES] {
        let offset = entry_offset(key, board.entry_count()).unwrap();
        let entry = &board.entries[(offset / entry_stride_bytes()) as usize];
        let mut bytes = [0; ENTRY_BYTES];
        for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(&entry.0) {
            *to = word.load(Ordering::Relaxed).to_ne_bytes();
        }
        bytes
    }

    fn find(board: &OfferBoard, text: &str, digest: u8) -> Option<PostedPrompt> {
        parse(&entry(board, &key(text)), &key(text), &prompt(digest))
    }

    #[test]
    fn a_posted_prompt_is_found_by_its_key_and_digest_only() {
        let board = OfferBoard::new(ENTRIES);
        assert_eq!(find(&board, "a", 1), None);
        for (epoch, blocks) in [
            (1, 0..1),
            (2, 5..7),
            (u64::MAX, 4_000_000_000..4_000_000_003),
            (4, 0..512),
        ] {
            let wanted = posted(3, epoch, blocks);
            board.post(&key("a"), &prompt(1), &wanted);
            assert_eq!(find(&board, "a", 1), Some(wanted));
            assert_eq!(find(&board, "a", 2), None);
            assert_eq!(find(&board, "b", 1), None);
        }
    }

    #[test]
    fn a_prompt_with_too_many_blocks_is_not_posted() {
        let board = OfferBoard::new(ENTRIES);
        board.post(&key("a"), &prompt(1), &posted(3, 1, 0..513));
        assert_eq!(find(&board, "a", 1), None);
        OfferBoard::new(0).post(&key("a"), &prompt(1), &posted(3, 1, 0..1));
    }

    #[test]
    fn the_last_one_in_a_place_is_found_and_the_others_are_not() {
        let board = OfferBoard::new(1);
        board.post(&key("a"), &prompt(1), &posted(3, 1, 0..9));
        board.post(&key("b"), &prompt(2), &posted(4, 7, 0..3));
        assert_eq!(find(&board, "a", 1), None);
        assert_eq!(find(&board, "b", 2), Some(posted(4, 7, 0..3)));
    }

    #[test]
    fn no_mixture_of_two_entries_is_taken_for_one() {
        let board = OfferBoard::new(1);
        let (one, other) = (posted(3, 1, 0..40), posted(3, 2, 100..140));
        board.post(&key("a"), &prompt(1), &one);
        let first = entry(&board, &key("a"));
        board.post(&key("a"), &prompt(1), &other);
        let second = entry(&board, &key("a"));
        for word in 0..ENTRY_WORDS {
            let mut mixed = first;
            mixed[8 * word..].copy_from_slice(&second[8 * word..]);
            let found = parse(&mixed, &key("a"), &prompt(1));
            assert!(
                found.is_none() || found.as_ref() == Some(&one) || found.as_ref() == Some(&other),
                "split at word {word}: {found:?}"
            );
            let mut changed = first;
            changed[8 * word] ^= 1;
            let found = parse(&changed, &key("a"), &prompt(1));
            assert_eq!(found.is_some(), word >= used_words(40), "word {word}");
        }
    }
}
