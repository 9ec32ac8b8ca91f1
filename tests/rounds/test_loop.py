"""The round loop: decay law, failures, early stopping, and resuming to the same bits."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexlora.aggregators.base import AggregationError
from flexlora.engines.base import Engine, RoundOrder
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast, ClientFailure, Update
from flexlora.lora.factors import LoraFactors
from flexlora.rounds import loop as rounds
from flexlora.rounds.checkpoint import Checkpoint, load_latest, load_round, replace_progress, save_checkpoint
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.records import EvaluationRecord, RankGroupRecord, read_records


def test_with_echo_clients_flexlora_decays_by_the_coverage_law(tmp_path, loop_in, exact_singular_values):
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


def test_with_echo_clients_error_compensation_keeps_everything(tmp_path, loop_in, exact_singular_values):
    run_rounds(loop_in(tmp_path, error_compensation=True))
    record = read_records(tmp_path / "records.jsonl")[-1]
    for module, expected in exact_singular_values().items():
        np.testing.assert_allclose(record.spectra[module].singular_values, expected, rtol=1e-5)


def test_records_name_cohort_ranks_bytes_and_outcome(tmp_path, loop_in):
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


def test_a_round_without_survivor_keeps_the_state(tmp_path, drift, loop_in):
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


def test_a_run_in_which_every_client_fails_ends_early_without_progress(tmp_path, loop_in):
    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        return ClientFailure(client.client_id, "train", "off")

    outcome = run_rounds(loop_in(tmp_path, change, num_rounds=10, max_failed_rounds=2))
    assert (outcome.server_round, outcome.has_progress) == (2, False)
    assert "no update could be used in 2 rounds in a row" in str(outcome.stopped)
    assert read_records(tmp_path / "records.jsonl")[-1].stopped == outcome.stopped


def test_patience_stops_after_so_many_evaluations_without_gain(tmp_path, drift, loop_in, scores_of):
    scores = scores_of(losses=(2.0, 1.5, 1.6, 1.5, 1.4))
    outcome = run_rounds(loop_in(tmp_path, drift, num_rounds=10, patience=2, evaluator=scores))
    assert outcome.server_round == 3
    assert "did not fall below 1.5000 in 2 evaluations" in str(outcome.stopped)
    assert outcome.has_progress
    last = read_records(tmp_path / "records.jsonl")[-1]
    assert last.evaluation is not None and last.evaluation.rank_groups
    # A stopped run stays stopped when it is resumed.
    assert run_rounds(loop_in(tmp_path, drift, num_rounds=10, patience=2)).server_round == 3


def test_a_loop_without_an_evaluator_records_no_scores_and_resumes_to_the_same_state(tmp_path, drift, loop_in):
    whole = run_rounds(loop_in(tmp_path / "whole", drift, num_rounds=3, evaluator=None))
    for num_rounds in (0, 1, 3):
        parts = run_rounds(loop_in(tmp_path / "parts", drift, num_rounds=num_rounds, evaluator=None))
    records = read_records(tmp_path / "parts" / "records.jsonl")
    assert [(record.server_round, record.evaluation) for record in records] == [(n, None) for n in range(4)]
    assert parts.has_progress and parts.server_round == 3
    assert all(torch.equal(whole.state.spectra[name].S, own.S) for name, own in parts.state.spectra.items())


def test_evaluations_come_as_often_as_asked_and_always_at_the_end(tmp_path, loop_in):
    run_rounds(loop_in(tmp_path, num_rounds=5, evaluate_every=2))
    records = read_records(tmp_path / "records.jsonl")
    assert [record.server_round for record in records if record.evaluation] == [0, 2, 4, 5]


@pytest.mark.parametrize("checkpoint_every", [1, 3])
@pytest.mark.parametrize(
    "moment", [("client", 2), ("evaluating", 0), ("evaluating", 3), ("evaluating", 5), ("done", 0), ("done", 3)]
)
def test_a_run_cut_off_anywhere_resumes_to_the_same_bits(
    tmp_path, moment, checkpoint_every, drift, loop_in, assert_resumes_to, untimed
):
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
class FailingScores:
    """Fails once, at evaluation ``fails_at`` counted from 0, which is that of the base model; its loss falls."""

    inner: Any
    fails_at: int = 2
    part: str = "scores"

    def scores(self, adapter: Broadcast | None) -> EvaluationRecord:
        if self.part == "scores" and len(self.inner.seen) == self.fails_at:
            self.fails_at = -1
            raise OutOfMemory
        return self.inner.scores(adapter)

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        if self.part == "rank groups" and self.fails_at >= 0:
            self.fails_at = -1
            self.inner.seen.pop()  # What was scored of a round that failed is scored again.
            raise OutOfMemory
        return self.inner.rank_groups(broadcast)


def failing_loop(drift, loop_in, folder, trained, **options):
    loop = loop_in(folder, drift, error_compensation=True, **options)
    return dataclasses.replace(loop, engine=CountedEngine(loop.engine, trained))  # type: ignore[arg-type]


LOSSES = (2.0, 1.5, 1.2, 1.3, 1.1, 1.0)


@pytest.mark.parametrize("keep_checkpoints", [1, 2])
def test_an_evaluation_that_fails_does_not_cost_the_round_that_was_trained(
    tmp_path, keep_checkpoints, untimed, scores_of, drift, loop_in
):
    options = {"num_rounds": 5, "cohort_size": 3, "keep_checkpoints": keep_checkpoints, "patience": 2}
    whole = run_rounds(failing_loop(drift, loop_in, tmp_path / "whole", [], evaluator=scores_of(LOSSES), **options))
    trained: list[int] = []
    loop = failing_loop(
        drift, loop_in, tmp_path / "cut", trained, evaluator=FailingScores(scores_of(LOSSES)), **options
    )
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
def test_the_last_evaluation_of_a_run_can_be_made_up_for(tmp_path, part, untimed, scores_of, drift, loop_in):
    run_rounds(failing_loop(drift, loop_in, tmp_path / "whole", [], evaluator=scores_of(LOSSES), num_rounds=2))
    trained: list[int] = []
    loop = failing_loop(
        drift, loop_in, tmp_path / "cut", trained, evaluator=FailingScores(scores_of(LOSSES), part=part), num_rounds=2
    )
    with pytest.raises(OutOfMemory):
        run_rounds(loop)
    assert run_rounds(loop).server_round == 2
    assert run_rounds(loop).server_round == 2
    assert trained == [1, 2]
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    assert read_records(tmp_path / "cut" / "records.jsonl")[-1].seconds["total"] > 0


def test_a_run_that_grows_does_not_make_up_for_an_evaluation_that_is_no_longer_due(
    tmp_path, untimed, scores_of, drift, loop_in
):
    options = {"evaluate_every": 2}
    run_rounds(
        failing_loop(drift, loop_in, tmp_path / "whole", [], evaluator=scores_of(LOSSES), num_rounds=4, **options)
    )
    scores = FailingScores(scores_of(LOSSES))
    with pytest.raises(OutOfMemory):
        run_rounds(failing_loop(drift, loop_in, tmp_path / "cut", [], evaluator=scores, num_rounds=3, **options))
    trained: list[int] = []
    run_rounds(failing_loop(drift, loop_in, tmp_path / "cut", trained, evaluator=scores, num_rounds=4, **options))
    assert trained == [4]
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")


def test_a_run_that_gave_up_while_its_last_round_was_scored_has_given_up(tmp_path, loop_in, scores_of):
    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        return ClientFailure(client.client_id, "train", "off")

    options = {"num_rounds": 6, "max_failed_rounds": 2, "evaluate_every": 4}
    loop = loop_in(tmp_path, change, evaluator=FailingScores(scores_of(LOSSES), fails_at=1), **options)
    with pytest.raises(OutOfMemory):
        run_rounds(loop)
    outcome = run_rounds(loop)
    assert (outcome.server_round, outcome.has_progress) == (2, False)
    assert read_records(tmp_path / "records.jsonl")[-1].evaluation is not None
    # Resumed once more, it tries again.
    assert run_rounds(loop).server_round == 4


def test_rounds_are_checkpointed_as_often_as_asked_whatever_is_evaluated(tmp_path, monkeypatch, drift, loop_in):
    written: list[tuple[str, int]] = []

    def saved(folder: Path, checkpoint: Checkpoint, keep: int, best_round: int | None) -> None:
        written.append(("state", checkpoint.server_round))
        save_checkpoint(folder, checkpoint, keep, best_round)

    def replaced(folder: Path, server_round: int, progress: Mapping[str, object]) -> None:
        written.append(("scores", server_round))
        replace_progress(folder, server_round, progress)

    monkeypatch.setattr(rounds, "save_checkpoint", saved)
    monkeypatch.setattr(rounds, "replace_progress", replaced)
    run_rounds(loop_in(tmp_path, drift, num_rounds=7, checkpoint_every=2, evaluate_every=3))
    states = [("state", number) for number in (0, 2, 4, 6)]
    assert written == [*states, ("scores", 6), ("state", 7), ("scores", 7)]


def test_a_run_stopped_between_checkpoints_is_saved_with_its_scores(tmp_path, drift, loop_in, untimed, scores_of):
    scores = scores_of(losses=(2.0, 1.5, 1.6, 1.7))
    options = {"num_rounds": 10, "patience": 2, "checkpoint_every": 5}
    assert run_rounds(loop_in(tmp_path, drift, evaluator=scores, **options)).server_round == 3
    before = untimed(tmp_path)
    assert run_rounds(loop_in(tmp_path, drift, **options)).server_round == 3
    assert untimed(tmp_path) == before and before[-1]["evaluation"]


def test_being_killed_between_checkpoint_and_record_loses_neither(tmp_path, drift, loop_in, untimed):
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


def test_a_state_that_could_not_be_read_back_ends_the_run_before_it_is_saved(tmp_path, drift, loop_in):
    loop = loop_in(tmp_path, drift)

    class Forgetful(type(loop.aggregator)):
        """Returns another kind of state after a round."""

        def aggregate(self, state, updates):
            return {1: super().aggregate(state, updates)}

        def spectra(self, state):
            return super().spectra(state[1])

    broken = dataclasses.replace(loop, aggregator=Forgetful(scaling=loop.aggregator.scaling))
    with pytest.raises(AggregationError, match="state: keys of mappings in a state must be strings; got 1"):
        run_rounds(broken)
    assert [record.server_round for record in read_records(tmp_path / "records.jsonl")] == [0]


BEST_AT_2 = (2.0, 1.5, 1.0, 1.3, 1.4, 1.6)


@pytest.mark.parametrize("checkpoint_every", [1, 4])
def test_the_checkpoint_of_the_lowest_validation_loss_is_kept(tmp_path, checkpoint_every, scores_of, drift, loop_in):
    def loop(name, num_rounds, losses):
        options = {"keep_checkpoints": 1, "checkpoint_every": checkpoint_every, "evaluator": scores_of(losses)}
        return loop_in(tmp_path / name, drift, num_rounds=num_rounds, **options)

    whole = loop("whole", 5, BEST_AT_2)
    run_rounds(whole)
    folder = tmp_path / "whole" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["round-0002", "round-0005"]
    best = load_round(folder, 2, whole.state_types)
    newest = load_latest(folder, whole.state_types)
    assert newest.server_round == 5 and newest.progress["loop"]["best_round"] == 2
    stopped = run_rounds(loop("stopped", 2, BEST_AT_2))
    for module, spectrum in stopped.state.spectra.items():
        assert torch.equal(spectrum.U, best.state.spectra[module].U)


def test_a_run_that_was_never_better_than_its_base_knows_it(tmp_path, scores_of, drift, loop_in):
    loop = loop_in(tmp_path, drift, num_rounds=2, keep_checkpoints=1, evaluator=scores_of((1.0, 2.0, 3.0)))
    run_rounds(loop)
    newest = load_latest(tmp_path / "checkpoints", loop.state_types)
    assert newest.progress["loop"]["best_round"] == 0


def test_a_round_with_fewer_updates_than_asked_for_keeps_the_state(tmp_path, drift, loop_in):
    loop = loop_in(tmp_path, drift, num_rounds=2, min_updates=1_000, max_failed_rounds=5)
    ended = run_rounds(loop)
    assert not ended.has_progress
    before = loop.aggregator.init(loop.federation.initial_adapter)
    assert all(torch.equal(before.spectra[name].S, own.S) for name, own in ended.state.spectra.items())
    assert "of rounds.min_updates=1000 at least" in (read_records(tmp_path / "records.jsonl")[1].note or "")
