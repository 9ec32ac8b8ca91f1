"""Names the machine of a run for a person: processor, cores, memory, and the accelerator in use."""

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

from flexlora.text import count_text

CPU_INFO = Path("/proc/cpuinfo")


def machine_in_words(device: torch.device) -> str:
    """Return the machine that this process runs on, as ``AMD EPYC 7763, 2 cores, 8 GB`` or with its accelerator."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [_processor(), count_text(cores, "core"), *_memory()]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts.insert(0, f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, on")
        return f"{parts[0]} {', '.join(parts[1:])}"
    return ", ".join(parts)


def _processor() -> str:
    """Return the name of the processor; that of its architecture where the system does not tell."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(errors="replace"), re.MULTILINE)
        if found and found.group(1).strip():
            return " ".join(found.group(1).split())
    return platform.processor() or platform.machine() or "unknown processor"


def _memory() -> list[str]:
    """Return the memory of the machine in GB, nothing where the system does not tell."""
    with suppress(OSError, ValueError, AttributeError):
        return [f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB"]
    return []
