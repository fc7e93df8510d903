"""Risk: a soak leaves no record of what it did, or one that says "passed" about tests that failed or never ran."""

import json
import types

import pytest

from support.soak_results import SoakResults

ROUND = (
    "tests/python/e2e/test_p2p_server_faults.py::"
    "test_the_other_server_answers_rightly_and_works_with_the_one_that_comes_back"
)
CAMPAIGN = "tests/python/scheduler/test_campaign.py::test_every_answer_is_right_in_a_random_campaign"


def report(nodeid, outcome="passed", when="call"):
    return types.SimpleNamespace(
        nodeid=nodeid, when=when, failed=outcome == "failed", skipped=outcome == "skipped", passed=outcome == "passed"
    )


def written(folder, reports, exitstatus=0):
    """The files of a session with these reports, by name."""
    plugin = SoakResults("0.32.0", folder)
    for each in reports:
        plugin.pytest_runtest_logreport(each)
    plugin.pytest_sessionfinish(exitstatus)
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_each_campaign_leaves_a_file_with_seed_counts_and_outcome(tmp_path, monkeypatch):
    monkeypatch.setenv("KVLANE_SEED", "17")
    files = written(
        tmp_path,
        [
            *(report(f"{CAMPAIGN}[{seed}]", when=when) for seed in range(3) for when in ("setup", "call", "teardown")),
            report("tests/python/scheduler/test_aborts.py::test_a"),
            report("tests/python/e2e/test_modes.py::test_b"),
            report("tests/python/e2e/test_tensor_parallel.py::test_c", "skipped", "setup"),
            report("tests/python/units/test_chain.py::test_d"),
            *(report(f"{ROUND}[{seed}]") for seed in range(2)),
            report("tests/python/e2e/test_p2p_server_faults.py::test_e"),
        ],
    )
    assert files == {
        "soak-scheduler-0.32.0.json": {
            "campaign": "scheduler", "vllm": "0.32.0", "seed": 17, "outcome": "passed",
            "counts": {"passed": 4, "failed": 0, "skipped": 0, "random_campaigns": 3},
        },
        "soak-modes-0.32.0.json": {
            "campaign": "modes", "vllm": "0.32.0", "seed": 17, "outcome": "passed",
            "counts": {"passed": 1, "failed": 0, "skipped": 1, "random_campaigns": 0},
        },
        "soak-p2p-faults-0.32.0.json": {
            "campaign": "p2p-faults", "vllm": "0.32.0", "seed": 17, "outcome": "passed",
            "counts": {"passed": 3, "failed": 0, "skipped": 0, "fault_rounds": 2},
        },
    }  # fmt: skip


@pytest.mark.parametrize("when", ["setup", "call", "teardown"])
def test_one_failure_anywhere_makes_the_outcome_failed(tmp_path, when):
    parts = [report(CAMPAIGN, "failed" if part == when else "passed", part) for part in ("setup", "call", "teardown")]
    other = report("tests/python/scheduler/test_aborts.py::test_a")
    file = written(tmp_path, [other, *parts], exitstatus=1)["soak-scheduler-0.32.0.json"]
    assert file["outcome"] == "failed"
    assert file["counts"]["failed"] == 1


@pytest.mark.parametrize(
    ("reports", "exitstatus"),
    [([report(CAMPAIGN)], 2), ([report(CAMPAIGN, "skipped")], 0)],
    ids=["interrupted", "nothing ran"],
)
def test_a_session_that_shows_nothing_has_not_passed(tmp_path, reports, exitstatus):
    assert written(tmp_path, reports, exitstatus)["soak-scheduler-0.32.0.json"]["outcome"] == "failed"
