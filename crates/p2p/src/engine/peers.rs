//! What a worker knows about the prefill workers it pulls from, and the lane that it uses to each.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kvlane_core::Run;

use super::address::PeerAddress;
use super::device_ways::DeviceWays;
use super::options::LaneChoice;
use crate::lanes::{Cut, LaneError, LocalCache, Pairing, PeerMemory, RemoteCache, RemoteRegion, ShmLane};
use crate::proto::{Hello, Open, PullRequest, Units};
use crate::shape::{CacheShape, agree};

/// A prefill worker behind a connection.
pub(super) struct Peer {
    pub(super) address: PeerAddress,
    pub(super) start_id: [u8; 16],
    /// Tokens of its blocks.
    block_tokens: u32,
    /// How its blocks meet ours. None: they are alike.
    pub(super) units: Option<Units>,
    pub(super) way: Way,
    pub(super) pairing: Arc<Pairing>,
    /// Set when the connection has ended.
    pub(super) is_gone: AtomicBool,
}

/// How its bytes come here.
#[derive(Clone, Debug)]
pub(super) enum Way {
    /// Out of its memory.
    Shm(PeerMemory),
    /// From device to device.
    Device(Arc<DeviceWays>),
    /// Over data connections.
    Tcp,
}

impl Way {
    /// As in logs, metrics and options.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Shm(_) => "shm",
            Self::Device(ways) => ways.name(),
            Self::Tcp => "tcp",
        }
    }
}

/// Differences that are told.
const DIFFERENCES_MAX: usize = 4;

/// Why two namespaces differ, as far as their facts say it.
pub(super) fn differences(own: &[(String, String)], theirs: &[(String, String)]) -> String {
    let value = |facts: &[(String, String)], name: &str| {
        let found = facts.iter().find(|(known, _)| known == name);
        found.map_or_else(|| "none".to_owned(), |(_, value)| value.clone())
    };
    let mut names: Vec<&str> = own.iter().chain(theirs).map(|(name, _)| name.as_str()).collect();
    let mut seen = HashSet::new();
    names.retain(|name| seen.insert(*name) && value(own, name) != value(theirs, name));
    if names.is_empty() {
        return "it has another model, weights, rank, KV type or layout (namespaces differ)".to_owned();
    }
    let told = names.iter().take(DIFFERENCES_MAX);
    let told = told.map(|name| format!("{name} (its {}, ours {})", value(theirs, name), value(own, name)));
    let mut told = told.collect::<Vec<String>>().join(", ");
    if names.len() > DIFFERENCES_MAX {
        told += &format!(" and {} more", names.len() - DIFFERENCES_MAX);
    }
    format!("it differs in {told}")
}

impl Peer {
    /// Takes what a peer told. An error is a sentence that says why nothing can be pulled from it.
    pub(super) fn new(
        address: &PeerAddress,
        open: &Open,
        hello: &Hello,
        own: &Hello,
        (cache, shape): (&LocalCache, Option<&CacheShape>),
        choice: LaneChoice,
    ) -> Result<Self, String> {
        if hello.namespace != own.namespace {
            return Err(differences(&own.facts, &hello.facts));
        }
        let layout = hello.cache.as_ref().ok_or("it holds no cache")?;
        let run = |&(offset_bytes, len_bytes): &(u64, u64)| Run {
            offset_bytes: usize::try_from(offset_bytes).unwrap_or(usize::MAX),
            len_bytes: usize::try_from(len_bytes).unwrap_or(usize::MAX),
        };
        let regions = layout.regions.iter().map(|region| RemoteRegion {
            address: region.address,
            block_stride_bytes: region.block_stride_bytes,
            extent_bytes: region.extent_bytes,
            runs: region.runs.iter().map(run).collect(),
        });
        let remote =
            RemoteCache::new(regions.collect(), layout.block_count).map_err(|error| error.to_string())?;
        let are_alike = hello.block_tokens == own.block_tokens
            && layout.fingerprint == cache.map().fingerprint()
            && shape.map(CacheShape::heads) == layout.shape.as_ref().map(CacheShape::heads);
        let (pairing, units) = if are_alike {
            (
                Pairing::new(cache, remote).map_err(|error| error.to_string())?,
                None,
            )
        } else {
            let theirs = layout.shape.as_ref();
            let (pairing, units) = meet(
                cache,
                shape.zip(theirs),
                remote,
                hello.block_tokens,
                own.block_tokens,
            )?;
            (pairing, Some(units))
        };
        let pairing = Arc::new(pairing);
        let way = match cache {
            LocalCache::Host(_) => host_way(address, hello, &pairing, choice)?,
            LocalCache::Device(_) => match DeviceWays::new(address, hello, own, choice)? {
                Some(ways) => Way::Device(Arc::new(ways)),
                None => Way::Tcp,
            },
        };
        Ok(Self {
            address: address.clone(),
            start_id: open.start_id,
            block_tokens: hello.block_tokens,
            units,
            way,
            pairing,
            is_gone: AtomicBool::new(false),
        })
    }

