"""Puts this folder on the import path, as pytest does for the folder of a conftest.py, so tests can use `support`."""

import importlib.metadata
import os


def pytest_configure(config):
    if os.environ.get("KVLANE_SOAK") == "1":
        from support.soak_results import SoakResults

        config.pluginmanager.register(SoakResults(importlib.metadata.version("vllm")))
