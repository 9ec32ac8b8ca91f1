"""Defines what the user of a client decides, which no server can change."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flexlora.data.data_files import kind_of
from flexlora.errors import FlexLoraError
from flexlora.federation.client_types import type_plan
from flexlora.federation.clients import RankPlan

CONFIG_KEYS = ("data", "rank", "name", "model", "revision", "device", "num-threads", "dtype", "trust-remote-code")
"""Keys of the ``--node-config`` of a SuperNode that ``settings_from`` reads."""


class ClientSettingsError(FlexLoraError, ValueError):
    """Settings of a client that are missing or wrong."""


@dataclass(frozen=True)
class ClientSettings:
    """One client, as its own user wants it.

    Attributes:
        client_id: Its name in the federation, unique and the same after every restart.
        data: File or folder with its rows; they never leave this machine.
        plan: Its LoRA ranks; None leaves them to ``ClientWork``'s ``choose_plan``.
        model: Hub id, local folder or GGUF file of its base model, or ``embedded``. The server's name for it only has
            to be the same; where this is a local folder or file, its weights alone decide.
        revision: Branch, tag or commit of ``model`` on the hub.
        device: Where to train: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, ``mps``.
        num_threads: CPU threads of tensor work; None is 1 for a base of at most 200 million parameters, as a simulation
            has it, else PyTorch's own choice.
        dtype: Of the base weights in memory; None is that of the run.
        quantization: Store the base weights in 8 or 4 bits.
        gradient_checkpointing: Compute activations a second time instead of keeping them.
        trust_remote_code: Let a hub repository that ``model`` names run its own model code.
    """

    client_id: str
    data: Path
    plan: RankPlan | None
    model: str = "embedded"
    revision: str | None = None
    device: str = "auto"
    num_threads: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    quantization: Literal["8bit", "4bit"] | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


def uniform_plan(rank: int) -> RankPlan:
    """Return the plan with one rank in every module, named after it."""
    return type_plan(f"rank-{rank}", rank, rank)


def settings_from(node_config: Mapping[str, Any]) -> ClientSettings:
    """Return the settings that the user of a SuperNode gave it; keys of others are passed over.

    ``data`` is needed. ``name`` is by default that of the file or folder, without endings. Without ``rank``, the ranks
    are left open.

    Raises:
        ClientSettingsError: Naming the key that is missing or wrong.
    """
    data = node_config.get("data")
    if not isinstance(data, str) or not data:
        raise ClientSettingsError(
            "a client needs its data: start its SuperNode with --node-config 'data=\"FILE_OR_FOLDER\" rank=8'"
        )
    path = Path(data).expanduser()
    rank = node_config.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ClientSettingsError(f"rank in --node-config must be a whole number of at least 1; got {rank!r}")
    dtype = node_config.get("dtype")
    if dtype not in (None, "float32", "bfloat16"):
        raise ClientSettingsError(f"dtype in --node-config must be float32 or bfloat16; got {dtype!r}")
    threads = node_config.get("num-threads")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ClientSettingsError(f"num-threads in --node-config must be a whole number of at least 1; got {threads!r}")
    revision = node_config.get("revision")
    return ClientSettings(
        client_id=str(node_config.get("name") or kind_of(path).stem),
        data=path,
        plan=None if rank is None else uniform_plan(rank),
        model=str(node_config.get("model", "embedded")),
        revision=None if revision is None else str(revision),
        device=str(node_config.get("device", "auto")),
        num_threads=threads,
        dtype=dtype,
        trust_remote_code=node_config.get("trust-remote-code") is True,
    )
