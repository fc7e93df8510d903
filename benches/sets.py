"""Sets of worker processes, and the rounds in which all systems of a set take turns.

Each system has long-lived worker processes; in each round all of them take one turn per case, so whatever disturbs the
machine meets all. How fast memory is copied depends on the pages that a process got. So after a few rounds all workers
end, and new ones start: a set. In each set the workers get their memory in another order, and every set's first round
is not counted.
"""

import argparse
import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from turns import NotRun, Worker, WorkerFailed
from workload import Sample

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """What all sets of workers add to. ``samples`` has `add` and `drop`.

    A key is a dataclass with `system`; its other fields are a turn's arguments. Beside them it has a `name`, and a
    `group`: rows that are measured next to each other.
    """

    samples: Any
    not_run: dict[Any, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    rounds_begun: int = 0
    shuffle: random.Random = field(default_factory=lambda: random.Random(0))

    def not_run_lines(self) -> list[str]:
        return [f"{key.name}: {reason}" for key, reason in self.not_run.items()]


@contextlib.contextmanager
def workers(
    starts: Iterable[tuple[str, Callable[[], Worker]]],
    key_of: Callable[..., Any],
    is_wanted: Callable[[Any], bool],
    run: Run,
) -> Iterator[dict[Any, Worker]]:
    """A new process for each of ``starts``, ready for its turns: by row, without those that cannot be run."""
    started: list[tuple[str, Worker]] = []
    by_key: dict[Any, Worker] = {}
    try:
        for system, start in starts:
            started.append((system, start()))
        # They import together, and get their memory one after the other: who is first gets other pages.
        for system, worker in run.shuffle.sample(started, len(started)):
            run.versions |= worker.call("versions")
            for case in worker.call("cases"):
                key = key_of(system, *case)
                if is_wanted(key) and key not in run.not_run:
                    by_key[key] = worker
        yield by_key
    finally:
        for _, worker in started:
            worker.close()


def read_options(
    parser: argparse.ArgumentParser,
    arguments: list[str],
    names: list[str],
    counts: tuple[int, int],
    quick_counts: tuple[int, int],
    result: Path,
) -> argparse.Namespace:
    """What every comparison can be told. ``names``: what --only may list. ``counts``: sets, and rounds in each."""
    parser.add_argument("--json", type=Path, help=f"write the rows here (a whole run: {result.relative_to(ROOT)})")
    parser.add_argument("--quick", action="store_true", help=f"{quick_counts[0]} set instead of {counts[0]}")
    parser.add_argument("--sets", type=int, help="how often all workers start anew")
    parser.add_argument("--rounds", type=int, help="number of rounds in each set")
    parser.add_argument("--only", default="", help="comma-separated names; others of their kind are left out")
    options = parser.parse_args(arguments)
    options.only = {name for name in options.only.split(",") if name}
    if unknown := options.only - {*names}:
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; known: {', '.join(names)}")
    sets, rounds = quick_counts if options.quick else counts
    options.sets, options.rounds = options.sets or sets, options.rounds or rounds
    if options.json is None and not options.quick and not options.only:
        options.json = result
    return options


def python_of(environment: str) -> Path:
    """The interpreter of an environment that tests/env/build.sh makes."""
    python = ROOT / environment / "bin" / "python"
    if not python.exists():
        name = environment.removeprefix(".venv").removeprefix("-") or "main"
        raise WorkerFailed(f"{environment} is missing; build it: tests/env/build.sh {name}")
    return python


def wanted(only: set[str], kind: Iterable[str], name: str) -> bool:
    """Names of one kind (system, case, medium) in --only exclude the others of that kind."""
    return name in only or not only.intersection(kind)


def take_turns(by_key: dict[Any, Worker], rounds: int, run: Run, title: str) -> None:
    """The first round is not counted: it opens files, fills stores and starts threads."""
    keys = sorted(by_key)
    total = len(keys) * (rounds + 1)
    with tqdm(total=total, file=sys.stderr, unit="turn", mininterval=1, dynamic_ncols=True) as progress:
        for number in range(rounds + 1):
            for key in in_turn(keys, run.shuffle):
                progress.set_description(f"{title}: {key.name}", refresh=False)
                arguments = {name: value for name, value in asdict(key).items() if name != "system"}
                try:
                    sample = Sample(**by_key[key].call("turn", round_number=run.rounds_begun, **arguments))
                    if number:
                        run.samples.add(key, sample)
                except NotRun as reason:
                    run.not_run[key] = str(reason)
                    run.samples.drop(key)
                    keys.remove(key)
                progress.update()
            run.rounds_begun += 1


def in_turn(keys: list[Any], shuffle: random.Random) -> list[Any]:
    """The order of a round: the systems of one group follow each other, in another order each round."""
    place = {key.group: shuffle.random() for key in keys}
    return sorted(keys, key=lambda key: (place[key.group], shuffle.random()))
