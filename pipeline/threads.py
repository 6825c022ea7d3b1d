"""How many threads a process of kd computes with, for all libraries together. The one place that decides it.

Libraries read their variables when they are loaded, so a process is told before it starts: workers of `--workers N`
and steps of `kd run --jobs N` get their share of the cores, and their libraries the same number each. They take turns
within a process: torch waits while Arrow reads, and a shard is written by one more thread, which mostly waits for the
disk.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

COMPUTE = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "ZARR_THREADING__MAX_WORKERS",
)
"""torch and Arrow read the first, BLAS libraries the next two, tokenizers and zarrs the fourth, zarr the last."""
QUOTAS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that this process may keep busy: those it may run on, or fewer where its container has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def threads_per_process(processes: int, *, variable: str = COMPUTE[0]) -> int:
    """Compute threads for each of `processes` on this machine; what the environment asks for is an upper bound."""
    share = max(1, available_cores() // processes)
    asked = os.environ.get(variable, "")
    return min(share, int(asked)) if asked.isdigit() and int(asked) > 0 else share


def thread_environment(processes: int) -> dict[str, str]:
    """Variables for each of `processes` that compute on this machine at a time, more than one."""
    shares = {name: str(threads_per_process(processes, variable=name)) for name in COMPUTE}
    # Many processes that each ask a disk for ten chunks at a time only wait for one another.
    return shares | {"TOKENIZERS_PARALLELISM": "false", "ZARR_ASYNC__CONCURRENCY": "4"}


def keep_to_quota(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for this process, before it loads a library: none unless a container gives it less than its cores.

    Libraries count cores and know nothing of quotas; with more threads than quota, each waits for the others.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    available = available_cores()
    return {name: str(available) for name in COMPUTE if available < cores and name not in environment}


def _quota() -> float | None:
    """Cores' worth of time that the control group of a container gives it."""
    try:
        if (unified := QUOTAS / "cpu.max").exists():
            quota, period = unified.read_text().split()
        else:
            quota, period = ((QUOTAS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None  # "max", or no such files
