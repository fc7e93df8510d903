"""From samples to rows, and the bars that the rows are read against."""

import statistics
from dataclasses import dataclass, field

from workload import REQUEST_BYTES, Sample

MOVES = "of_memcpy is the median over all rounds of (mean of the memcpy before and the memcpy after) / (the case)"

# Reading threads of kvlane on a disk, whatever the row's threads: COLD_READS in crates/fs/src/cold.rs.
COLD_READS = 4

# Names of floors beside memcpy.
DIRECT_READ = "one O_DIRECT read of a file of that size"
DIRECT_READS = f"{COLD_READS} O_DIRECT reads at a time of a file of that size"
BARE_WRITE = "pwritev of the same runs, no checksum"
TWO_MEMCPYS = "memcpy by two threads, half each"

# Only these are calls; all other cases move the whole request.
CALLS_MEDIUM = "memory"


@dataclass(frozen=True, order=True)
class Key:
    """Names one row."""

    medium: str
    case: str
    threads: int
    system: str


@dataclass
class Samples:
    """All samples of the run, by row."""

    by_key: dict[Key, list[Sample]] = field(default_factory=dict)

    def add(self, key: Key, sample: Sample) -> None:
        self.by_key.setdefault(key, []).append(sample)

    def floors(self) -> dict[str, list[float]]:
        """Seconds of every memcpy of the run, by medium."""
        found: dict[str, list[float]] = {}
        for key, samples in self.by_key.items():
            for sample in samples:
                found.setdefault(key.medium, []).extend(sample.floor_seconds)
        return {medium: seconds for medium, seconds in found.items() if seconds}

    def rows(self) -> list[dict]:
        """Exactly one row per key, the floors first."""
        rows = [
            row(Key(medium, "copy", 1, "memcpy"), statistics.median(seconds), 1.0)
            for medium, seconds in self.floors().items()
        ]
        for key in sorted(self.by_key):
            samples = self.by_key[key]
            seconds = statistics.median(sample.seconds for sample in samples)
            if key.medium == CALLS_MEDIUM:
                rows.append(row(key, seconds, None))
                continue
            ratio = statistics.median(statistics.mean(s.floor_seconds) / s.seconds for s in samples)
            rows.append(row(key, seconds, ratio))
        return rows

    def other_floors(self) -> list[dict]:
        """What else bounds a row: the floor's own time, and the row's speed as a share of it."""
        found = []
        for key in sorted(self.by_key):
            samples = self.by_key[key]
            for name in samples[0].other_floors:
                seconds = statistics.median(sample.other_floors[name] for sample in samples)
                share = statistics.median(sample.other_floors[name] / sample.seconds for sample in samples)
                memcpy = [statistics.mean(sample.floor_seconds) / sample.other_floors[name] for sample in samples]
                found.append(
                    {
                        "system": key.system,
                        "case": key.case,
                        "medium": key.medium,
                        "threads": key.threads,
                        "floor": name,
                        "floor_ms": round(seconds * 1e3, 3),
                        "of_floor": round(share, 3),
                        "floor_of_memcpy": round(statistics.median(memcpy), 3),
                    }
                )
        return found

    def spread(self, key: Key) -> tuple[float, float]:
        """Fastest and slowest seconds of a row."""
        is_floor = key.case == "copy"
        seconds = self.floors()[key.medium] if is_floor else [sample.seconds for sample in self.by_key[key]]
        return min(seconds), max(seconds)

    def disturbance(self) -> float:
        """How much slower a memcpy of this run often was (90th percentile) than at best (10th). Quiet: near 1."""
        seconds = [second for floor in self.floors().values() for second in floor]
        if len(seconds) < 2:
            return 1.0
        tenths = statistics.quantiles(seconds, n=10)
        return tenths[-1] / tenths[0]


def row(key: Key, seconds: float, of_memcpy: float | None) -> dict:
    is_call = key.medium == CALLS_MEDIUM
    return {
        "system": key.system,
        "case": key.case,
        "medium": key.medium,
        "threads": key.threads,
        "ms": round(seconds * 1e3, 5 if is_call else 3),
        "gbps": None if is_call else round(REQUEST_BYTES / seconds / 1e9, 3),
        "of_memcpy": None if of_memcpy is None else round(of_memcpy, 3),
    }


@dataclass(frozen=True)
class Bar:
    """One promise: a figure made of rows, and where it should lie."""

    text: str
    limit: float
    unit: str
    is_ceiling: bool
    figure: float | None

    @property
    def holds(self) -> bool | None:
        """None: the rows for it were not run."""
        if self.figure is None:
            return None
        return self.figure <= self.limit if self.is_ceiling else self.figure >= self.limit


def bars(rows: list[dict], other_floors: list[dict]) -> list[Bar]:
    """The promises of the filesystem backend. They are information: a slow machine does not fail the run."""
    found = {(r["system"], r["case"], r["medium"], r["threads"]): r for r in rows}
    direct = [floor["of_floor"] for floor in other_floors if (floor["floor"], floor["threads"]) == (DIRECT_READ, 1)]

    def value(column: str, *key) -> float | None:
        return found.get(key, {}).get(column)

    def of_memcpy(case: str, medium: str, threads: int, limit: float) -> Bar:
        text = f"{medium} {case}, {threads} thread{'s' * (threads > 1)}: share of memcpy"
        return Bar(text, limit, "", False, value("of_memcpy", "kvlane", case, medium, threads))

    def times(peer: str, case: str, medium: str, limit: float) -> Bar:
        # By shares of memcpy: what slows a row slows its own memcpys too, and the rows are not timed together.
        ours, theirs = (value("of_memcpy", system, case, medium, 1) for system in ("kvlane", peer))
        figure = ours / theirs if ours and theirs else None
        return Bar(f"{medium} {case}, 1 thread: times {peer}", limit, "x", False, figure)

    def call(case: str, limit: float, unit: str, per_ms: float) -> Bar:
        ms = value("ms", "kvlane", case, CALLS_MEDIUM, 1)
        return Bar(case, limit, unit, True, None if ms is None else ms * per_ms)

    return [
        of_memcpy("store", "tmpfs", 1, 1.0),
        of_memcpy("load", "tmpfs", 1, 1.0),
        of_memcpy("store", "tmpfs", 2, 1.7),
        of_memcpy("load", "tmpfs", 2, 1.7),
        times("example-connector", "store", "tmpfs", 5),
        times("example-connector", "load", "tmpfs", 3),
        times("vllm-fs", "store", "tmpfs", 3),
        times("vllm-fs", "load", "tmpfs", 2.4),
        of_memcpy("store", "disk", 1, 0.6),
        of_memcpy("store-evicted", "disk", 1, 0.5),
        of_memcpy("load", "disk", 1, 0.75),
        times("example-connector", "store", "disk", 2.5),
        times("example-connector", "load", "disk", 2),
        Bar(
            "disk load-cold, 1 thread: share of an O_DIRECT read of one file",
            0.85,
            "",
            False,
            direct[0] if direct else None,
        ),
        call("lookup", 20, "us", 1e3),
        call("keys-first", 3, "ms", 1),
        call("keys-grown", 100, "us", 1e3),
        call("idle-step", 20, "us", 1e3),
    ]