    /// Its blocks that hold what a pull wants, counted from the prompt's first one.
    pub(super) fn blocks_of(&self, request: &PullRequest, own_tokens: u32) -> Range<usize> {
        let first = u64::from(request.first_block);
        let own = first..first + request.targets.len() as u64;
        let theirs = request
            .prompt
            .blocks_of_other_size(own, own_tokens, self.block_tokens);
        theirs.start as usize..theirs.end as usize
    }
}

/// Pairs caches whose blocks differ.
fn meet(
    cache: &LocalCache,
    shapes: Option<(&CacheShape, &CacheShape)>,
    remote: RemoteCache,
    their_tokens: u32,
    our_tokens: u32,
) -> Result<(Pairing, Units), String> {
    let Some((ours, theirs)) = shapes else {
        return Err(format!(
            "its blocks (of {their_tokens} tokens) are laid out in another way than ours (of {our_tokens} tokens), and which \
             dimension counts what is not known"
        ));
    };
    fn runs_of(regions: &[RemoteRegion]) -> impl ExactSizeIterator<Item = &[Run]> {
        regions.iter().map(|region| region.runs.as_slice())
    }
    theirs
        .check(runs_of(remote.regions()))
        .map_err(|what| format!("what it says of its blocks cannot be: {what}"))?;
    if theirs.block_tokens != their_tokens {
        return Err("it says two different sizes of its blocks".to_owned());
    }
    let (our_slice, their_slice) = agree(ours, theirs)?;
    let our_runs = cache.map().regions().iter().map(|region| region.runs.as_slice());
    let told = |error: LaneError| error.to_string();
    let our_cut = Cut::new(ours, our_runs, our_slice).map_err(told)?;
    let their_cut = Cut::new(theirs, runs_of(remote.regions()), their_slice).map_err(told)?;
    let units = Units {
        unit_tokens: their_slice.unit_tokens,
        holder_block_tokens: their_tokens,
    };
    let pairing = Pairing::cut(cache, our_cut, remote, their_cut).map_err(told)?;
    Ok((pairing, units))
}

fn host_way(
    address: &PeerAddress,
    hello: &Hello,
    pairing: &Arc<Pairing>,
    choice: LaneChoice,
) -> Result<Way, String> {
    match choice {
        LaneChoice::Tcp => Ok(Way::Tcp),
        LaneChoice::Cuda | LaneChoice::Nccl => Err(format!(
            "lane {} is not possible: the cache of this server is in host memory",
            if choice == LaneChoice::Cuda {
                "cuda"
            } else {
                "nccl"
            }
        )),
        LaneChoice::Shm | LaneChoice::Auto => match (probe(hello, pairing), choice) {
            (Ok(memory), _) => Ok(Way::Shm(memory)),
            (Err(reason), LaneChoice::Shm) => Err(format!("lane shm is not possible: {reason}")),
            (Err(reason), _) => {
                tracing::info!(peer = %address, reason, "lane tcp: its memory cannot be read from here");
                Ok(Way::Tcp)
            }
        },
    }
}

/// Names the running kernel, the same for all containers of a machine; zeroes if it does not say.
pub(super) fn host_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let hex: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&hex, 16).unwrap_or_default().to_be_bytes()
}

/// Finds out whether the peer's memory can be read.
fn probe(hello: &Hello, pairing: &Arc<Pairing>) -> Result<PeerMemory, String> {
    let probe = hello.probe.ok_or("it does not say where its memory is")?;
    let memory = PeerMemory {
        pid: probe.pid,
        token_address: probe.address,
        token: probe.token,
        epochs_address: probe.epochs_address,
        epoch_slots: probe.slot_count,
        board_address: probe.board_address,
        board_entries: probe.board_entries,
    };
    let opened: Result<ShmLane, LaneError> = ShmLane::open(memory, Arc::clone(pairing));
    opened.map(|_| memory).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        let owned = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn a_refused_peer_is_told_what_differs_and_both_values() {
        let own = facts(&[("weights", "a"), ("layout", "x"), ("dtype", "f16")]);
        let theirs = facts(&[("weights", "b"), ("dtype", "f16"), ("tensors", "t")]);
        assert_eq!(
            differences(&own, &theirs),
            "it differs in weights (its b, ours a), layout (its none, ours x), tensors (its t, ours none)"
        );
        let many: Vec<(String, String)> = (0..9).map(|n| (format!("n{n}"), String::new())).collect();
        assert!(differences(&many, &[]).ends_with("and 5 more"));
        assert!(differences(&own, &own).contains("namespaces differ"));
    }
}
