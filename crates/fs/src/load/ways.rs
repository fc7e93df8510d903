//! The ways of a block's bytes into the paged cache.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use kvlane_core::{LoadOrder, MissReason};
use kvlane_cuda::{DeviceCache, Lease, Patience};

use super::LoadJob;
use crate::cache::gave_up;
use crate::cold::Bounce;
use crate::format::SlotRecord;
use crate::index::Found;
use crate::options::Medium;
use crate::raw::{HostCache, LayerCrc, Runs, copy_bytes, preadv_nowait, store_fence};
use crate::shared::Shared;

/// Bytes read in one call on the way through the page cache: small enough to be in the CPU's cache for the checksum.
const READ_BYTES: usize = 512 << 10;

/// Bytes of a mapping whose pages are looked for and touched before they are copied: some ten microseconds of copying.
const TOUCH_BYTES: usize = 256 << 10;

impl LoadJob {
    pub(super) fn copy_mapped(&self, cache: &HostCache, part: &Part<'_>) -> Result<(), MissReason> {
        self.enter(|| {
            let mapping = part.found.view.mapping();
            let mut offset = part.layer_offset(part.layers.start);
            let mut whole = true;
            for layer in part.layers.clone() {
                let bytes = part.shared.geometry.layer_bytes[layer] as usize;
                let source = mapping.source(offset as usize, bytes);
                let mut crc = part.crc(layer);
                cache.copy_layer_in(layer, part.block, source, crc.as_mut());
                whole &= part.matches(layer, crc);
                offset += bytes as u64;
            }
            store_fence();
            if whole { Ok(()) } else { Err(MissReason::Corrupt) }
        })
        .unwrap_or_else(|| Err(self.closing_reason()))
    }

    /// From the page cache where it has all the bytes and says so without waiting, through the bounce buffer where not:
    /// only what cannot block may know the address of the paged cache.
    pub(super) fn copy_read(
        &self,
        cache: &HostCache,
        part: &Part<'_>,
        bounce: &mut Bounce,
    ) -> Result<(), MissReason> {
        let medium = part.shared.directory.choice.medium;
        if medium != Medium::Disk {
            let direct = self
                .enter(|| self.read_resident(cache, part))
                .unwrap_or(Some(Err(self.closing_reason())));
            if let Some(result) = direct {
                return result;
            }
        }
        // Whole blocks of a disk have several readers, which keep the device busy; everything else needs the readahead.
        let has_readers = medium == Medium::Disk && self.request.order == LoadOrder::BlockMajor;
        let direct = has_readers
            .then(|| part.found.view.open_direct(part.found.slot))
            .flatten();
        if !has_readers && !self.readahead.swap(true, Ordering::Relaxed) {
            self.start_readahead(part.shared);
        }
        let sizes = &part.shared.geometry.layer_bytes;
        let bytes: u64 = sizes[part.layers.clone()].iter().sum();
        let offset = part.layer_offset(part.layers.start);
        let read = bounce.read(&part.found.view.file, direct.as_ref(), offset, bytes as usize);
        let bytes = read.map_err(|error| part.cannot_read(&error))?;
        self.enter(|| {
            let mut at = 0;
            let mut whole = true;
            for layer in part.layers.clone() {
                let layer_bytes = sizes[layer] as usize;
                let mut crc = part.crc(layer);
                cache.copy_layer_in(
                    layer,
                    part.block,
                    bytes[at..at + layer_bytes].into(),
                    crc.as_mut(),
                );
                whole &= part.matches(layer, crc);
                at += layer_bytes;
            }
            store_fence();
            if whole { Ok(()) } else { Err(MissReason::Corrupt) }
        })
        .unwrap_or_else(|| Err(self.closing_reason()))
    }

