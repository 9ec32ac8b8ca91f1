"""Tells how many cores and how much memory this process may use; a container often has less than its machine."""

import os
from contextlib import suppress
from pathlib import Path

UNKNOWN_MEMORY = 2**40
"""What a system that does not tell is taken to have, in bytes."""

_CPU_QUOTA, _MEMORY_LIMIT = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/memory.max")
_MEMORY_USED, _MEMORY_STATISTICS = Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory.stat")
_MEMORY_STATE = Path("/proc/meminfo")


def num_cores() -> int:
    """Return the number of cores that this process may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA.read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # There is no such file, or it sets no limit.
        return cores


def memory_bytes() -> int:
    """Return the bytes of memory of this machine, or of the container that this process is confined to."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        memory = UNKNOWN_MEMORY
    try:
        return min(memory, int(_MEMORY_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):
        return memory


def most_processes() -> int:
    """Return how many processes or threads anybody could mean to use here; more is a slip of the pen."""
    return max(64, 4 * num_cores())


def free_memory_bytes() -> int:
    """Return the bytes of memory that a process could still take without swapping, in this machine or container."""
    free = memory_bytes() // 2  # Where the system does not tell.
    with suppress(OSError, ValueError, StopIteration):
        lines = _MEMORY_STATE.read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError):
        # Files that the system keeps in memory count as used there, and it gives them up when memory is short.
        statistics = dict(line.split() for line in _MEMORY_STATISTICS.read_text(encoding="ascii").splitlines())
        used = int(_MEMORY_USED.read_text(encoding="ascii")) - int(statistics.get("inactive_file", 0))
        free = min(free, max(0, int(_MEMORY_LIMIT.read_text(encoding="ascii")) - used))
    return free
