"""From samples to rows, and the bars that the rows are read against.

All rows of a medium share one denominator, the `copy` row: whoever divides its milliseconds by those of a row gets
`of_memcpy`. A row is not divided by the memcpys of its own process: those depend on the pages that the process
happened to get for their buffers, and would so change the share of all of its rows, and of no other's.
"""

import statistics
from dataclasses import dataclass, field

from bars import Bar
from workload import REQUEST_BYTES, Sample

# Reading threads of kvlane on a disk, whatever the row's threads: COLD_READS in crates/fs/src/cold.rs.
COLD_READS = 4

METHOD = (
    "of_memcpy is the ms of the medium's copy row divided by the ms of the row. A copy row is the median over all "
    "pairs of buffers in every process of the run (memcpy_ms) of the median of their memcpys, timed before and after "
    "cases. The ms of other rows are medians over all rounds. threads counts copying threads; on a disk kvlane has "
    f"{COLD_READS} more, on the same cores, that read from the device."
)

# Names of floors beside memcpy.
DIRECT_READ = "one O_DIRECT read of a file of that size"
DIRECT_READS = f"{COLD_READS} O_DIRECT reads at a time of a file of that size"
BARE_WRITE = "pwritev of the same runs, no checksum"
TWO_MEMCPYS = "memcpy by two threads, half each"

# A memcpy between the same buffers that varies by more than this met other work, and so did everything else.
DISTURBED = 1.3

# Only these are calls; all other cases move the whole request.
CALLS_MEDIUM = "memory"


@dataclass(frozen=True, order=True)
class Key:
    """Names one row."""

    medium: str
    case: str
    threads: int
    system: str

    @property
    def name(self) -> str:
        return f"{self.system} {self.case} {self.medium} {self.threads}"

    @property
    def group(self) -> tuple[str, str]:
        """Rows of one group are measured next to each other."""
        return self.medium, self.case


@dataclass
class Samples:
    """All samples of the run, by row."""

    by_key: dict[Key, list[Sample]] = field(default_factory=dict)

    def add(self, key: Key, sample: Sample) -> None:
        self.by_key.setdefault(key, []).append(sample)

    def drop(self, key: Key) -> None:
        """Takes a row out: what could not be run in every set of processes is not measured."""
        self.by_key.pop(key, None)

    def memcpys(self, medium: str | None = None) -> dict[str, list[float]]:
        """Seconds of every memcpy of the run, or of one medium's turns, by the place of its buffers."""
        found: dict[str, list[float]] = {}
        for key, samples in self.by_key.items():
            if medium in (None, key.medium):
                for sample in samples:
                    found.setdefault(sample.floor_place, []).extend(sample.floor_seconds)
        return {place: seconds for place, seconds in found.items() if seconds}

    def floors(self) -> dict[str, float]:
        """Seconds of the one memcpy that all rows of a medium are divided by. Each place counts once."""
        found = {}
        for medium in dict.fromkeys(key.medium for key in self.by_key):
            if memcpys := self.memcpys(medium):
                found[medium] = statistics.median(map(statistics.median, memcpys.values()))
        return found

    def rows(self) -> list[dict]:
        """Exactly one row per key, the floors first."""
        floors = self.floors()
        rows = [row(Key(medium, "copy", 1, "memcpy"), seconds, seconds) for medium, seconds in floors.items()]
        for key in sorted(self.by_key):
            seconds = statistics.median(sample.seconds for sample in self.by_key[key])
            rows.append(row(key, seconds, floors.get(key.medium)))
        return rows

    def other_floors(self) -> list[dict]:
        """What else bounds a row: the floor's own time, and the row's speed as a share of it."""
        found, floors = [], self.floors()
        for key in sorted(self.by_key):
            samples = self.by_key[key]
            row_ms = milliseconds(statistics.median(sample.seconds for sample in samples))
            for name in samples[0].other_floors:
                floor_ms = milliseconds(statistics.median(sample.other_floors[name] for sample in samples))
                found.append(
                    {
                        "system": key.system,
                        "case": key.case,
                        "medium": key.medium,
                        "threads": key.threads,
                        "floor": name,
                        "floor_ms": floor_ms,
                        "of_floor": round(floor_ms / row_ms, 3),
                        "floor_of_memcpy": round(milliseconds(floors[key.medium]) / floor_ms, 3),
                    }
                )
        return found

    def spread(self, key: Key) -> tuple[float, float]:
        """Fastest and slowest seconds of a row."""
        if key.case == "copy":
            seconds = [second for memcpys in self.memcpys(key.medium).values() for second in memcpys]
        else:
            seconds = [sample.seconds for sample in self.by_key[key]]
        return min(seconds), max(seconds)

    def memcpy_ms(self) -> dict[str, float]:
        """What a memcpy took in each place: by how much they differ, rows of other processes may differ too."""
        return {place: milliseconds(statistics.median(seconds)) for place, seconds in sorted(self.memcpys().items())}

    def disturbance(self) -> float:
        """How much slower a memcpy of this run often was (90th percentile) than at best (10th). Quiet: near 1.

        Only memcpys between the same buffers are compared: other buffers are not a disturbance.
        """
        relative = []
        for seconds in self.memcpys().values():
            usual = statistics.median(seconds)
            relative += [second / usual for second in seconds]
        if len(relative) < 2:
            return 1.0
        tenths = statistics.quantiles(relative, n=10)
        return tenths[-1] / tenths[0]


def row(key: Key, seconds: float, floor_seconds: float | None) -> dict:
    """Shares are made of the rounded times: what a reader can divide."""
    is_call = key.medium == CALLS_MEDIUM
    ms = round(seconds * 1e3, 5) if is_call else milliseconds(seconds)
    return {
        "system": key.system,
        "case": key.case,
        "medium": key.medium,
        "threads": key.threads,
        "ms": ms,
        "gbps": None if is_call else round(REQUEST_BYTES / seconds / 1e9, 3),
        "of_memcpy": None if is_call or floor_seconds is None else round(milliseconds(floor_seconds) / ms, 3),
    }


def milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def promises(rows: list[dict], other_floors: list[dict]) -> list[Bar]:
    """The promises of the filesystem backend."""
    found = {(r["system"], r["case"], r["medium"], r["threads"]): r for r in rows}
    direct = [floor["of_floor"] for floor in other_floors if (floor["floor"], floor["threads"]) == (DIRECT_READ, 1)]

    def value(column: str, *key) -> float | None:
        return found.get(key, {}).get(column)

    def of_memcpy(case: str, medium: str, threads: int, limit: float) -> Bar:
        text = f"{medium} {case}, {threads} thread{'s' * (threads > 1)}: share of memcpy"
        return Bar(text, limit, "", False, value("of_memcpy", "kvlane", case, medium, threads))

    def times(peer: str, case: str, medium: str, limit: float) -> Bar:
        ours, theirs = (value("ms", system, case, medium, 1) for system in ("kvlane", peer))
        figure = theirs / ours if ours and theirs else None
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
