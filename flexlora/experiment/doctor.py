"""Checks whether this machine is ready: versions, devices, files and offline state."""

import importlib.metadata
import importlib.util
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from flexlora.data.pretraining import BASE_FOLDER
from flexlora.hub_reach import hub_address, hub_is_reached, offline_switch
from flexlora.limits import num_cores

REQUIRED = ("torch", "transformers", "peft", "safetensors", "scipy", "rouge-score", "pydantic", "matplotlib")


# Package -> the extra that installs it, and what it is for.
OPTIONAL = {"datasets": ("flexlora[hub]", "parquet and hub data sets"), "ray": ("flexlora[ray]", "clusters")}


LITTLE_DISK_BYTES = 2 * 10**9
"""With less free space, a warning."""


HUB_SECONDS = 2.0
"""Time that the hub has to answer."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: What was checked.
        found: What is there.
        is_fine: Whether nothing needs to be done.
        fix: What to do; empty when nothing.
        is_fatal: Whether ``flexlora run`` cannot work this way.
    """

    check: str
    found: str
    is_fine: bool = True
    fix: str = ""
    is_fatal: bool = False

    def to_json(self) -> dict[str, str | bool]:
        """Return the fields as a plain mapping."""
        return asdict(self)


def examine() -> list[Finding]:
    """Return the result of every check."""
    return [
        _flexlora(),
        _python(),
        *(_package(name) for name in REQUIRED),
        *(_optional(name, *what) for name, what in OPTIONAL.items()),
        _device(),
        _threads(),
        _hub(),
        _embedded_model(),
        _disk(),
    ]


def _flexlora() -> Finding:
    try:
        return Finding("flexlora", importlib.metadata.version("flexlora"))
    except importlib.metadata.PackageNotFoundError:
        return Finding("flexlora", "a source tree, not installed", False, "pip install .")


def _python() -> Finding:
    return Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", False, f"pip install {name}", True)


def _optional(name: str, extra: str, purpose: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, "not installed", False, f"pip install '{extra}', for {purpose}")
    return Finding(name, importlib.metadata.version(name))


def _device() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("device", "unknown without torch", False, "pip install torch", True)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        bfloat16 = "with" if torch.cuda.is_bf16_supported() else "without"
        return Finding("device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bfloat16} bfloat16")
    built = torch.version.cuda
    if built:
        return Finding("device", f"CPU; torch is built for CUDA {built} but sees no GPU", False, "check nvidia-smi")
    return Finding("device", "CPU")


def _threads() -> Finding:
    import torch

    cores, threads = num_cores(), torch.get_num_threads()
    if threads > cores:
        return Finding("threads", f"{threads} on {cores} cores", False, "unset OMP_NUM_THREADS")
    return Finding("threads", f"{threads} on {cores} cores")


def _hub() -> Finding:
    if switch := offline_switch():
        return Finding("hub", f"{switch} is set: only local folders and what is already cached")
    if hub_is_reached(HUB_SECONDS):
        return Finding("hub", f"{hub_address()} answers; contacted only for hub ids, and never with HF_HUB_OFFLINE=1")
    found = f"{hub_address()} does not answer within {HUB_SECONDS:g} s: only local folders and what is already cached"
    return Finding("hub", found, False, "check the network, if you need models of the hub")


def _embedded_model() -> Finding:
    weights = BASE_FOLDER / "model.safetensors"
    if not weights.is_file():
        return Finding("embedded model", f"{weights} is missing", False, "reinstall flexlora", True)
    return Finding("embedded model", f"{weights.stat().st_size / 1e6:.1f} MB")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 1e9:.0f} GB free here"
    if free < LITTLE_DISK_BYTES:
        return Finding("disk", found, False, "free some space or choose --out on another disk")
    return Finding("disk", found)
