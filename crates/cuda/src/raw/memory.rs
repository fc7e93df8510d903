//! The regions of a cache on a device, and copies between them and staging buffers.

use std::any::Any;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvlane_core::BlockMap;

use super::device::{Device, Direction, Event, LAUNCHED_WITH_HOST_MIN, Staging};
use super::driver::Driver;
use super::kernel::PieceList;
use super::peer::PeerMapping;
use crate::error::{CudaError, Result};
use crate::spans::{RunPart, Span, merge, part_bytes, spans};

/// KV tensors on a device that belong to the embedding program.
pub struct DeviceTensors {
    map: BlockMap,
    owner: Arc<dyn Any + Send + Sync>,
    driver: fn() -> Result<&'static Driver>,
}

impl DeviceTensors {
    /// Takes tensors by what `map` says of them.
    ///
    /// # Safety
    /// All blocks of all regions of `map` are memory of the CUDA device that the map names, in its primary context, valid
    /// while `owner` lives.
    ///
    /// A program that wants to get back what it stored does not write a block before its store has completed.
    pub unsafe fn from_map(map: BlockMap, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self {
            map,
            owner,
            driver: Driver::installed,
        }
    }

    /// The same tensors, reached through another driver.
    #[cfg(feature = "stand-in")]
    pub(super) fn with_driver(mut self, driver: fn() -> Result<&'static Driver>) -> Self {
        self.driver = driver;
        self
    }

    /// The one device that all regions are on.
    fn ordinal(&self) -> Result<u32> {
        let mut found = None;
        for region in self.map.regions() {
            match (region.device, found) {
                (kvlane_core::Device::Cuda(ordinal), None) => found = Some(ordinal),
                (kvlane_core::Device::Cuda(ordinal), Some(first)) if ordinal == first => {}
                (other, _) => {
                    return Err(CudaError::NotOneDevice {
                        layer: region.names.first().cloned().unwrap_or_default(),
                        found: format!("{other:?}"),
                    });
                }
            }
        }
        // A map has at least one region.
        found.ok_or(CudaError::NoSuchDevice { ordinal: 0, count: 0 })
    }
}

impl std::fmt::Debug for DeviceTensors {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("DeviceTensors")
            .field("regions", &self.map.regions().len())
            .finish_non_exhaustive()
    }
}

/// Lists for copies between devices; beside those each staging buffer may need one.
const LISTS_BETWEEN_DEVICES: usize = 4;

/// Device memory by raw addresses, and the device.
pub(crate) struct DeviceMemory {
    device: Arc<Device>,
    map: BlockMap,
    /// Lists that no launch is using.
    lists: Mutex<Vec<PieceList>>,
    /// Keeps the memory valid.
    _owner: Arc<dyn Any + Send + Sync>,
}

