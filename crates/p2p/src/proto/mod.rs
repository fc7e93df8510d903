//! The protocol as state machines without sockets and without a clock.
//!
//! Whoever drives them hands in messages, connections that come and go, and the time; they hand out messages to send and
//! things to do. So tests run them in simulated time against every order of events. `docs/p2p-protocol.md` describes
//! the bytes.
//!
//! | machine | lives in | does |
//! |---|---|---|
//! | [`Link`] | every connection | version, identity, authentication, heartbeat |
//! | [`Holder`] | prefill's workers | leases of computed blocks, answers to questions |
//! | [`Asker`] | decode's scheduler half | asks whether a prompt's KV is or will be there |
//! | [`Puller`] | decode's workers | gets granted blocks, has them copied, checks the lease |

mod asker;
mod frame;
mod holder;
mod link;
mod message;
mod puller;
mod waiting;

pub use asker::{Asker, AskerAction, AskerLimits, State};
pub use frame::{FRAME_BYTES_MAX, FrameError, Frames, PULLER_BYTES_MAX, encode};
pub use holder::{EndReason, Holder, HolderAction, HolderLimits, Offer};
pub use link::{Identity, Link, LinkConfig, LinkError, Side};
pub use message::{
    CacheLayout, Channel, DenyReason, DeviceAllocation, DeviceMemory, FACTS_MAX, Hello, Message, Open, Probe,
    Progress, READERS_MAX, Region, Role, VERSION, Verdict, facts_are_bounded,
};
pub use puller::{
    Copied, PostedBlocks, PullRequest, PullResult, Puller, PullerAction, PullerLimits, Span, Units,
};

/// Names a connection for as long as it lasts; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);
