"""The vLLM of the tests, and the environment variables under which every one runs."""

import importlib.metadata
import os

from packaging.version import Version

from support.cpus import omp_binding

#: vLLM up to 0.21 makes no steps without requests, so it takes back what was let go with the next one only.
TAKES_BACK_WITH_A_REQUEST = Version(importlib.metadata.version("vllm")).release < (0, 22)


def vllm_environment(cpus, kv_cache_gb=1):
    """The environment of a vLLM process on these CPUs: offline, CPU backend, nothing compiled at run time."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gb),
        "VLLM_CPU_OMP_THREADS_BIND": omp_binding(cpus),
        "VLLM_LOGGING_LEVEL": "INFO",
        # A few small functions are compiled even in eager mode: up to 40 s at the first request.
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
    }
