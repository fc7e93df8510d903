//! What a worker and an asker are told at start.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::error::{Error, Result};
use crate::proto::{FACTS_MAX, facts_are_bounded};
use crate::shape::CacheShape;

/// Settings that both have.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PeerOptions {
    /// Name of the engine, for the peers' logs.
    pub engine_id: String,
    /// Rank of the worker inside its engine.
    pub rank: u32,
    /// Secret that all peers share; none: whoever reaches the port is trusted.
    pub secret: Option<Vec<u8>>,
    /// Addresses, networks and names that may be connected to; empty: all. They come out of request ids, which clients
    /// may choose. A name is compared as it is written, but for capitals, and never looked up.
    pub allowed_peers: Vec<String>,
    /// Most peers that this side is connected to at a time.
    pub peers: usize,
    /// One that was not used for so long makes room for another.
    pub peer_unused: Duration,
    /// Longest wait for a connection and its handshake.
    pub connect_timeout: Duration,
    /// Longest silence on a connection before a heartbeat.
    pub heartbeat: Duration,
    /// Longest silence of a peer before it counts as dead.
    pub peer_timeout: Duration,
    /// How long a peer that could not be reached is not tried again.
    pub peer_backoff: Duration,
}

impl PeerOptions {
    /// Defaults for everything but the name.
    pub fn new(engine_id: impl Into<String>) -> Self {
        Self {
            engine_id: engine_id.into(),
            rank: 0,
            secret: None,
            allowed_peers: Vec::new(),
            peers: 1024,
            peer_unused: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(2),
            heartbeat: Duration::from_secs(1),
            peer_timeout: Duration::from_secs(5),
            peer_backoff: Duration::from_secs(1),
        }
    }

    pub(super) fn allows(&self, host: &str) -> bool {
        let address: Option<IpAddr> = host.parse().ok();
        let fits = |allowed: &String| {
            if allowed.eq_ignore_ascii_case(host) {
                return true;
            }
            let Some(address) = address else { return false };
            match allowed.parse::<IpNet>() {
                Ok(network) => network.contains(&address),
                Err(_) => allowed.parse() == Ok(address),
            }
        };
        self.allowed_peers.is_empty() || self.allowed_peers.iter().any(fits)
    }

    fn check(&self) -> Result<()> {
        let longest = 512;
        if self.engine_id.len() > longest {
            return Err(Error::InvalidArgument {
                argument: "engine_id",
                found: format!("{} bytes", self.engine_id.len()),
                allowed: format!("at most {longest} bytes"),
            });
        }
        Ok(())
    }
}

/// Settings of an asker.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AskerOptions {
    /// Common settings.
    pub peer: PeerOptions,
    /// Most questions that are not forgotten.
    pub questions: usize,
}

impl AskerOptions {
    /// Defaults for everything but the engine's name.
    pub fn new(engine_id: impl Into<String>) -> Self {
        Self {
            peer: PeerOptions::new(engine_id),
            questions: 4096,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        self.peer.check()
    }
}

/// Which lane a worker uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum LaneChoice {
    /// The fastest that works between the two.
    #[default]
    Auto,
    /// Only by reading the peer's memory.
    Shm,
    /// Only over connections.
    Tcp,
    /// Only from device to device, out of the peer's mapped memory.
    Cuda,
    /// Only from device to device, over a communicator of NCCL.
    Nccl,
}

impl LaneChoice {
    /// Whether `lane` may be used.
    pub(super) fn allows(self, lane: Self) -> bool {
        self == Self::Auto || self == lane
    }
}

/// Settings of a worker.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WorkerOptions {
    /// Common settings.
    pub peer: PeerOptions,
    /// Whether it holds blocks for others, and so listens.
    pub can_offer: bool,
    /// Whether it pulls blocks.
    pub can_pull: bool,
    /// Address to listen on.
    pub host: IpAddr,
    /// Port to listen on; 0: any.
    pub port: u16,
    /// Tokens per block.
    pub block_tokens: u32,
    /// What the blocks hold, if that is known: then peers with blocks of another size, or other heads, can be met. The
    /// namespace must not tell such peers apart then, and must where it is not known.
    pub shape: Option<CacheShape>,
    /// Which lane.
    pub lane: LaneChoice,
    /// How long blocks are kept for a reader.
    pub lease: Duration,
    /// Fewest ranks of decode that must release a hold; they may say that there are more.
    pub readers: u32,
    /// Most requests that are held at a time.
    pub holds: u32,
    /// Most blocks of ended requests that nobody has claimed.
    pub unclaimed_blocks: usize,
    /// Longest wait of a question for its prompt.
    pub question_wait: Duration,
    /// Names and values of what the namespace is made of: a peer of another namespace is told which differ.
    pub facts: Vec<(String, String)>,
    /// Threads that copy, each with a data connection of its own to a peer on the `tcp` lane.
    pub copy_threads: usize,
}

impl WorkerOptions {
    /// Defaults for everything but the engine's name and the blocks' size.
    pub fn new(engine_id: impl Into<String>, block_tokens: u32) -> Self {
        Self {
            peer: PeerOptions::new(engine_id),
            can_offer: true,
            can_pull: true,
            host: IpAddr::from([0; 16]),
            port: 0,
            block_tokens,
            shape: None,
            lane: LaneChoice::Auto,
            lease: Duration::from_secs(30),
            readers: 1,
            holds: 4096,
            unclaimed_blocks: usize::MAX,
            question_wait: Duration::from_secs(120),
            facts: Vec::new(),
            copy_threads: 2,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        self.peer.check()?;
        if !facts_are_bounded(&self.facts) {
            return Err(Error::InvalidArgument {
                argument: "facts",
                found: format!("{} facts", self.facts.len()),
                allowed: format!("at most {FACTS_MAX}, of short texts"),
            });
        }
        let least_one = [
            ("block_tokens", self.block_tokens as usize),
            ("readers", self.readers as usize),
            ("holds", self.holds as usize),
            ("copy_threads", self.copy_threads),
        ];
        for (argument, value) in least_one {
            if value == 0 {
                return Err(Error::InvalidArgument {
                    argument,
                    found: "0".to_owned(),
                    allowed: "at least 1".to_owned(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowed_peers_are_addresses_networks_and_names_as_they_are_written() {
        let mut options = PeerOptions::new("engine");
        assert!(options.allows("anybody"));
        options.allowed_peers = ["10.0.0.0/8", "fd00::1", "prefill-0", "bad/"]
            .map(str::to_owned)
            .to_vec();
        for host in ["10.1.2.3", "fd00::1", "fd00:0::1", "prefill-0"] {
            assert!(options.allows(host), "{host}");
        }
        for host in ["11.1.2.3", "fd00::2", "prefill-1", "10.0.0.0/8.example.org", ""] {
            assert!(!options.allows(host), "{host}");
        }
    }
}
