"""From samples to rows, and the promises that the rows are read against."""

import statistics
from dataclasses import dataclass, field

from bars import Bar
from workload import REQUEST_BYTES, RUN_BYTES, Sample

METHOD = (
    "Two processes per system, which may use all cores; sizes and places of the blocks as in fs.json. request: the "
    "median of all rounds; block: one run of 32 KiB, the fastest of all of them. memcpy is one thread within one "
    "process: of a whole request the median over all pairs of buffers (memcpy_ms) of the median of their memcpys, "
    "timed before and after transfers, of one run the fastest. of_memcpy is the ms of memcpy's row of the same case "
    "divided by the ms of the row. All calls are made and timed from Python. kvlane has two copying threads."
)
BYTES = {"block": RUN_BYTES, "request": REQUEST_BYTES}
# Not a row: how long after its producer's last layer a request is complete.
OVERLAP = "overlap"
# Between the same buffers a memcpy that varies by more than this met other work, and so did everything else.
DISTURBED = 1.3


@dataclass(frozen=True, order=True)
class Key:
    """Names one row."""

    case: str
    lane: str
    system: str

    @property
    def name(self) -> str:
        return f"{self.system} {self.case} {self.lane}"

    @property
    def group(self) -> str:
        """Rows of one group are measured next to each other."""
        return self.case


@dataclass
class Samples:
    """All samples of the run, by row."""

    by_key: dict[Key, list[Sample]] = field(default_factory=dict)

    def add(self, key: Key, sample: Sample) -> None:
        self.by_key.setdefault(key, []).append(sample)

    def drop(self, key: Key) -> None:
        """Takes a row out: what could not be run in every set of processes is not measured."""
        self.by_key.pop(key, None)

    def memcpys(self, case: str) -> dict[str, list[float]]:
        """Seconds of every memcpy beside transfers of a case, by the place of its buffers."""
        found: dict[str, list[float]] = {}
        for key, samples in self.by_key.items():
            for sample in samples if key.case == case else ():
                found.setdefault(sample.floor_place, []).extend(sample.floor_seconds)
        return {place: seconds for place, seconds in found.items() if seconds}

    def floor(self, case: str) -> float | None:
        """Seconds of the one memcpy that all rows of a case are divided by. Each place counts once."""
        places = self.memcpys(case).values()
        if not places:
            return None
        return min(map(min, places)) if case == "block" else statistics.median(map(statistics.median, places))

    def rows(self) -> list[dict]:
        """Exactly one row per key, the floors first."""
        floors = {case: self.floor(case) for case in BYTES}
        keys = [Key(case, "memory", "memcpy") for case, seconds in floors.items() if seconds is not None]
        rows = [row(key, floors[key.case], floors[key.case]) for key in keys]
        for key in sorted(self.by_key):
            if key.case in BYTES:
                rows.append(row(key, self.seconds(key), floors[key.case]))
        return rows

    def seconds(self, key: Key) -> float:
        seconds = [sample.seconds for sample in self.by_key[key]]
        return min(seconds) if key.case == "block" else statistics.median(seconds)

    def spread(self, key: Key) -> tuple[float, float]:
        """Fastest and slowest seconds of a row; of single blocks of each turn only the fastest is known."""
        if key.system == "memcpy":
            seconds = [second for memcpys in self.memcpys(key.case).values() for second in memcpys]
        else:
            seconds = [sample.seconds for sample in self.by_key[key]]
        return min(seconds), max(seconds)

    def overlaps(self) -> list[dict]:
        """By how much a request was late that was pulled while its layers were being computed, by lane."""
        found = []
        for key in sorted(self.by_key):
            transfer = Key("request", key.lane, key.system)
            if key.case == OVERLAP and transfer in self.by_key:
                late_ms, transfer_ms = (round(self.seconds(name) * 1e3, 3) for name in (key, transfer))
                share = round(late_ms / transfer_ms, 3)
                found.append({"lane": key.lane, "late_ms": late_ms, "transfer_ms": transfer_ms, "of_transfer": share})
        return found

    def memcpy_ms(self) -> dict[str, float]:
        """What a memcpy of a request took in each place."""
        places = sorted(self.memcpys("request").items())
        return {place: round(statistics.median(seconds) * 1e3, 3) for place, seconds in places}

    def disturbance(self) -> float:
        """How much slower a memcpy of this run often was (90th percentile) than at best (10th). Quiet: near 1."""
        relative = []
        for seconds in self.memcpys("request").values():
            usual = statistics.median(seconds)
            relative += [second / usual for second in seconds]
        if len(relative) < 2:
            return 1.0
        tenths = statistics.quantiles(relative, n=10)
        return tenths[-1] / tenths[0]


def row(key: Key, seconds: float, floor_seconds: float) -> dict:
    """Shares are made of the rounded times: what a reader can divide."""
    ms, floor_ms = rounded_ms(key.case, seconds), rounded_ms(key.case, floor_seconds)
    return {
        "system": key.system,
        "case": key.case,
        "lane": key.lane,
        "ms": ms,
        "gbps": round(BYTES[key.case] / seconds / 1e9, 3),
        "of_memcpy": round(floor_ms / ms, 3),
    }


def rounded_ms(case: str, seconds: float) -> float:
    return round(seconds * 1e3, 5 if case == "block" else 3)


def promises(rows: list[dict], overlaps: list[dict], idle_share: float | None) -> list[Bar]:
    """The promises of the P2P backend."""
    found = {(r["system"], r["case"], r["lane"]): r for r in rows}

    def value(column: str, *key) -> float | None:
        return found.get(key, {}).get(column)

    def block(lane: str, limit_us: float) -> Bar:
        ms = value("ms", "kvlane", "block", lane)
        return Bar(f"one block, {lane}", limit_us, " us", True, None if ms is None else ms * 1e3)

    def times(lane: str, peer: str, peer_lane: str, limit: float) -> Bar:
        ours, theirs = value("ms", "kvlane", "request", lane), value("ms", peer, "request", peer_lane)
        name = f"{peer} {peer_lane}" if peer == "nixl" else f"{peer}"
        return Bar(f"request, {lane}: times {name}", limit, "x", False, theirs / ours if ours and theirs else None)

    late = {overlap["lane"]: overlap["of_transfer"] for overlap in overlaps}
    return [
        Bar("request, shm: share of memcpy", 0.6, "", False, value("of_memcpy", "kvlane", "request", "shm")),
        times("shm", "nixl", "default", 2),
        times("tcp", "nixl", "tcp", 3),
        times("tcp", "mooncake", "tcp", 2),
        block("shm", 15),
        block("tcp", 40),
        *(
            Bar(f"pulled while it is computed, {lane}: late by share of a transfer", 0.1, "", True, late.get(lane))
            for lane in ("shm", "tcp")
        ),
        Bar("an idle pair: percent of a core", 1, " %", True, None if idle_share is None else 100 * idle_share),
    ]
