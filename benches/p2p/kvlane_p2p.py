"""What kvlane's two processes share: the same names and options."""

from kvlane import _native
from kvlane_layout import layout_of
from workload import BLOCK_TOKENS, POOL_BLOCKS, PagedCache

# The connector's default.
CONNECTIONS = 2
LEASE_MS = 30_000
BLOCK_DIGEST, REQUEST_DIGEST = b"\1" * 32, b"\2" * 32


def open_worker(cache: PagedCache, layers: int, lane: str, can_offer: bool) -> _native.P2pWorker:
    """Over the first layers of a cache. Decode chooses the lane."""
    namespace = _native.namespace_id([("model", "benchmark"), ("layers", str(layers))])
    options = {
        "can_offer": can_offer,
        "can_pull": not can_offer,
        "host": "127.0.0.1",
        "port": 0,
        "rank": 0,
        "engine_id": "benchmark",
        "secret": None,
        "allowed_peers": [],
        "lane": lane,
        "lease_ms": LEASE_MS,
        "transfer_timeout_ms": LEASE_MS,
        "peer_timeout_ms": 5000,
        "connections": CONNECTIONS,
        "max_leased_blocks": POOL_BLOCKS,
        "readers": 1,
        "facts": [],
    }
    return _native.P2pWorker(layout_of(cache, layers), cache.layers, namespace, BLOCK_TOKENS, options)


def check_end(job: int, ended: list[tuple[int, list[int], str]]) -> None:
    if ended != [(job, [], "done")]:
        raise RuntimeError(f"pull {job} ended as {ended}")
