"""Names the machine of a run for a person: processor, cores, memory, and the accelerator in use."""

import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

from flexlora.limits import UNKNOWN_MEMORY, memory_bytes, num_cores
from flexlora.text import count_text

CPU_INFO = Path("/proc/cpuinfo")


def machine_in_words(device: torch.device) -> str:
    """Return the machine that this process runs on, as ``AMD EPYC 7763, 2 cores, 8 GB`` or with its accelerator."""
    memory = memory_bytes()
    parts = [_processor(), count_text(num_cores(), "core")]
    parts += [f"{memory / 1e9:.0f} GB"] if memory != UNKNOWN_MEMORY else []
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
