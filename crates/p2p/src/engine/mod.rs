//! Threads and sockets that drive the protocol.
//!
//! | thread | does |
//! |---|---|
//! | `kvlane-p2p` | all control connections of one value: reads, deadlines, heartbeats |
//! | `kvlane-p2p-dial` | one connection being made, name look-up included; ends with it |
//! | `kvlane-p2p-line` | makes data connections over which small pulls are taken; what comes over them is read by the engine or by `kvlane-p2p` |
//! | `kvlane-p2p-copy` | copies spans of blocks over a lane; [`WorkerOptions::copy_threads`](crate::WorkerOptions) of them |
//! | `kvlane-nccl` | all calls of NCCL for one communicator; ends with it |
//! | `kvlane-p2p-event` | waits for a device's compute stream, where the cache is on one |
//! | `kvlane-p2p-serve` | one data connection of the `tcp` lane, on prefill's side; ends with it |
//!
//! Calls of the engine take one lock, which no thread holds while it waits for anything.

mod address;
mod asker;
mod connections;
mod copies;
mod device_ways;
mod dial;
mod exchange;
mod machine;
mod marks;
mod nccl_way;
mod net;
mod options;
mod peers;
mod results;
mod takes;
mod worker;

pub use address::PeerAddress;
pub use asker::{Asked, P2pAsker};
pub use options::{AskerOptions, LaneChoice, PeerOptions, WorkerOptions};
pub use worker::{Ended, P2pWorker, PullOrder, WorkerStats};
