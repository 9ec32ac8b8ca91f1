"""Small PEFT models, and NVFlare's own messages as they come off the wire."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

ALPHA = 6.0


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(6, 5, bias=False), nn.Linear(5, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tall(self.wide(x))


def adapted(rank: int, **settings: Any) -> PeftModel:
    """Return a PEFT model whose base has the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        settings = {"lora_alpha": int(ALPHA), "target_modules": ["wide", "tall"], **settings}
        return get_peft_model(TwoLayers(), LoraConfig(r=rank, **settings))


@pytest.fixture
def make_model() -> Callable[..., PeftModel]:
    return adapted


class RecordingEngine:
    """The part of a server that a component talks to: it keeps events, and knows the workspace."""

    def __init__(self, workspace: Any = None) -> None:
        self.events: list[tuple[str, Any]] = []
        self._workspace = workspace

    def fire_event(self, event_type: str, fl_ctx: Any) -> None:
        self.events.append((event_type, fl_ctx.get_prop("__event_data__")))

    def get_workspace(self) -> Any:
        return self._workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Any:
    from nvflare.apis.workspace import Workspace

    for folder in ("startup", "local"):
        (tmp_path / "server" / folder).mkdir(parents=True)
    return Workspace(str(tmp_path / "server"), site_name="server")


@pytest.fixture
def make_engine() -> Callable[..., RecordingEngine]:
    return RecordingEngine
