//! What `P2pAsker` and `P2pWorker` are told at start.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use kvlane_core::BlockMap;
use kvlane_p2p::shape::{Axes, CacheShape};
use kvlane_p2p::{LaneChoice, PeerOptions, WorkerOptions};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::error::config_error;
use crate::p2p::millis;

/// Options as Python passes them.
pub(crate) struct P2pOptions {
    pub(crate) peer: PeerOptions,
    can_offer: bool,
    can_pull: bool,
    host: IpAddr,
    port: u16,
    lane: LaneChoice,
    lease: Duration,
    question_wait: Duration,
    connections: usize,
    unclaimed_blocks: usize,
    readers: u32,
    facts: Vec<(String, String)>,
}

impl P2pOptions {
    pub(crate) fn parse(options: &Bound<'_, PyDict>) -> PyResult<Self> {
        let py = options.py();
        let item = |name: &str| {
            let value = options.get_item(name)?;
            value.ok_or_else(|| config_error(py, format!("option '{name}' is missing")))
        };
        let mut peer = PeerOptions::new(item("engine_id")?.extract::<String>()?);
        peer.rank = item("rank")?.extract()?;
        peer.peer_timeout = millis(item("peer_timeout_ms")?.extract()?);
        peer.connect_timeout = peer.connect_timeout.max(peer.peer_timeout / 2);
        peer.allowed_peers = item("allowed_peers")?.extract()?;
        let secret = item("secret")?;
        if !secret.is_none() {
            peer.secret = Some(secret.cast::<PyBytes>()?.as_bytes().to_vec());
        }
        let host: String = item("host")?.extract()?;
        let host = host.parse().map_err(|_| {
            config_error(
                py,
                format!("host is '{host}', allowed: an IPv4 or IPv6 address to listen on"),
            )
        })?;
        let lane: String = item("lane")?.extract()?;
        let lane = match lane.as_str() {
            "auto" => LaneChoice::Auto,
            "shm" => LaneChoice::Shm,
            "tcp" => LaneChoice::Tcp,
            "cuda" => LaneChoice::Cuda,
            "nccl" => LaneChoice::Nccl,
            other => {
                return Err(config_error(
                    py,
                    format!("lane is '{other}', allowed: auto, shm, tcp, cuda, nccl"),
                ));
            }
        };
        Ok(Self {
            peer,
            can_offer: item("can_offer")?.extract()?,
            can_pull: item("can_pull")?.extract()?,
            host,
            port: item("port")?.extract()?,
            lane,
            lease: millis(item("lease_ms")?.extract()?),
            question_wait: millis(item("transfer_timeout_ms")?.extract()?),
            connections: item("connections")?.extract()?,
            unclaimed_blocks: item("max_leased_blocks")?.extract()?,
            readers: item("readers")?.extract()?,
            facts: item("facts")?.extract()?,
        })
    }

    pub(crate) fn worker(self, block_tokens: u32) -> WorkerOptions {
        let mut options = WorkerOptions::new("", block_tokens);
        options.peer = self.peer;
        options.can_offer = self.can_offer;
        options.can_pull = self.can_pull;
        options.host = self.host;
        options.port = self.port;
        options.lane = self.lane;
        options.lease = self.lease;
        options.question_wait = options.question_wait.max(self.question_wait);
        options.copy_threads = self.connections;
        options.unclaimed_blocks = self.unclaimed_blocks;
        options.readers = self.readers;
        options.facts = self.facts;
        options
    }
}

/// What is in the blocks: (first KV head, heads, workers that share out the heads, for each layer's name the dimensions that
/// count tokens and heads, and whether the kernel packs tokens together). None or missing: not known.
type Shape = (u32, u32, u32, HashMap<String, (usize, Option<usize>, bool)>);

pub(crate) fn shape_of(
    map: &BlockMap,
    block_tokens: u32,
    options: &Bound<'_, PyDict>,
) -> PyResult<Option<CacheShape>> {
    let given: Option<Shape> = match options.get_item("shape")? {
        Some(given) => given.extract()?,
        None => None,
    };
    let Some((first_head, head_count, tensor_ranks, axes)) = given else {
        return Ok(None);
    };
    let py = options.py();
    let axes: Option<Vec<Axes>> = map
        .layer_names()
        .map(|name| {
            axes.get(name).map(|&(tokens, heads, are_tokens_packed)| Axes {
                tokens,
                are_tokens_packed,
                heads,
            })
        })
        .collect();
    let axes =
        axes.ok_or_else(|| config_error(py, "a layer's dimensions are missing in 'shape'".to_owned()))?;
    let heads = first_head..first_head.saturating_add(head_count);
    CacheShape::of(map, block_tokens, heads, tensor_ranks, &axes)
        .map(Some)
        .map_err(|what| {
            config_error(
                py,
                format!("the KV tensors do not have the shape that was said: {what}"),
            )
        })
}
