//! Which ranges of this process are memory of a device, mapped memory of another process, or pinned.

use std::collections::{BTreeMap, HashMap};

use crate::raw::SharedFile;
use crate::streams::Part;

/// What a range is.
#[derive(Debug)]
pub(crate) enum Kind {
    /// Allocated here, in a file that other processes can open.
    Device(SharedFile),
    /// A handle that was opened so often.
    Mapped { handle: Handle, opens: usize },
    /// Memory of the host.
    Pinned,
}

#[derive(Debug)]
pub(crate) struct Range {
    pub(crate) len: usize,
    pub(crate) kind: Kind,
}

/// What an allocation is called in other processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Handle {
    pub(crate) pid: u32,
    /// Descriptor of the file in that process, and the file's number, which tells whether it still is that file.
    pub(crate) descriptor: u32,
    pub(crate) inode: u64,
    pub(crate) len: u64,
}

const MAGIC: [u8; 8] = *b"kvStndIn";

impl Handle {
    pub(crate) fn encode(self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.pid.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.descriptor.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.inode.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; 64]) -> Option<Self> {
        let word =
            |start: usize| u64::from_le_bytes(bytes[start..start + 8].try_into().expect("eight bytes"));
        (bytes[..8] == MAGIC).then(|| Self {
            pid: word(8) as u32,
            descriptor: (word(8) >> 32) as u32,
            inode: word(16),
            len: word(24),
        })
    }
}

/// Every range that a call may name. Ranges that were given back stay mapped, so that a late copy is noticed and not
/// fatal.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    live: BTreeMap<usize, Range>,
    opened: HashMap<Handle, usize>,
    gone: Vec<(usize, usize, &'static str)>,
}

impl Memory {
    pub(crate) fn add(&mut self, start: usize, range: Range) {
        if let Kind::Mapped { handle, .. } = &range.kind {
            self.opened.insert(*handle, start);
        }
        self.live.insert(start, range);
    }

    /// A handle that is open already is opened once more.
    pub(crate) fn reopen(&mut self, handle: Handle) -> Option<usize> {
        let start = *self.opened.get(&handle)?;
        if let Some(Range {
            kind: Kind::Mapped { opens, .. },
            ..
        }) = self.live.get_mut(&start)
        {
            *opens += 1;
        }
        Some(start)
    }

    /// Gives a handle back once; `None`: there is none at this address.
    pub(crate) fn close(&mut self, start: usize) -> Option<()> {
        let range = self.live.get_mut(&start)?;
        let Kind::Mapped { handle, opens } = &mut range.kind else {
            return None;
        };
        *opens -= 1;
        if *opens == 0 {
            let (handle, len) = (*handle, range.len);
            self.opened.remove(&handle);
            self.live.remove(&start);
            self.gone.push((start, len, "a mapping that was closed"));
        }
        Some(())
    }

    /// Frees what starts there; `None`: nothing that can be freed does.
    pub(crate) fn free(&mut self, start: usize, pinned: bool) -> Option<usize> {
        let fits = match self.live.get(&start)?.kind {
            Kind::Device(_) => !pinned,
            Kind::Pinned => pinned,
            Kind::Mapped { .. } => false,
        };
        if !fits {
            return None;
        }
        let range = self.live.remove(&start)?;
        self.gone.push((start, range.len, "memory that was freed"));
        Some(range.len)
    }

    /// The range that has an address.
    pub(crate) fn around(&self, address: usize) -> Option<(usize, &Range)> {
        let (&start, range) = self.live.range(..=address).next_back()?;
        (address < start + range.len).then_some((start, range))
    }

    /// Whether an address is memory of the host.
    pub(crate) fn is_pinned(&self, address: usize) -> bool {
        matches!(self.around(address), Some((_, range)) if matches!(range.kind, Kind::Pinned))
    }

    /// As [`check`](Self::check), for both ends of a copy.
    pub(crate) fn check_part(&self, part: &Part) -> Result<(), String> {
        self.check(part.from, part.len, part.from_pinned)?;
        self.check(part.to, part.len, part.to_pinned)
    }

    /// Says what is wrong with `len` bytes at an address, where `pinned` memory or device memory should be.
    pub(crate) fn check(&self, address: usize, len: usize, pinned: bool) -> Result<(), String> {
        let wanted = if pinned { "pinned memory" } else { "device memory" };
        match self.around(address) {
            Some((start, range)) if address + len <= start + range.len => {
                if matches!(range.kind, Kind::Pinned) == pinned {
                    return Ok(());
                }
                Err(format!("{len} bytes at {address:#x} are no {wanted}"))
            }
            Some((start, range)) => Err(format!(
                "{len} bytes at {address:#x} reach beyond the {} at {start:#x}",
                range.len
            )),
            None => {
                let gone =
                    |(start, bytes, _): &&(usize, usize, _)| (*start..start + bytes).contains(&address);
                let what = self
                    .gone
                    .iter()
                    .rev()
                    .find(gone)
                    .map_or("no memory", |gone| gone.2);
                Err(format!("{len} bytes at {address:#x} are {what}, not {wanted}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pinned(memory: &mut Memory, start: usize, len: usize) {
        let kind = Kind::Pinned;
        memory.add(start, Range { len, kind });
    }

    #[test]
    fn only_whole_ranges_of_the_right_kind_are_memory() {
        let mut memory = Memory::default();
        pinned(&mut memory, 0x1000, 0x100);
        assert_eq!(memory.check(0x1000, 0x100, true), Ok(()));
        assert_eq!(memory.check(0x10ff, 1, true), Ok(()));
        for (address, len, is_pinned, told) in [
            (0x1001, 0x100, true, "beyond"),
            (0x1000, 1, false, "no device memory"),
            (0xfff, 1, true, "are no memory"),
            (0x1100, 1, true, "are no memory"),
        ] {
            let error = memory.check(address, len, is_pinned).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
        assert_eq!(memory.free(0x1000, false), None);
        assert_eq!(memory.free(0x1000, true), Some(0x100));
        assert!(memory.check(0x1000, 1, true).unwrap_err().contains("was freed"));
    }

    #[test]
    fn a_handle_is_mapped_once_and_closed_as_often_as_it_was_opened() {
        let mut memory = Memory::default();
        let handle = Handle {
            pid: 7,
            descriptor: 3,
            inode: 99,
            len: 64,
        };
        assert_eq!(Handle::decode(&handle.encode()), Some(handle));
        assert_eq!(Handle::decode(&[0; 64]), None);
        let kind = Kind::Mapped { handle, opens: 1 };
        memory.add(0x1000, Range { len: 64, kind });
        assert_eq!(memory.reopen(handle), Some(0x1000));
        assert_eq!(memory.close(0x1000), Some(()));
        assert_eq!(memory.check(0x1000, 64, false), Ok(()));
        assert_eq!(memory.close(0x1000), Some(()));
        let error = memory.check(0x1000, 64, false).unwrap_err();
        assert!(error.contains("a mapping that was closed"), "{error}");
        assert_eq!(memory.close(0x1000), None);
        assert_eq!(memory.reopen(handle), None);
    }
}
