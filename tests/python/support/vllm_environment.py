"""Environment variables under which every vLLM of the tests runs."""

import os

from support.cpus import omp_binding


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