    /// From the mapping of a file on a disk.
    ///
    /// A page that is not there is read while the thread waits, which must not happen inside the gate: a disk that does
    /// not answer would hold the job beyond its deadline, and one that fails would end the process. So the pages of a few
    /// layers are looked for and touched outside, microseconds before they are copied: the kernel does not let go of a
    /// page that was used that recently. What is not there any more is read the other way.
    pub(super) fn copy_resident(
        &self,
        cache: &HostCache,
        part: &Part<'_>,
        bounce: &mut Bounce,
    ) -> Result<(), MissReason> {
        let mapping = part.found.view.mapping();
        let mut whole = true;
        let mut touched = part.layers.start;
        for layer in part.layers.clone() {
            let offset = part.layer_offset(layer) as usize;
            if layer == touched {
                let mut end = offset;
                while touched < part.layers.end && (touched == layer || end - offset < TOUCH_BYTES) {
                    touched += 1;
                    end = part.layer_offset(touched) as usize;
                }
                if !mapping.is_resident(offset..end) {
                    let rest = Part {
                        layers: layer..part.layers.end,
                        ..*part
                    };
                    self.copy_read(cache, &rest, bounce)?;
                    break;
                }
                mapping.touch(offset..end);
            }
            let mut crc = part.crc(layer);
            let copied = self.enter(|| {
                let bytes = part.shared.geometry.layer_bytes[layer] as usize;
                cache.copy_layer_in(layer, part.block, mapping.source(offset, bytes), crc.as_mut());
                store_fence();
            });
            if copied.is_none() {
                return Err(self.closing_reason());
            }
            whole &= part.matches(layer, crc);
        }
        if whole { Ok(()) } else { Err(MissReason::Corrupt) }
    }

    /// `None`: not all of it is resident.
    fn read_resident(&self, cache: &HostCache, part: &Part<'_>) -> Option<Result<(), MissReason>> {
        let mut layer = part.layers.start;
        let mut whole = true;
        while layer < part.layers.end {
            let mut runs = Runs::new();
            let first = layer;
            while layer < part.layers.end && (layer == first || runs.len_bytes() < READ_BYTES) {
                runs.push_layer(cache, layer, part.block);
                layer += 1;
            }
            match preadv_nowait(&part.found.view.file, part.layer_offset(first), &runs) {
                Ok(read) if read == runs.len_bytes() => {}
                // Not resident, or a file system that does not know the flag.
                Ok(_) | Err(_) => return None,
            }
            for layer in first..layer {
                let mut crc = part.crc(layer);
                if let Some(crc) = &mut crc {
                    cache.checksum_layer(layer, part.block, crc);
                }
                whole &= part.matches(layer, crc);
            }
        }
        Some(if whole { Ok(()) } else { Err(MissReason::Corrupt) })
    }

    /// To a device: into pinned memory with the checksum, and on to the cache only if the bytes are right. Until then
    /// nobody has an address of the cache, so a file system that blocks cannot hold up the deadline.
    pub(super) fn copy_staged(&self, cache: &DeviceCache, part: &Part<'_>) -> Result<(), MissReason> {
        let cancelled = || self.gate.is_closed();
        let patience = Patience {
            deadline: self.request.deadline,
            cancelled: &cancelled,
        };
        let missed = |error| {
            if gave_up(&error) {
                // The other blocks are late too.
                self.close(MissReason::TimedOut);
                return self.closing_reason();
            }
            tracing::warn!(%error, "cannot copy a block to the device");
            MissReason::Io
        };
        let mut staging = cache.staging(&patience).map_err(missed)?;
        if !part.shared.directory.mapped_payload() && !self.readahead.swap(true, Ordering::Relaxed) {
            self.start_readahead(part.shared);
        }
        part.stage(&mut staging)?;
        if part.found.view.sequence(part.found.slot) != part.found.sequence {
            return Err(MissReason::Recycled);
        }
        let layers: Vec<usize> = part.layers.clone().collect();
        let after = self.after.as_ref();
        self.enter(|| cache.copy_block_in(part.block, &layers, staging, after, &patience))
            .map_or_else(|| Err(self.closing_reason()), |copied| copied.map_err(missed))
    }