impl DeviceMemory {
    /// Copies of so many staging buffers may be on their way at once. Lists for them are pinned now, since that stalls the
    /// device.
    pub(crate) fn open(tensors: DeviceTensors, buffer_count: usize) -> Result<Arc<Self>> {
        let ordinal = tensors.ordinal()?;
        let device = Device::open((tensors.driver)()?, ordinal)?;
        let memory = Arc::new(Self {
            device,
            map: tensors.map,
            lists: Mutex::default(),
            _owner: tensors.owner,
        });
        let lists = (0..buffer_count + LISTS_BETWEEN_DEVICES).map_while(|_| memory.take_list());
        let lists: Vec<PieceList> = lists.collect();
        lists.into_iter().for_each(|list| memory.give_list(list));
        Ok(memory)
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn map(&self) -> &BlockMap {
        &self.map
    }

    /// A list for one launch, if there are launches. Who has no use for it any more [gives it back](Self::give_list).
    pub(super) fn take_list(&self) -> Option<PieceList> {
        if !self.device.takes_lists() {
            return None;
        }
        let free = self.lists().pop();
        free.or_else(|| {
            let new = PieceList::for_window(&self.device);
            new.inspect_err(|error| tracing::warn!(%error, "no list for copies of many pieces at once"))
                .ok()
        })
    }

    /// Takes a list back that no launch is using.
    pub(super) fn give_list(&self, list: PieceList) {
        self.lists().push(list);
    }

    fn lists(&self) -> MutexGuard<'_, Vec<PieceList>> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts copying one block of `layers`, which lie one after the other in the buffer.
    ///
    /// # Panics
    /// If the map has no such block or layer, or the buffer is too small.
    pub(crate) fn start(
        self: &Arc<Self>,
        direction: Direction,
        block: u32,
        layers: &[usize],
        staging: Staging,
    ) -> Progress {
        let needed = part_bytes(&self.map, layers);
        assert!(
            staging.len() >= needed,
            "{needed} bytes do not fit a buffer of {}",
            staging.len()
        );
        // SAFETY: the map vouches for every run of its blocks lying inside its region, and `from_map` for the regions.
        unsafe { self.start_spans(direction, spans(&self.map, block, layers), staging, None) }
    }

    /// Starts copying parts of runs, which lie one after the other in the buffer.
    ///
    /// # Panics
    /// If the map has no such parts, or the buffer is too small.
    pub(crate) fn start_parts(
        self: &Arc<Self>,
        direction: Direction,
        parts: &[RunPart],
        staging: Staging,
    ) -> Progress {
        let runs = parts.iter().map(|part| (self.address(part), part.len_bytes));
        // SAFETY: `address` has found every part inside of a run of a block, of which the map says that it lies inside of
        // its region, and `from_map` vouches for the regions.
        unsafe { self.start_spans(direction, merge(runs), staging, None) }
    }

    /// Where a part of a run lies.
    ///
    /// # Panics
    /// If the map has no such part.
    pub(super) fn address(&self, part: &RunPart) -> u64 {
        let region = &self.map.regions()[part.layer];
        let run = &region.runs[part.run];
        let is_inside = part
            .offset_bytes
            .checked_add(part.len_bytes)
            .is_some_and(|end| end <= run.len_bytes);
        assert!(
            is_inside,
            "{} bytes at {} of a run of {} bytes",
            part.len_bytes, part.offset_bytes, run.len_bytes
        );
        let offset_bytes = region.block_offset_bytes(part.block) + run.offset_bytes + part.offset_bytes;
        region.address + offset_bytes as u64
    }

    /// Starts copies between the device and a buffer. `peer` is kept until they have ended.
    ///
    /// # Safety
    /// The spans are memory of this cache, or of `peer`.
    ///
    /// # Panics
    /// If the buffer is too small.
    pub(super) unsafe fn start_spans(
        self: &Arc<Self>,
        direction: Direction,
        spans: Vec<Span>,
        staging: Staging,
        peer: Option<Arc<PeerMapping>>,
    ) -> Progress {
        let needed = spans.iter().map(|span| span.len_bytes).sum::<usize>();
        assert!(
            staging.len() >= needed,
            "{needed} bytes do not fit a buffer of {}",
            staging.len()
        );
        let event = match self.device.event() {
            Ok(event) => event,
            Err(error) => {
                return Progress::Ended {
                    staging,
                    result: Err(error),
                };
            }
        };
        let is_long = spans.len() >= LAUNCHED_WITH_HOST_MIN;
        let mut list = is_long.then(|| self.take_list()).flatten().map(ManuallyDrop::new);
        // From here on the buffer and the list may be in use by the device: they are free again only in `poll`.
        let staging = ManuallyDrop::new(staging);
        // SAFETY: the caller vouches for the spans. `InFlight` keeps their owners, and buffer and list to itself, until the event
        // behind the copies is over. After an error what was started before still runs, so the end is waited for all the same.
        let started = unsafe {
            self.device
                .start_spans(direction, &spans, &staging, list.as_deref_mut())
        };
        let failure = started.err();
        match self.device.record(&event, direction) {
            Ok(()) => Progress::Running(InFlight {
                staging,
                list,
                event,
                failure,
                memory: ManuallyDrop::new(Arc::clone(self)),
                peer: peer.map(ManuallyDrop::new),
            }),
            // A context that cannot record an event runs nothing any more. When the buffer is free, nobody can say.
            Err(error) => {
                std::mem::forget((Arc::clone(self), peer));
                Progress::Lost(failure.unwrap_or(error))
            }
        }
    }
}

/// Copies on their way. Dropping this value gives the buffer up for good, and the cache's memory and a peer's mapping with it,
/// since the device may still be using them.
#[derive(Debug)]
pub(crate) struct InFlight {
    staging: ManuallyDrop<Staging>,
    list: Option<ManuallyDrop<PieceList>>,
    event: Event,
    failure: Option<CudaError>,
    memory: ManuallyDrop<Arc<DeviceMemory>>,
    peer: Option<ManuallyDrop<Arc<PeerMapping>>>,
}

/// How far copies are.
#[derive(Debug)]
pub(crate) enum Progress {
    /// Not at their end.
    Running(InFlight),
    /// Nothing is on its way any more.
    Ended {
        /// The buffer, free for other use.
        staging: Staging,
        /// Whether all bytes were copied.
        result: Result<()>,
    },
    /// The device cannot say; it is broken.
    Lost(CudaError),
}

impl InFlight {
    /// Looks how far the copies are.
    pub(crate) fn poll(self) -> Progress {
        match self.event.is_over() {
            Ok(false) => Progress::Running(self),
            Ok(true) => {
                // No copy is reading the peer's memory any more, so its mapping may go.
                drop(self.peer.map(ManuallyDrop::into_inner));
                if let Some(list) = self.list {
                    self.memory.give_list(ManuallyDrop::into_inner(list));
                }
                drop(ManuallyDrop::into_inner(self.memory));
                Progress::Ended {
                    staging: ManuallyDrop::into_inner(self.staging),
                    result: self.failure.map_or(Ok(()), Err),
                }
            }
            Err(error) => Progress::Lost(error),
        }
    }
}

impl std::fmt::Debug for DeviceMemory {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("DeviceMemory")
            .field("device", &self.device)
            .field("regions", &self.map.regions().len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use kvlane_core::TensorView;

    use super::*;

    fn ordinal_of(devices: &[kvlane_core::Device]) -> Result<u32> {
        let views = devices.iter().enumerate().map(|(layer, &device)| TensorView {
            name: format!("layer.{layer}"),
            address: 0x1000 * (layer as u64 + 1),
            device,
            element_bytes: 1,
            shape: vec![4, 1024],
            strides: vec![1024, 1],
        });
        let map = BlockMap::from_tensors(views, 4, None).unwrap();
        // SAFETY: nothing is copied; only the map is looked at.
        unsafe { DeviceTensors::from_map(map, Arc::new(())) }.ordinal()
    }

    #[test]
    fn tensors_on_one_device_are_accepted_and_all_others_are_refused_by_name() {
        use kvlane_core::Device::{Cuda, Host};
        assert_eq!(ordinal_of(&[Cuda(3), Cuda(3)]), Ok(3));
        for (devices, name) in [
            ([Cuda(3), Cuda(2)], "layer.1"),
            ([Host, Cuda(0)], "layer.0"),
            ([Cuda(0), Host], "layer.1"),
        ] {
            let error = ordinal_of(&devices).unwrap_err();
            assert!(
                matches!(&error, CudaError::NotOneDevice { layer, .. } if layer == name),
                "{error}"
            );
        }
    }
}
