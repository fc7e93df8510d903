"""Splits the CPUs between processes.

Two engines on the same CPUs slow each other down many times: the OpenMP threads of the waiting one spin.
"""

import os


def halves():
    """Two disjoint lists of the CPUs this process may use; the same CPU twice if there is only one."""
    cpus = sorted(os.sched_getaffinity(0))
    middle = len(cpus) // 2
    return (cpus[:middle], cpus[middle:]) if middle else (cpus, cpus)


def omp_binding(cpus, ranks=1):
    """The value of VLLM_CPU_OMP_THREADS_BIND: a list of CPUs per rank."""
    if ranks == 1:
        return ",".join(map(str, cpus))
    share = max(1, len(cpus) // ranks)
    return "|".join(",".join(str(cpus[(rank * share + i) % len(cpus)]) for i in range(share)) for rank in range(ranks))
