//! KV blocks in the memory of a CUDA device, for backends that move bytes with the CPU, or from device to device.
//!
//! The one idea: a backend never sees memory at a device address. It gets a block's bytes in a buffer of pinned host memory,
//! or hands in such a buffer, and [`DeviceCache`] moves it with asynchronous copies on streams of its own. A buffer is free
//! again when the event behind its copies says so, not when a call returns.
//!
//! Between two processes of a machine the host is not needed: one [shares](DeviceCache::share) its cache, the other
//! [maps](DeviceCache::map_peer) it and [copies](DeviceCache::copy_from_peer) from it into its own. Between machines, and
//! where memory cannot be mapped, both [join](DeviceCache::join) an NCCL communicator: one [sends](Communicator::send) from
//! its blocks, the other [receives](Communicator::receive) into memory of the communicator and
//! [scatters](DeviceCache::scatter_received) that.
//!
//! Guarantees:
//! - The driver is loaded when the first cache is made or [`probe`] is called, NCCL when [`NcclInfo::find`] is called or a
//!   communicator made. Without them there is an error that says what was looked for; nothing is linked and nothing panics.
//! - Copies come after the work that the program gave its compute stream before: [`DeviceCache::order_stores_after`],
//!   [`DeviceCache::mark`].
//! - Every wait ends at its deadline, with one exception that is a promise of its own: bytes on their way *into* the cache
//!   are waited for until they can no longer arrive.
//! - Once the device is lost, every later call says so at once.
//!
//! Types and constants are those of cudarc. Its calls are not used, because they panic where a symbol is missing and give
//! results as an enum, which a driver that is newer than the bindings would break.

#![deny(unsafe_code)]

mod communicator;
mod device_cache;
mod error;
mod nccl;
mod pool;
mod probe;
#[allow(
    unsafe_code,
    reason = "the one place where the driver is called and device addresses are handled"
)]
mod raw;
mod share;
mod spans;

pub use communicator::{Communicator, CommunicatorPlace, Rank};
pub use device_cache::{DeviceCache, Mark, Patience, PeerCache, PeerCopyError, SharedCache};
pub use error::{CudaError, Result};
pub use nccl::{CommunicatorId, NcclInfo, NcclVersion};
pub use pool::Lease;
pub use probe::{DriverInfo, probe};
#[cfg(feature = "stand-in")]
pub use raw::stand_in;
pub use raw::{DeviceTensors, SendPlan, StreamHandle};
pub use share::{CacheOffer, SharedAllocation};
pub use spans::RunPart;
