//! What a peer may read in this process besides blocks: which leases are held, and that it is this process.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Slots in a page.
const PAGE_SLOTS: usize = 512;

/// A page, so that the table shares none with anything else.
#[repr(align(4096))]
struct Page([AtomicU64; PAGE_SLOTS]);

/// The epochs of the leases of this process, one slot each, at addresses that do not change: slot `s` is the eight
/// bytes (little-endian on every machine that kvlane runs on) at `address() + 8 * s`. Zero: no lease.
pub struct EpochTable {
    pages: Box<[Page]>,
    slot_count: u32,
}

impl EpochTable {
    /// A table without leases.
    pub fn new(slot_count: u32) -> Self {
        let pages = (slot_count as usize).div_ceil(PAGE_SLOTS).max(1);
        Self {
            pages: (0..pages)
                .map(|_| Page([const { AtomicU64::new(0) }; PAGE_SLOTS]))
                .collect(),
            slot_count,
        }
    }

    /// Gives a slot another epoch. When this returns, whoever copies bytes that are written afterwards sees the new epoch
    /// when it checks.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn set(&self, slot: u32, epoch: u64) {
        self.slot(slot).store(epoch, Ordering::SeqCst);
        // The store must be seen before any write behind this call, by plain stores of others threads too.
        fence(Ordering::SeqCst);
    }

    /// The epoch of a slot.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn get(&self, slot: u32) -> u64 {
        // What was copied before this call must have been read before the slot is.
        fence(Ordering::SeqCst);
        self.slot(slot).load(Ordering::SeqCst)
    }

    /// Number of slots.
    pub fn slot_count(&self) -> u32 {
        self.slot_count
    }

    /// Where the table lies in this process.
    pub fn address(&self) -> u64 {
        self.pages.as_ptr().expose_provenance() as u64
    }

    fn slot(&self, slot: u32) -> &AtomicU64 {
        assert!(slot < self.slot_count, "slot {slot} of {}", self.slot_count);
        let slot = slot as usize;
        &self.pages[slot / PAGE_SLOTS].0[slot % PAGE_SLOTS]
    }
}

impl Drop for EpochTable {
    /// A peer that reads freed memory finds no lease in it, unless others have written it, which the token shows.
    fn drop(&mut self) {
        for page in &self.pages {
            page.0.iter().for_each(|slot| slot.store(0, Ordering::SeqCst));
        }
    }
}

impl std::fmt::Debug for EpochTable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("EpochTable")
            .field("slot_count", &self.slot_count)
            .finish_non_exhaustive()
    }
}

/// Sixteen random bytes at an address of this process. A peer that finds them there reads the process that it talks to.
pub struct ProbeToken {
    words: Box<[AtomicU64; 2]>,
    bytes: [u8; 16],
}

impl ProbeToken {
    /// A new token.
    pub fn new() -> io::Result<Self> {
        let mut bytes = [0; 16];
        let mut done = 0;
        while done < bytes.len() {
            done += rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty())?;
        }
        let (first, second) = bytes.split_at(8);
        let word = |half: &[u8]| AtomicU64::new(u64::from_ne_bytes(half.try_into().expect("eight bytes")));
        Ok(Self {
            words: Box::new([word(first), word(second)]),
            bytes,
        })
    }

    /// The bytes, for the peer alone.
    pub fn bytes(&self) -> [u8; 16] {
        self.bytes
    }

    /// Where they lie in this process.
    pub fn address(&self) -> u64 {
        self.words.as_ptr().expose_provenance() as u64
    }
}

impl Drop for ProbeToken {
    /// A peer that reads freed memory does not find the token in it.
    fn drop(&mut self) {
        self.words.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }
}

impl std::fmt::Debug for ProbeToken {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the bytes: they are as good as a key while the connection lives.
        formatter.debug_struct("ProbeToken").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_lie_behind_each_other_from_the_start_of_a_page() {
        let table = EpochTable::new(1000);
        assert_eq!(table.address() % 4096, 0);
        assert_eq!(table.slot_count(), 1000);
        for slot in 0..1000 {
            assert_eq!(table.get(slot), 0);
            table.set(slot, u64::from(slot) + 7);
            let address = table.slot(slot).as_ptr().addr() as u64;
            assert_eq!(address, table.address() + 8 * u64::from(slot));
        }
        assert!((0..1000).all(|slot| table.get(slot) == u64::from(slot) + 7));
    }

    #[test]
    #[should_panic(expected = "slot 3 of 3")]
    fn a_slot_beyond_the_last_does_not_exist() {
        EpochTable::new(3).get(3);
    }

    #[test]
    fn tokens_differ_and_are_not_printed() {
        let (one, other) = (ProbeToken::new().unwrap(), ProbeToken::new().unwrap());
        assert_ne!(one.bytes(), other.bytes());
        assert_ne!(one.address(), other.address());
        assert_eq!(format!("{one:?}"), "ProbeToken { .. }");
    }
}
