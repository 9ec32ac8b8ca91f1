"""What rank groups are scored with."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

import flexlora.experiment.scoring as scoring
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.participants import gather_participants
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.training.evaluation import Score

MODULE = "model.layers.0.self_attn.q_proj"


def scored_with(method: Mapping[str, object], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Sequence[str]]]:
    """Return adapter and tasks of each score that rank groups of a method are made of."""
    config = parse_config(
        {
            "method": method,
            "data": {"name": "generated", "num_clients": 4, "num_unseen_tasks": 1, "examples_per_task": 12},
            "clients": {"types": "small", "distribution": {"type2": 1}},
            "evaluation": {"rank_group_clients": 2},
        },
        "test",
    )
    seen: list[tuple[Any, Sequence[str]]] = []

    def score(
        loaded: LoadedRun, adapter: Broadcast | None, tasks: Mapping[str, Sequence[object]], subject: str
    ) -> dict[str, Score]:
        seen.append((adapter, sorted(tasks)))
        return {task: Score(1.0, 0.0, 1.0, 1, 1) for task in tasks}

    monkeypatch.setattr(scoring, "score", score)
    model: Any = None  # Nothing is really scored.
    loaded = LoadedRun(config, gather_participants(config), model, {MODULE: (3, 5)}, Scaling("rslora", 1.0), "base")
    factors = LoraFactors(torch.ones(2, 5), torch.ones(3, 2), 1.0)
    scoring.Scorer(loaded).rank_groups(lambda plan: Broadcast({MODULE: factors}, {MODULE: factors}))
    return seen


@pytest.mark.parametrize(
    "method",
    [
        {"name": "flexlora", "fold_tail": True},
        {"name": "flexlora", "fold_tail": True, "server_momentum": 0.5},
        {"name": "flexlora", "fold_tail": True, "energy": 0.9},
        {"name": "aligned"},
        {"name": "fed_plora"},
    ],
)
def test_a_rank_group_is_scored_without_the_tail_that_its_rank_cannot_hold(
    method: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = [adapter for adapter, _ in scored_with(method, monkeypatch) if adapter is not None]
    assert len(adapters) == 2 and all(adapter.frozen is None for adapter in adapters)


@pytest.mark.parametrize("name", ["fedex_lora", "flora", "florist"])
def test_a_rank_group_has_what_a_paper_adds_to_the_base_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = [adapter for adapter, _ in scored_with({"name": name}, monkeypatch) if adapter is not None]
    assert len(adapters) == 2 and all(adapter.frozen for adapter in adapters)


def test_a_rank_group_has_no_score_on_own_data_where_clients_keep_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(scored_with({"name": "flexlora"}, monkeypatch)) == 3
    assert len(scored_with({"name": "fedsa_lora"}, monkeypatch)) == 1
