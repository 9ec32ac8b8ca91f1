"""The round loop: decay law, failures, early stopping, and resuming to the same bits."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

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
from flexlora.rounds import loop as rounds
from flexlora.rounds.checkpoint import Checkpoint, replace_progress, save_checkpoint
from flexlora.rounds.clock import Clock, Policy
from flexlora.rounds.costs import ClientCost
from flexlora.rounds.devices import DeviceProfile
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.loop_parts import Federation, Loop, RoundSettings
from flexlora.rounds.records import EvaluationRecord, RankGroupRecord, ScoreRecord, read_records
from flexlora.uplink.base import UplinkStep, send
from flexlora.uplink.wire import encode_broadcast

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


def test_with_echo_clients_flexlora_decays_by_the_coverage_law(tmp_path: Path) -> None:
    run_rounds(loop_in(tmp_path))
    # c and d, 60 of 100 examples, reach beyond rank 1; their rank differs by module.
    coverage = {"block.attn": np.array([1, 0.6, 0.6]), "block.mlp": np.array([1, 0.6, 0.6, 0.6])}
    start = exact_singular_values()
    for record in read_records(tmp_path / "records.jsonl")[1:]:
        for module, spectrum in record.spectra.items():
            expected = start[module] * coverage[module] ** record.server_round
            np.testing.assert_allclose(spectrum.singular_values, expected, rtol=1e-5)
    energy = {module: (start[module] * coverage[module] ** 4) ** 2 for module in start}
    total = sum(values.sum() for values in energy.values())
    assert record.energy_kept["low"] == pytest.approx(sum(values[0] for values in energy.values()) / total, rel=1e-5)
    assert record.energy_above_smallest == pytest.approx(1 - record.energy_kept["low"], abs=1e-5)


def test_with_echo_clients_error_compensation_keeps_everything(tmp_path: Path) -> None:
    run_rounds(loop_in(tmp_path, error_compensation=True))
    record = read_records(tmp_path / "records.jsonl")[-1]
    for module, expected in exact_singular_values().items():
        np.testing.assert_allclose(record.spectra[module].singular_values, expected, rtol=1e-5)


def test_records_name_cohort_ranks_bytes_and_outcome(tmp_path: Path) -> None:
    run_rounds(loop_in(tmp_path, cohort_size=3))
    records = read_records(tmp_path / "records.jsonl")
    assert [record.server_round for record in records] == [0, 1, 2, 3, 4]
    assert records[0].clients == [] and records[0].evaluation is not None
    for record in records[1:]:
        assert len(record.clients) == 3 == record.num_ok
        assert (record.up_bytes, record.down_bytes) == (300, 240)
        for client in record.clients:
            assert client.ranks == ({"attn": 1, "mlp": 1} if client.plan == "low" else {"attn": 3, "mlp": 4})
        assert record.learning_rate == 0.1 / record.server_round
    assert records[-1].evaluation is not None
    assert records[-1].evaluation.rank_groups["low"].ranks == {"block.attn": 1, "block.mlp": 1}


def test_a_failing_client_is_left_out_and_reported(tmp_path: Path) -> None:
    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        if client.client_id == "a":
            return ClientFailure("a", "train", "out of memory", 80)
        if client.client_id == "b":
            own = factors["block.attn"]
            return {**factors, "block.attn": LoraFactors(own.A * float("nan"), own.B, own.scaling)}
        if client.client_id == "c":
            own = factors["block.mlp"]
            return {**factors, "block.mlp": LoraFactors(own.A[:2], own.B[:, :2], own.scaling)}
        return factors

    outcome = run_rounds(loop_in(tmp_path, change, error_compensation=True))
    assert outcome.has_progress
    record = read_records(tmp_path / "records.jsonl")[1]
    found = {client.client_id: (client.outcome, client.stage) for client in record.clients}
    assert found == {
        "a": ("failed", "train"),
        "b": ("failed", "validate"),
        "c": ("failed", "validate"),
        "d": ("ok", None),
    }
    reasons = {client.client_id: client.reason for client in record.clients}
    assert reasons["a"] == "out of memory"
    assert "block.attn: A must be finite" in str(reasons["b"])
    assert "rank must be 4" in str(reasons["c"])
    assert (record.num_ok, record.num_failed) == (1, 3)


def test_a_round_without_survivor_keeps_the_state(tmp_path: Path) -> None:
    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        return (
            ClientFailure(client.client_id, "train", "off")
            if server_round == 2
            else drift(server_round, client, factors)
        )

    outcome = run_rounds(loop_in(tmp_path, change))
    records = read_records(tmp_path / "records.jsonl")
    assert outcome.has_progress and outcome.stopped is None
    assert records[2].spectra == records[1].spectra != records[3].spectra
    assert records[2].note == "no client survived; the state was kept"


def test_a_run_in_which_every_client_fails_ends_early_without_progress(tmp_path: Path) -> None:
    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        return ClientFailure(client.client_id, "train", "off")

    outcome = run_rounds(loop_in(tmp_path, change, num_rounds=10, max_failed_rounds=2))
    assert (outcome.server_round, outcome.has_progress) == (2, False)
    assert "every client failed in 2 rounds in a row" in str(outcome.stopped)
    assert read_records(tmp_path / "records.jsonl")[-1].stopped == outcome.stopped


def test_patience_stops_after_so_many_evaluations_without_gain(tmp_path: Path) -> None:
    scores = Scores(losses=(2.0, 1.5, 1.6, 1.5, 1.4))
    outcome = run_rounds(loop_in(tmp_path, drift, num_rounds=10, patience=2, evaluator=scores))
    assert outcome.server_round == 3
    assert "did not fall below 1.5000 in 2 evaluations" in str(outcome.stopped)
    assert outcome.has_progress
    last = read_records(tmp_path / "records.jsonl")[-1]
    assert last.evaluation is not None and last.evaluation.rank_groups
    # A stopped run stays stopped when it is resumed.
    assert run_rounds(loop_in(tmp_path, drift, num_rounds=10, patience=2)).server_round == 3


def test_evaluations_come_as_often_as_asked_and_always_at_the_end(tmp_path: Path) -> None:
    run_rounds(loop_in(tmp_path, num_rounds=5, evaluate_every=2))
    records = read_records(tmp_path / "records.jsonl")
    assert [record.server_round for record in records if record.evaluation] == [0, 2, 4, 5]


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


@pytest.mark.parametrize("checkpoint_every", [1, 3])
@pytest.mark.parametrize(
    "moment", [("client", 2), ("evaluating", 0), ("evaluating", 3), ("evaluating", 5), ("done", 0), ("done", 3)]
)
def test_a_run_cut_off_anywhere_resumes_to_the_same_bits(
    tmp_path: Path, moment: tuple[str, int], checkpoint_every: int
) -> None:
    options = {"num_rounds": 5, "cohort_size": 3, "checkpoint_every": checkpoint_every, "error_compensation": True}
    whole = run_rounds(loop_in(tmp_path / "whole", drift, **options))
    cut = loop_in(tmp_path / "cut", drift, **options)
    assert_resumes_to(whole, cut, moment)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")


@dataclass
class CountedEngine:
    """An engine that keeps a list of the rounds it was asked to train."""

    engine: Engine
    trained: list[int]

    def train(self, order: RoundOrder) -> Iterator[Update | ClientFailure]:
        self.trained.append(order.server_round)
        return self.engine.train(order)


class OutOfMemory(RuntimeError):
    """Stands for an evaluation that does not fit."""


@dataclass
class FailingScores(Scores):
    """Fails once, at evaluation ``fails_at`` counted from 0, which is that of the base model; its loss falls."""

    fails_at: int = 2
    part: str = "scores"

    def scores(self, adapter: Broadcast | None) -> EvaluationRecord:
        if self.part == "scores" and len(self.seen) == self.fails_at:
            self.fails_at = -1
            raise OutOfMemory
        return super().scores(adapter)

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        if self.part == "rank groups" and self.fails_at >= 0:
            self.fails_at = -1
            self.seen.pop()  # What was scored of a round that failed is scored again.
            raise OutOfMemory
        return super().rank_groups(broadcast)


def failing_loop(folder: Path, trained: list[int], **options: object) -> Loop:
    loop = loop_in(folder, drift, error_compensation=True, **options)
    return dataclasses.replace(loop, engine=CountedEngine(loop.engine, trained))  # type: ignore[arg-type]


LOSSES = (2.0, 1.5, 1.2, 1.3, 1.1, 1.0)


@pytest.mark.parametrize("keep_checkpoints", [1, 2])
def test_an_evaluation_that_fails_does_not_cost_the_round_that_was_trained(
    tmp_path: Path, keep_checkpoints: int
) -> None:
    options = {"num_rounds": 5, "cohort_size": 3, "keep_checkpoints": keep_checkpoints, "patience": 2}
    whole = run_rounds(failing_loop(tmp_path / "whole", [], evaluator=Scores(LOSSES), **options))
    trained: list[int] = []
    loop = failing_loop(tmp_path / "cut", trained, evaluator=FailingScores(LOSSES), **options)
    with pytest.raises(OutOfMemory):
        run_rounds(loop)
    assert [record.server_round for record in read_records(tmp_path / "cut" / "records.jsonl")] == [0, 1]
    assert trained == [1, 2]
    resumed = run_rounds(loop)
    assert trained == [1, 2, 3, 4, 5]
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    for module, spectrum in whole.state.spectra.items():
        assert torch.equal(spectrum.U, resumed.state.spectra[module].U)
    kept = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert kept == [f"round-{number:04d}" for number in range(6 - keep_checkpoints, 6)]


@pytest.mark.parametrize("part", ["scores", "rank groups"])
def test_the_last_evaluation_of_a_run_can_be_made_up_for(tmp_path: Path, part: str) -> None:
    run_rounds(failing_loop(tmp_path / "whole", [], evaluator=Scores(LOSSES), num_rounds=2))
    trained: list[int] = []
    loop = failing_loop(tmp_path / "cut", trained, evaluator=FailingScores(LOSSES, part=part), num_rounds=2)
    with pytest.raises(OutOfMemory):
        run_rounds(loop)
    assert run_rounds(loop).server_round == 2
    assert run_rounds(loop).server_round == 2
    assert trained == [1, 2]
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    assert read_records(tmp_path / "cut" / "records.jsonl")[-1].seconds["total"] > 0


def test_a_run_that_grows_does_not_make_up_for_an_evaluation_that_is_no_longer_due(tmp_path: Path) -> None:
    options = {"evaluate_every": 2}
    run_rounds(failing_loop(tmp_path / "whole", [], evaluator=Scores(LOSSES), num_rounds=4, **options))
    scores = FailingScores(LOSSES)
    with pytest.raises(OutOfMemory):
        run_rounds(failing_loop(tmp_path / "cut", [], evaluator=scores, num_rounds=3, **options))
    trained: list[int] = []
    run_rounds(failing_loop(tmp_path / "cut", trained, evaluator=scores, num_rounds=4, **options))
    assert trained == [4]
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")


def test_a_run_that_gave_up_while_its_last_round_was_scored_has_given_up(tmp_path: Path) -> None:
    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        return ClientFailure(client.client_id, "train", "off")

    options = {"num_rounds": 6, "max_failed_rounds": 2, "evaluate_every": 4}
    loop = loop_in(tmp_path, change, evaluator=FailingScores(LOSSES, fails_at=1), **options)
    with pytest.raises(OutOfMemory):
        run_rounds(loop)
    outcome = run_rounds(loop)
    assert (outcome.server_round, outcome.has_progress) == (2, False)
    assert read_records(tmp_path / "records.jsonl")[-1].evaluation is not None
    # Resumed once more, it tries again.
    assert run_rounds(loop).server_round == 4


def test_rounds_are_checkpointed_as_often_as_asked_whatever_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, int]] = []

    def saved(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
        written.append(("state", checkpoint.server_round))
        save_checkpoint(folder, checkpoint, keep)

    def replaced(folder: Path, server_round: int, progress: Mapping[str, object]) -> None:
        written.append(("scores", server_round))
        replace_progress(folder, server_round, progress)

    monkeypatch.setattr(rounds, "save_checkpoint", saved)
    monkeypatch.setattr(rounds, "replace_progress", replaced)
    run_rounds(loop_in(tmp_path, drift, num_rounds=7, checkpoint_every=2, evaluate_every=3))
    states = [("state", number) for number in (0, 2, 4, 6)]
    assert written == [*states, ("scores", 6), ("state", 7), ("scores", 7)]


def test_a_run_stopped_between_checkpoints_is_saved_with_its_scores(tmp_path: Path) -> None:
    scores = Scores(losses=(2.0, 1.5, 1.6, 1.7))
    options = {"num_rounds": 10, "patience": 2, "checkpoint_every": 5}
    assert run_rounds(loop_in(tmp_path, drift, evaluator=scores, **options)).server_round == 3
    before = untimed(tmp_path)
    assert run_rounds(loop_in(tmp_path, drift, **options)).server_round == 3
    assert untimed(tmp_path) == before and before[-1]["evaluation"]


def scaled(update: Update, factor: float) -> Update:
    payload = {
        module: LoraFactors(factors.A * factor, factors.B * factor, factors.scaling)
        for module, factors in update.payload.items()
    }
    return dataclasses.replace(update, payload=payload)


@dataclass(frozen=True)
class Halve:
    """Halves what is sent and doubles what is received; powers of two change no bit."""

    arrived: list[str | None]

    def send(self, update: Update, rng: torch.Generator) -> Update:
        return scaled(update, 0.5)

    def receive(self, updates: Iterable[Update], rng: torch.Generator) -> Iterator[Update]:
        for update in updates:
            self.arrived.append(update.client_id)
            yield scaled(update, 2.0)


@dataclass(frozen=True)
class ServerNoise:
    """Adds what it draws to every update on the server."""

    drawn: list[float]

    def send(self, update: Update, rng: torch.Generator) -> Update:
        return update

    def receive(self, updates: Iterable[Update], rng: torch.Generator) -> Iterator[Update]:
        for update in updates:
            self.drawn.append(float(torch.randn((), generator=rng)))
            yield scaled(update, 1.0 + 0.01 * self.drawn[-1])


@dataclass(frozen=True)
class FirstOnly:
    """Lets one update pass, or none, and asks for no other."""

    num_updates: int

    def send(self, update: Update, rng: torch.Generator) -> Update:
        return update

    def receive(self, updates: Iterable[Update], rng: torch.Generator) -> Iterator[Update]:
        return islice(iter(updates), self.num_updates)


def stepped_loop(folder: Path, steps: Sequence[UplinkStep], change: object = drift, **options: object) -> Loop:
    return dataclasses.replace(loop_in(folder, change, **options), uplink=steps)


def test_both_ends_of_an_uplink_step_run_and_without_steps_nothing_changes(tmp_path: Path) -> None:
    plain = run_rounds(loop_in(tmp_path / "plain", drift))
    arrived: list[str | None] = []
    stepped = run_rounds(stepped_loop(tmp_path / "stepped", [Halve(arrived)]))
    assert arrived == ["a", "b", "c", "d"] * 4
    for module, spectrum in plain.state.spectra.items():
        assert torch.equal(spectrum.S, stepped.state.spectra[module].S)
        assert torch.equal(spectrum.U, stepped.state.spectra[module].U)
    assert untimed(tmp_path / "plain") == untimed(tmp_path / "stepped")


def test_the_server_draws_from_a_stream_of_its_own_in_every_round(tmp_path: Path) -> None:
    whole, again = [], []
    run_rounds(stepped_loop(tmp_path / "whole", [ServerNoise(whole)], num_rounds=3))
    run_rounds(stepped_loop(tmp_path / "again", [ServerNoise(again)], num_rounds=2))
    assert len(set(whole)) == 12 and again == whole[:8]
    run_rounds(stepped_loop(tmp_path / "again", [ServerNoise(again)], num_rounds=3))
    assert again == whole
    other: list[float] = []
    run_rounds(stepped_loop(tmp_path / "other", [ServerNoise(other)], num_rounds=3, seed=2))
    assert not set(other) & set(whole)


def test_what_a_client_sent_is_checked_before_any_step_receives_it(tmp_path: Path) -> None:
    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        if client.client_id == "b":
            return {module: LoraFactors(own.A * float("nan"), own.B, own.scaling) for module, own in factors.items()}
        return drift(server_round, client, factors)

    arrived: list[str | None] = []
    run_rounds(stepped_loop(tmp_path, [Halve(arrived)], change, num_rounds=1))
    assert arrived == ["a", "c", "d"]
    record = read_records(tmp_path / "records.jsonl")[-1]
    assert [client.client_id for client in record.clients if client.stage == "validate"] == ["b"]


def test_clients_a_step_does_not_ask_for_are_recorded_and_a_step_without_result_keeps_the_state(
    tmp_path: Path,
) -> None:
    first = run_rounds(stepped_loop(tmp_path / "first", [FirstOnly(1)], num_rounds=1))
    records = read_records(tmp_path / "first" / "records.jsonl")
    assert [client.client_id for client in records[1].clients] == ["a", "b", "c", "d"]
    assert records[1].note is None and records[1].seconds["aggregate"] >= 0
    # Client a has rank 1: nothing else reached the aggregator.
    assert {spectrum.S.numel() for spectrum in first.state.spectra.values()} == {1}
    run_rounds(stepped_loop(tmp_path / "none", [FirstOnly(0)], num_rounds=1))
    record = read_records(tmp_path / "none" / "records.jsonl")[1]
    assert "could not be aggregated and the state was kept" in str(record.note)
    assert len(record.clients) == 4


def test_being_killed_between_checkpoint_and_record_loses_neither(tmp_path: Path) -> None:
    whole = loop_in(tmp_path / "whole", drift)
    run_rounds(whole)
    cut = loop_in(tmp_path / "cut", drift)
    run_rounds(dataclasses.replace(cut, settings=dataclasses.replace(cut.settings, num_rounds=2)))
    records = tmp_path / "cut" / "records.jsonl"
    lines = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    run_rounds(cut)
    # The shortened run evaluated its last round as a last round; all else is equal.
    assert [line["spectra"] for line in untimed(tmp_path / "whole")] == [
        line["spectra"] for line in untimed(tmp_path / "cut")
    ]


SECONDS = {"low": 10.0, "high": 1.0}


def clocked(loop: Loop, policy: Policy, **changes: object) -> Loop:
    """Return the loop with devices: a and b, of rank 1, take 10 s, the others 1 s; links are quick."""
    profiles = {
        name: dataclasses.replace(DeviceProfile(name, 1e6, 1.0, 1e12, 1e12), **changes)  # type: ignore[arg-type]
        for name in SECONDS
    }
    clients = [dataclasses.replace(client, device=client.plan.name) for client in loop.federation.clients]
    clock = Clock(profiles, lambda client: ClientCost(1, 10, 1, SECONDS[client.device]), policy, loop.settings.seed)
    return dataclasses.replace(loop, federation=dataclasses.replace(loop.federation, clients=clients), clock=clock)


def test_waiting_for_everybody_on_a_clock_changes_nothing_but_tells_the_time(tmp_path: Path) -> None:
    options = {"cohort_size": 3, "error_compensation": True}
    plain = run_rounds(loop_in(tmp_path / "plain", drift, **options))
    timed = run_rounds(clocked(loop_in(tmp_path / "timed", drift, **options), Policy()))
    for module, spectrum in plain.state.spectra.items():
        assert torch.equal(spectrum.U, timed.state.spectra[module].U)
    records = read_records(tmp_path / "timed" / "records.jsonl")
    # A cohort of three of the four has one of the slow clients at least.
    assert [record.virtual_clock_seconds for record in records] == pytest.approx([0, 10, 20, 30, 40])
    assert {client.virtual_seconds for client in records[1].clients} == {1.0, 10.0}
    new = {"virtual_seconds", "virtual_clock_seconds"}
    for before, after in zip(untimed(tmp_path / "plain"), untimed(tmp_path / "timed"), strict=True):
        assert all(before[key] is None for key in new)
        for one in (before, after):
            for client in one["clients"]:  # type: ignore[attr-defined]
                for key in ("device", "virtual_seconds", "staleness"):
                    client.pop(key)
        assert {key: before[key] for key in before.keys() - new} == {key: after[key] for key in after.keys() - new}


def test_late_clients_are_recorded_as_failures_and_their_bytes_count(tmp_path: Path) -> None:
    loop = clocked(loop_in(tmp_path, drift, num_rounds=2), Policy("deadline", deadline_seconds=2.0))
    run_rounds(loop)
    record = read_records(tmp_path / "records.jsonl")[1]
    assert record.virtual_seconds == pytest.approx(2.0)
    found = {client.client_id: (client.outcome, client.stage) for client in record.clients}
    assert found == {"a": ("failed", "train"), "b": ("failed", "train"), "c": ("ok", None), "d": ("ok", None)}
    late = record.clients[0]
    assert "missed the deadline of 2.0 s: it needs 10.0 s" in str(late.reason)
    # It had its broadcast; the engine of this test says 80 bytes of the others.
    broadcast = loop.aggregator.broadcast(
        loop.aggregator.init(adapter_with_changes()), {"block.attn": 1, "block.mlp": 1}
    )
    assert (late.down_bytes, late.up_bytes) == (len(encode_broadcast(broadcast, "float32")), 0)
    assert record.down_bytes == 2 * 80 + 2 * late.down_bytes


def test_clients_that_are_lost_on_the_way_are_never_trained(tmp_path: Path) -> None:
    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        assert client.client_id in ("c", "d")
        return factors

    run_rounds(clocked(loop_in(tmp_path, change, cohort_size=2), Policy("over_select", over_selection=2.0)))
    assert [record.num_ok for record in read_records(tmp_path / "records.jsonl")[1:]] == [2, 2, 2, 2]


POLICIES = (
    Policy(jitter=0.3),
    Policy("deadline", deadline_seconds=9.0, jitter=0.3),
    Policy("over_select", over_selection=1.4, jitter=0.3, day_seconds=30.0),
    Policy("async", buffer_size=2, jitter=0.3, day_seconds=30.0),
    Policy("async", buffer_size=1, jitter=0.3, max_staleness=2),
)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.name}{policy.buffer_size}")
@pytest.mark.parametrize("moment", [("client", 3), ("evaluating", 4)])
def test_a_run_on_the_clock_cut_off_anywhere_resumes_to_the_same_bits(
    tmp_path: Path, policy: Policy, moment: tuple[str, int]
) -> None:
    options = {"num_rounds": 6, "cohort_size": 3, "checkpoint_every": 2}
    unsteady = {"dropout": 0.1, "availability": 0.7}
    whole = run_rounds(clocked(loop_in(tmp_path / "whole", drift, **options), policy, **unsteady))
    cut = clocked(loop_in(tmp_path / "cut", drift, **options), policy, **unsteady)
    assert_resumes_to(whole, cut, moment)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")


def test_an_asynchronous_run_trains_clients_from_what_they_were_sent(tmp_path: Path) -> None:
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        seen[server_round, client.client_id] = factors["block.attn"].delta()
        return drift(server_round, client, factors)

    loop = clocked(loop_in(tmp_path, change, num_rounds=12), Policy("async", buffer_size=2))
    states = [loop.aggregator.init(adapter_with_changes())]
    save = rounds.save_checkpoint
    kept: list[set[str]] = []

    def saved(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
        if checkpoint.server_round:
            states.append(checkpoint.state)
            kept.append(set(checkpoint.sent))
        save(folder, checkpoint, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "save_checkpoint", saved)
        run_rounds(loop)
    ranks = {"low": {"block.attn": 1, "block.mlp": 1}, "high": {"block.attn": 3, "block.mlp": 4}}
    stale = 0
    for record in read_records(tmp_path / "records.jsonl")[1:]:
        for client in record.clients:
            assert client.staleness is not None
            sent_in = record.server_round - client.staleness
            stale += client.staleness > 0
            # Round 1 hands out version 0, and so on.
            sent = loop.aggregator.broadcast(states[sent_in - 1], ranks[client.plan]).trainable
            torch.testing.assert_close(seen[sent_in, client.client_id], sent["block.attn"].delta())
    assert stale >= 2
    # Both slow clients are on their way from round 1 on: what they were sent is kept until they are back.
    assert all(names >= {"1/low"} for names in kept[:4])
    assert all(len(names) <= 4 for names in kept)


def test_clients_that_change_nothing_leave_an_asynchronous_run_where_it_is(tmp_path: Path) -> None:
    run_rounds(clocked(loop_in(tmp_path, num_rounds=8), Policy("async", buffer_size=2)))
    record = read_records(tmp_path / "records.jsonl")[-1]
    for module, expected in exact_singular_values().items():
        np.testing.assert_allclose(record.spectra[module].singular_values, expected, rtol=1e-5)


def test_a_step_that_folds_clients_into_one_cannot_serve_a_server_that_does_not_wait(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Fold:
        def send(self, update: Update, rng: torch.Generator) -> Update:
            return update

        def receive(self, updates: Iterable[Update], rng: torch.Generator) -> Iterator[Update]:
            for update in updates:
                yield dataclasses.replace(update, client_id=None)

    run_rounds(clocked(stepped_loop(tmp_path, [Fold()], num_rounds=1), Policy("async", buffer_size=2)))
    record = read_records(tmp_path / "records.jsonl")[-1]
    assert "clock.policy=async must know whose an update is" in str(record.note)


def untimed(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