    /// Asks the kernel for all slots of the job at once, so that the device sees a deep queue.
    fn start_readahead(&self, shared: &Shared) {
        for found in self.found.iter().filter_map(OnceLock::get) {
            let offset = found.view.header.slot_offset(found.slot);
            let length = std::num::NonZeroU64::new(shared.geometry.slot_bytes);
            let _ = rustix::fs::fadvise(&found.view.file, offset, length, rustix::fs::Advice::WillNeed);
        }
    }
}

impl Found {
    fn layer_offset(&self, shared: &Shared, layer: usize) -> u64 {
        let before: u64 = shared.geometry.layer_bytes[..layer].iter().sum();
        self.view.header.slot_offset(self.slot) + before
    }

    /// Whether all bytes of `layers` are in the page cache now.
    pub(super) fn is_resident(&self, shared: &Shared, layers: &Range<usize>) -> bool {
        let (start, end) = (
            self.layer_offset(shared, layers.start),
            self.layer_offset(shared, layers.end),
        );
        // A slot of another geometry is refused later; until then its bounds are not to be trusted.
        let mapping = self.view.mapping();
        end <= mapping.len() as u64 && mapping.is_resident(start as usize..end as usize)
    }
}

/// Some layers of one block of a load.
pub(super) struct Part<'a> {
    pub(super) shared: &'a Shared,
    pub(super) found: &'a Found,
    pub(super) record: &'a SlotRecord,
    pub(super) block: u32,
    pub(super) layers: Range<usize>,
}

impl Part<'_> {
    fn layer_offset(&self, layer: usize) -> u64 {
        self.found.layer_offset(self.shared, layer)
    }

    /// The checksum of a layer, if it is to be checked. After a crash of the system a record may be there without its
    /// payload, so what was written before the last boot always is.
    fn crc(&self, layer: usize) -> Option<LayerCrc> {
        let is_from_before = !self
            .shared
            .directory
            .host
            .made_since_boot(&self.found.view.header);
        (self.shared.verify || is_from_before).then(|| LayerCrc::new(&self.record.key.0, layer as u32))
    }

    /// Brings the part's bytes to the start of `staging` and checks them there.
    fn stage(&self, staging: &mut Lease) -> Result<(), MissReason> {
        let sizes = &self.shared.geometry.layer_bytes[self.layers.clone()];
        let offset = self.layer_offset(self.layers.start);
        let mapped = self.shared.directory.mapped_payload();
        if !mapped {
            let whole = sizes.iter().sum::<u64>() as usize;
            let read = self.found.view.file.read_exact_at(&mut staging[..whole], offset);
            read.map_err(|error| self.cannot_read(&error))?;
        }
        let mut at = 0;
        let mut whole = true;
        for (layer, &bytes) in self.layers.clone().zip(sizes) {
            let place = &mut staging[at..at + bytes as usize];
            let mut crc = self.crc(layer);
            if mapped {
                let source = self
                    .found
                    .view
                    .mapping()
                    .source(offset as usize + at, place.len());
                copy_bytes(source, place.into(), crc.as_mut());
            } else if let Some(crc) = &mut crc {
                crc.update(place);
            }
            whole &= self.matches(layer, crc);
            at += bytes as usize;
        }
        store_fence();
        if whole { Ok(()) } else { Err(MissReason::Corrupt) }
    }

    fn cannot_read(&self, error: &std::io::Error) -> MissReason {
        tracing::warn!(path = %self.found.view.path.display(), %error, "cannot read a block");
        // The device has lost these bytes. Any other error says something about this process or machine.
        if error.raw_os_error() == Some(libc::EIO) {
            self.shared.condemn(self.found);
        }
        MissReason::Io
    }

    fn matches(&self, layer: usize, crc: Option<LayerCrc>) -> bool {
        crc.is_none_or(|crc| crc.value() == self.record.layer_crcs[layer])
    }
}
