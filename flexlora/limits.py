"""Tells how many cores and how much memory this process may use; a container often has less than its machine."""

import os
from pathlib import Path

UNKNOWN_MEMORY = 2**40
"""What a system that does not tell is taken to have, in bytes."""

_CPU_QUOTA, _MEMORY_LIMIT = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/memory.max")


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
