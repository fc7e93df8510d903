"""Runs the claims about the GPU lanes: on the machine's own CUDA driver, or on a stand-in that is named.

    python run.py                      on the driver; without one, one sentence and status 1
    python run.py --stand-in LIBRARY   on the stand-in; the result says nothing about a GPU
    python run.py NAME...              only tests whose name has one of these in it

Needs Python 3.10, kvlane on the import path, and nothing else. Where PyTorch has CUDA, caches are its tensors.
"""

import argparse
import faulthandler
import logging
import sys
import time
import unittest
from pathlib import Path
from typing import Any

from driver import driver
from which_driver import described, find_driver

#: A suite that takes this long hangs; it then says where.
LIMIT_S = 540


class Result(unittest.TextTestResult):
    """One line for each test when it has ended, with the driver that it ran on."""

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self._say(test, "ok")

    def addFailure(self, test: unittest.TestCase, error: Any) -> None:
        super().addFailure(test, error)
        self._say(test, "FAILED")

    def addError(self, test: unittest.TestCase, error: Any) -> None:
        super().addError(test, error)
        self._say(test, "FAILED")

    def addSubTest(self, test: unittest.TestCase, part: unittest.TestCase, error: Any) -> None:
        super().addSubTest(test, part, error)
        if error is not None:
            self._say(part, "FAILED")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self._say(test, f"left out: {reason}")

    def _say(self, test: unittest.TestCase, outcome: str) -> None:
        seconds = time.monotonic() - self._started_s
        print(f"[{driver().place}] {test.id()}: {outcome} ({seconds:.1f} s)", flush=True)

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._started_s = time.monotonic()


def main() -> int:
    options = parse(sys.argv[1:])
    found = find_driver(options.stand_in, "these tests")
    if isinstance(found, str):
        print(f"kvlane: {found}", file=sys.stderr)
        return 1
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    # What is expected to fail fails with a log line each.
    logging.getLogger("vllm.kvlane").addHandler(logging.NullHandler())
    print(f"kvlane: GPU tests on {described(found)}", flush=True)
    tests = [test for test in all_tests() if not options.names or any(name in test.id() for name in options.names)]
    runner = unittest.TextTestRunner(stream=sys.stdout, verbosity=0, resultclass=Result)
    result = runner.run(unittest.TestSuite(tests))
    outcome = "passed" if result.wasSuccessful() and tests else "FAILED"
    bad = len({test.id() for test, _ in result.failures + result.errors})
    print(f"kvlane: GPU tests {outcome}: {result.testsRun} ran, {bad} failed, on {described(found)}", flush=True)
    return 0 if outcome == "passed" else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stand-in", metavar="LIBRARY", help="the stand-in for libcuda, colons, further ones")
    parser.add_argument("names", nargs="*")
    return parser.parse_args(arguments)


def all_tests() -> list[unittest.TestCase]:
    suite = unittest.defaultTestLoader.discover(str(Path(__file__).parent), "test_*.py")

    def flat(tests: unittest.TestSuite) -> list[unittest.TestCase]:
        found = []
        for test in tests:
            found += flat(test) if isinstance(test, unittest.TestSuite) else [test]
        return found

    return flat(suite)


if __name__ == "__main__":
    sys.exit(main())
