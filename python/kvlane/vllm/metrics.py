"""Figures of the transfer: vLLM's periodic log line and Prometheus."""

from collections.abc import Callable
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

#: Values that are a state and not a count: workers report the same folder, so the largest one holds.
GAUGES = {
    "used_bytes": "Bytes that segments take.",
    "limit_bytes": "Bytes that segments may take.",
    "segments": "Segment files in the folder.",
}

#: States of the P2P connector. Workers hold the same requests, so the largest one holds here too.
P2P_GAUGES = {
    "peers_up": "Other servers' workers that a worker is connected with.",
    "parked_blocks": "Blocks of requests whose KV is still coming.",
}

_STATES = {*GAUGES, *P2P_GAUGES}

# Metrics of this process. vLLM's front end asks for them once per connector class, and a name can be taken once only.
_made: dict[tuple[Any, ...], Any] = {}

#: Prometheus name, what it counts, its label, and the stat behind each value of that label.
COUNTERS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "vllm:kvlane_transfer_bytes",
        "Bytes of KV moved between the cache and the shared folder.",
        "direction",
        {"store": "stored_bytes", "load": "loaded_bytes"},
    ),
    (
        "vllm:kvlane_transfer_seconds",
        "Time that copying threads spent, summed over threads.",
        "direction",
        {"store": "store_seconds", "load": "load_seconds"},
    ),
    (
        "vllm:kvlane_lookup_blocks",
        "Blocks of prompts that were asked for, by outcome.",
        "outcome",
        {
            "hit": "hit_blocks",
            "absent": "miss_blocks_absent",
            "timeout": "miss_blocks_timeout",
            "not_open": "miss_blocks_not_open",
            "no_room": "miss_blocks_no_room",
        },
    ),
    (
        "vllm:kvlane_failed_blocks",
        "Blocks that were not moved, by reason.",
        "reason",
        {
            "absent": "absent_blocks",
            "recycled": "recycled_blocks",
            "corrupt": "corrupt_blocks",
            "timeout": "timed_out_blocks",
            "cancelled": "cancelled_blocks",
            "io": "io_failed_blocks",
            "dropped": "dropped_blocks",
        },
    ),
    (
        "vllm:kvlane_events",
        "Requests that recompute after a failed load, and blocks evicted to make room.",
        "event",
        {"recomputed_request": "recomputed_requests", "evicted_block": "evicted_blocks"},
    ),
)


P2P_COUNTERS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "vllm:kvlane_p2p_bytes",
        "Bytes of KV that arrived from other servers.",
        "direction",
        {"received": "received_bytes"},
    ),
    (
        "vllm:kvlane_p2p_lane_bytes",
        "Bytes of KV that arrived, by lane.",
        "lane",
        {"shm": "shm_bytes", "tcp": "tcp_bytes", "cuda": "cuda_bytes", "nccl": "nccl_bytes"},
    ),
    (
        "vllm:kvlane_p2p_seconds",
        "Time that pulls spent copying, and that requests waited for an answer and for room.",
        "what",
        {"pull": "pull_seconds", "wait": "wait_seconds"},
    ),
    (
        "vllm:kvlane_p2p_requests",
        "Requests that name a prefill server, by what became of their question.",
        "outcome",
        {
            outcome: f"request_{outcome}"
            for outcome in (
                "pulled", "local", "none", "mismatch", "unreachable", "refused", "timeout", "busy", "no_room",
                "must_compute", "parameters", "unnamed", "error", "reset",
            )
        },
    ),
    (
        "vllm:kvlane_p2p_failed_pulls",
        "Pulls that failed, so that the request recomputes, by reason.",
        "reason",
        {
            reason: f"failed_{reason}"
            for reason in (
                "none", "mismatch", "busy", "unreachable", "refused", "timeout", "lapsed", "lost", "cancelled",
                "closed",
            )
        },
    ),
    (
        "vllm:kvlane_p2p_leases",
        "Leases of prefill that ended, by how.",
        "end",
        {end: f"{end}_leases" for end in ("released", "expired", "revoked", "dropped")},
    ),
    (
        "vllm:kvlane_p2p_events",
        "Requests that waited for an answer, that recompute after a failed pull, and whose KV was not held because "
        "their blocks were taken away first.",
        "event",
        {"wait": "waits", "recomputed_request": "recomputed_requests", "not_held_request": "not_held_requests"},
    ),
)  # fmt: skip


class KvlaneStats(KVConnectorStats):
    """Counters since the last report, by name."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            known = self.data.get(name, 0)
            self.data[name] = max(known, value) if name in _STATES else known + value
        return self

    def reduce(self) -> dict[str, int | float]:
        shown: dict[str, int | float] = {}
        for name, value in sorted(self.data.items()):
            shown[name] = round(value, 3)
        for direction, amount in (("store", "stored_bytes"), ("load", "loaded_bytes"), ("pull", "received_bytes")):
            seconds = self.data.get(f"{direction}_seconds", 0)
            if seconds > 0:
                shown[f"{direction}_GBps"] = round(self.data.get(amount, 0) / seconds / 1e9, 2)
        return shown

    def is_empty(self) -> bool:
        return not self.data


class KvlanePromMetrics(KVConnectorPromMetrics):
    """Prometheus metrics of one front end, one series per engine."""

    counters = COUNTERS
    gauges = GAUGES
    #: What stands between "vllm:kvlane_" and a gauge's name.
    gauge_prefix = ""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        # (engine, stat) -> series. Made once: looking a series up by labels takes a lock.
        self._counters: dict[tuple[int, str], Any] = {}
        self._gauges: dict[tuple[int, str], Any] = {}
        for name, text, label, stats in self.counters:
            counter = _make(metric_types[Counter], name=name, documentation=text, labelnames=[*labelnames, label])
            for engine, values in per_engine_labelvalues.items():
                for label_value, stat in stats.items():
                    self._counters[engine, stat] = counter.labels(*values, label_value)
        for stat, text in self.gauges.items():
            gauge = _make(
                metric_types[Gauge],
                name=f"vllm:kvlane_{self.gauge_prefix}{stat}",
                documentation=text,
                labelnames=labelnames,
                multiprocess_mode="mostrecent",
            )
            for engine, values in per_engine_labelvalues.items():
                self._gauges[engine, stat] = gauge.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for stat, value in transfer_stats_data.items():
            gauge = self._gauges.get((engine_idx, stat))
            if gauge is not None:
                gauge.set(value)
                continue
            counter = self._counters.get((engine_idx, stat))
            if counter is not None and value > 0:
                counter.inc(value)


class P2pPromMetrics(KvlanePromMetrics):
    """The metrics of the P2P connector."""

    counters = P2P_COUNTERS
    gauges = P2P_GAUGES
    gauge_prefix = "p2p_"


def _make(kind: Callable[..., Any], *, name: str, labelnames: list[str], **options: Any) -> Any:
    """A metric, or the one that was made before if it is still registered: vLLM drops all of its metrics when another
    engine starts in the process."""
    key = (kind, name, tuple(labelnames))
    try:
        _made[key] = kind(name=name, labelnames=labelnames, **options)
    except ValueError:  # the name is taken
        if key not in _made:
            raise
    return _made[key]
