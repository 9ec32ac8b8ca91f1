"""Loops over four small clients, whose training is a function, and what tests ask of them."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexlora.aggregators.base import state_types
from flexlora.aggregators.registry import AGGREGATORS
from flexlora.engines.base import RoundOrder
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast, ClientFailure, Update
from flexlora.federation.streams import stream_seed
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.rounds.clock import Clock, Policy
from flexlora.rounds.costs import ClientCost
from flexlora.rounds.devices import DeviceProfile
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.loop_parts import Federation, Loop, RoundSettings
from flexlora.rounds.records import EvaluationRecord, RankGroupRecord, ScoreRecord
from flexlora.uplink.base import send

SHAPES = {"block.attn": (6, 4), "block.mlp": (5, 9)}


SCALING = Scaling("constant_alpha", 16.0)


LOW, HIGH = RankPlan("low", (("", 1),)), RankPlan("high", (("attn", 3), ("", 4)))


CLIENTS = (
    ClientSpec("a", LOW, 10),
    ClientSpec("b", LOW, 30),
    ClientSpec("c", HIGH, 40),
    ClientSpec("d", HIGH, 20),
)


SERVER_RANKS = {"block.attn": 3, "block.mlp": 4}


def adapter_with_changes(seed: int = 0) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        module: LoraFactors(
            torch.randn(rank, SHAPES[module][1], generator=generator),
            torch.randn(SHAPES[module][0], rank, generator=generator),
            SCALING(rank),
        )
        for module, rank in SERVER_RANKS.items()
    }


@dataclass
class Engine:
    """Clients that return what they got, changed by ``change``."""

    change: Callable[[int, ClientSpec, Mapping[str, LoraFactors]], Mapping[str, LoraFactors] | ClientFailure]

    def train(self, order: RoundOrder) -> Iterator[Update | ClientFailure]:
        for client in order.cohort:
            result = self.change(order.server_round, client, order.parcels[client.plan].arrived.trainable)
            if isinstance(result, ClientFailure):
                yield result
            else:
                trained = Update(
                    client.client_id, result, float(client.num_examples), {"loss": 1.0, "steps": 2}, 100, 80
                )
                yield send(order.uplink, trained, torch.Generator())


@dataclass
class Scores:
    """Gives validation losses from a list, one per evaluation, the last one for ever."""

    losses: Sequence[float] = (1.0,)
    seen: list[Broadcast | None] = field(default_factory=list)

    def scores(self, adapter: Broadcast | None) -> EvaluationRecord:
        loss = self.losses[min(len(self.seen), len(self.losses) - 1)]
        self.seen.append(adapter)
        score = ScoreRecord(rouge_l=1, exact_match=2, loss=loss, num_examples=3, num_tasks=1)
        return EvaluationRecord(unseen=score, unseen_unweighted=score, validation_loss=loss)

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        ranks = {module: factors.rank for module, factors in broadcast(LOW).trainable.items()}
        return {"low": RankGroupRecord(ranks=ranks, num_clients=2)}


def echo(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> Mapping[str, LoraFactors]:
    return factors


def drift(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> Mapping[str, LoraFactors]:
    generator = torch.Generator().manual_seed(stream_seed(0, "drift", server_round, client.client_id))
    return {
        module: LoraFactors(own.A, own.B + 0.1 * torch.randn(own.B.shape, generator=generator), own.scaling)
        for module, own in factors.items()
    }


def loop_in(folder: Path, change: object = echo, method: str = "flexlora", **options: object) -> Loop:
    settings = {"num_rounds": 4, "cohort_size": 4, "seed": 1}
    known = {field.name for field in dataclasses.fields(RoundSettings)}
    settings |= {key: value for key, value in options.items() if key in known}
    switches = {key: value for key, value in options.items() if key in ("error_compensation", "fold_tail")}
    aggregator = AGGREGATORS[method](scaling=SCALING, **switches)
    return Loop(
        aggregator=aggregator,
        state_types=state_types(aggregator),
        engine=Engine(change),  # type: ignore[arg-type]
        federation=Federation(CLIENTS, SHAPES, SERVER_RANKS, adapter_with_changes(), SCALING),
        settings=RoundSettings(**settings),  # type: ignore[arg-type]
        learning_rate=lambda server_round: 0.1 / server_round,
        evaluator=options.get("evaluator", Scores()),  # type: ignore[arg-type]
        folder=folder,
    )


def exact_singular_values() -> dict[str, np.ndarray]:
    values = {}
    for module, factors in adapter_with_changes().items():
        dense = factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()
        values[module] = np.linalg.svd(dense, compute_uv=False)[: factors.rank]
    return values


class Killed(BaseException):
    """Stands for a process that ends between two statements."""


def assert_resumes_to(whole, cut, moment):
    """Cut a run off at the event of a kind and round, resume it, and compare what it comes to, to the bit."""

    def kill(event):
        if (event.kind, event.server_round) == moment:
            raise Killed

    with pytest.raises(Killed):
        run_rounds(dataclasses.replace(cut, notify=kill))
    resumed = run_rounds(cut)
    for module, spectrum in whole.state.spectra.items():
        for name in ("U", "S", "Vh"):
            assert torch.equal(getattr(spectrum, name), getattr(resumed.state.spectra[module], name))


SECONDS = {"low": 10.0, "high": 1.0}


def clocked(loop: Loop, policy: Policy, **changes: object) -> Loop:
    """Return the loop with devices: a and b, of rank 1, take 10 s, the others 1 s; links are quick."""
    profiles = {
        name: dataclasses.replace(DeviceProfile(name, 1e6, 1.0, 1e12, 1e12), **changes)  # type: ignore[arg-type]
        for name in SECONDS
    }
    clients = [dataclasses.replace(client, device=client.plan.name) for client in loop.federation.clients]
    clock = Clock(profiles, lambda client: ClientCost(1, 10, 1, 1, SECONDS[client.device]), policy, loop.settings.seed)
    return dataclasses.replace(loop, federation=dataclasses.replace(loop.federation, clients=clients), clock=clock)


def untimed(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(name="adapter_with_changes")
def _adapter_with_changes() -> Callable[..., Any]:
    """Returns a maker of the initial adapter of every loop."""
    return adapter_with_changes


@pytest.fixture(name="drift")
def _drift() -> Callable[..., Any]:
    """Returns a change that moves B by a stream of each client and round."""
    return drift


@pytest.fixture(name="loop_in")
def _loop_in() -> Callable[..., Any]:
    """Returns a maker of loops over four clients with their files in a folder."""
    return loop_in


@pytest.fixture(name="exact_singular_values")
def _exact_singular_values() -> Callable[..., Any]:
    """Returns a function that gives the singular values of the initial adapter, by numpy."""
    return exact_singular_values


@pytest.fixture(name="assert_resumes_to")
def _assert_resumes_to() -> Callable[..., Any]:
    """Returns a check that a run cut off at a moment resumes to the bits of one that was not."""
    return assert_resumes_to


@pytest.fixture(name="clocked")
def _clocked() -> Callable[..., Any]:
    """Returns a function that puts a loop on a virtual clock."""
    return clocked


@pytest.fixture(name="untimed")
def _untimed() -> Callable[..., Any]:
    """Returns a reader of the records in a folder without wall times."""
    return untimed


@pytest.fixture(name="scores_of")
def _scores_of() -> Callable[..., Any]:
    """Returns a maker of evaluators that give validation losses from a list."""
    return Scores
