"""The code in docs/flower.md runs, and the example app is one that Flower takes."""

import re
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.cli.config_utils import load_and_validate
from peft import LoraConfig, get_peft_model
from torch import nn

import flexlora
from flexlora.engines.flower.client_settings import CONFIG_KEYS

ROOT = Path(flexlora.__file__).parents[1]
PAGE = (ROOT / "docs" / "flower.md").read_text()


def load_model(rank: int) -> Any:
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 20))
    return get_peft_model(network, LoraConfig(r=rank, lora_alpha=16, target_modules=["0", "2"]))


def train(model: Any) -> tuple[int, float]:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1
    return 10, 1.5


@pytest.fixture
def apps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the apps of the page, with a small network of ours for the reader's."""
    mine = types.ModuleType("my_training")
    mine.load_model, mine.train = load_model, train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_training", mine)
    blocks = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL)
    found: dict[str, Any] = {}
    for name, code in blocks:
        scope: dict[str, Any] = {}
        exec(compile(code, name, "exec"), scope)
        found[name] = scope["app"]
    return found


class Nodes:
    """A Grid of two nodes that run the page's ClientApp."""

    def __init__(self, app: Any) -> None:
        self.app, self.ranks = app, {11: 2, 12: 16}

    def get_node_ids(self) -> list[int]:
        return list(self.ranks)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = "message"
            node_id = message.metadata.dst_node_id
            replies.append(self.app(message, Context(1, node_id, {"rank": self.ranks[node_id]}, RecordDict(), {})))
        return replies


def test_the_apps_of_the_page_run_three_rounds(apps: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    context = Context(1, 1, {}, RecordDict(), {})
    apps["server_app"](Nodes(apps["client_app"]), context)
    assert "lora_A.weight" in capsys.readouterr().out.splitlines()[-1]


def test_the_example_app_is_one_that_flower_takes() -> None:
    project, problems = load_and_validate(ROOT / "examples" / "flower-app" / "pyproject.toml")
    assert not problems
    components = project["tool"]["flwr"]["app"]["components"]
    for reference in components.values():
        module = reference.partition(":")[0].replace(".", "/")
        assert (ROOT / "examples" / "flower-app" / f"{module}.py").is_file()


def test_the_page_names_every_key_of_a_node() -> None:
    table = re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE)
    named = {key for cell in table for key in cell.replace("`", "").split(", ")}
    assert set(CONFIG_KEYS) <= named
