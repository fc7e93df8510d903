//! Everything of this crate that the compiler cannot check: calls into the driver, device addresses, pinned memory.
//!
//! What leaves this module cannot be used wrongly: [`Staging`] is bytes that no copy is using, [`InFlight`] keeps a buffer
//! away until its copies have ended, and addresses stay inside of [`DeviceMemory`].

mod communicator;
mod device;
mod driver;
mod kernel;
mod memory;
mod nccl;
mod peer;
#[cfg(feature = "stand-in")]
pub mod stand_in;
mod table;

pub use communicator::SendPlan;
pub(crate) use communicator::{CommunicatorEnd, DeviceBuffer};
pub use device::StreamHandle;
pub(crate) use device::{Direction, Event, Staging};
pub(crate) use driver::Driver;
pub(crate) use kernel::PieceList;
pub use memory::DeviceTensors;
pub(crate) use memory::{DeviceMemory, InFlight, Progress};
pub(crate) use nccl::Nccl;
pub(crate) use peer::{Flown, PeerMapping, Pieces, TokenMemory};
