"""Both scheduler classes, a store, and prompts for the tests on paper."""

import os
import random

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# A few hundred numbers per step: a second thread only waits for the first, and spins while it does.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(params=[False, True], ids=["Scheduler", "AsyncScheduler"])
def asynchronous(request):
    return request.param


@pytest.fixture
def store():
    from support.places import make_store, remove_store

    folder = make_store("scheduler")
    yield folder
    remove_store(folder)


@pytest.fixture
def prompts(request):
    """A function of a length in tokens; other prompts in every test, the same in every run."""
    from paper_model import VOCABULARY
    from support.prompts import Prompts

    return Prompts(VOCABULARY, seed=random.Random(request.node.name).randrange(1 << 32)).tokens
