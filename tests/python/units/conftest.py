"""What all unit tests take for granted."""

import time

import pytest

from kvlane.vllm import weights


@pytest.fixture(autouse=True)
def weights_are_older_than_the_process(monkeypatch):
    """As on a real server; the tests make theirs while they run."""
    monkeypatch.setattr(weights, "process_start_s", lambda: time.time() + 3600)
