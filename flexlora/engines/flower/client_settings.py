"""Defines what the user of a client decides, which no server can change."""

from dataclasses import dataclass
from pathlib import Path

from flexlora.federation.client_types import type_plan
from flexlora.federation.clients import RankPlan
from flexlora.training.base_model import ModelDtype


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
        trust_remote_code: Let a hub repository that ``model`` names run its own model code.
    """

    client_id: str
    data: Path
    plan: RankPlan | None
    model: str = "embedded"
    revision: str | None = None
    device: str = "auto"
    num_threads: int | None = None
    dtype: ModelDtype | None = None
    trust_remote_code: bool = False


def uniform_plan(rank: int) -> RankPlan:
    """Return the plan with one rank in every module, named after it."""
    return type_plan(f"rank-{rank}", rank, rank)
