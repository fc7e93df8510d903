"""Counts what the tests of a soak did, for tests/results/soak-*.json.

A report says less than it seems to where a run was cut short, so "passed" needs a finished session, at least one passed
test and no failure.
"""

import collections
import json
import os
import pathlib

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "results"

#: Folder or file of tests below tests/python, and the campaign that it is.
CAMPAIGNS = {"scheduler": "scheduler", "e2e": "modes", "test_p2p_server_faults.py": "p2p-faults"}

#: What is drawn from a seed: how it is counted, and by which part of a test's name it is known.
DRAWN = {"p2p-faults": ("fault_rounds", "one_that_comes_back")}
DRAWN_ELSEWHERE = ("random_campaigns", "random_campaign")


class SoakResults:
    """A pytest plugin; `conftest.py` registers it when KVLANE_SOAK=1."""

    def __init__(self, version, results=RESULTS):
        self._version = version
        self._results = results
        self._counts = {}

    def pytest_runtest_logreport(self, report):
        campaign = _campaign_of(report.nodeid)
        if campaign is None:
            return
        counts = self._counts.setdefault(campaign, collections.Counter())
        if report.failed:
            # Of a test's three parts at most one counts, and a failure hides what the others say.
            counts["failed"] += 1
            counts["passed"] -= report.when == "teardown"
        elif report.skipped:
            counts["skipped"] += 1
        elif report.when == "call":
            counts["passed"] += 1
            drawn, part_of_name = DRAWN.get(campaign, DRAWN_ELSEWHERE)
            counts[drawn] += part_of_name in report.nodeid

    def pytest_sessionfinish(self, exitstatus):
        for campaign, counts in self._counts.items():
            drawn, _ = DRAWN.get(campaign, DRAWN_ELSEWHERE)
            complete = exitstatus in (0, 1) and counts["passed"] > 0 and counts["failed"] == 0
            report = {
                "campaign": campaign,
                "vllm": self._version,
                # Prompts are drawn from a test's own name, what is counted as drawn counts up from this.
                "seed": int(os.environ.get("KVLANE_SEED", "1")),
                "counts": {name: counts[name] for name in ("passed", "failed", "skipped", drawn)},
                "outcome": "passed" if complete else "failed",
            }
            self._results.mkdir(parents=True, exist_ok=True)
            path = self._results / f"soak-{campaign}-{self._version}.json"
            path.write_text(json.dumps(report, indent=2) + "\n")


def _campaign_of(nodeid):
    # A file says more than the folder that it is in.
    parts = reversed(nodeid.split("::")[0].split("/"))
    return next((CAMPAIGNS[part] for part in parts if part in CAMPAIGNS), None)
