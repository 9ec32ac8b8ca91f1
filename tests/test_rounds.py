"""The round loop: decay law, failures, early stopping, and resuming to the same bits."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from flexlora.aggregators import AGGREGATORS, STATE_TYPES
from flexlora.clients import Broadcast, ClientFailure, ClientSpec, RankPlan, Update, stream_seed
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.report.records import EvaluationRecord, RankGroupRecord, ScoreRecord, read_records
from flexlora.rounds import Federation, Loop, RoundSettings, run_rounds

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

    def train(
        self, server_round: int, cohort: Sequence[ClientSpec], broadcasts: Mapping[RankPlan, Broadcast]
    ) -> Iterator[Update | ClientFailure]:
        for client in cohort:
            result = self.change(server_round, client, broadcasts[client.plan].trainable)
            if isinstance(result, ClientFailure):
                yield result
            else:
                yield Update(client.client_id, result, float(client.num_examples), {"loss": 1.0, "steps": 2}, 100, 80)


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
    return Loop(
        aggregator=AGGREGATORS[method](
            scaling=SCALING,
            **{key: value for key, value in options.items() if key in ("error_compensation", "fold_tail")},
        ),
        state_types=STATE_TYPES,
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


@pytest.mark.parametrize("checkpoint_every", [1, 3])
@pytest.mark.parametrize("moment", [("client", 2), ("evaluating", 0), ("evaluating", 3), ("done", 0), ("done", 3)])
def test_a_run_cut_off_anywhere_resumes_to_the_same_bits(
    tmp_path: Path, moment: tuple[str, int], checkpoint_every: int
) -> None:
    options = {"num_rounds": 5, "cohort_size": 3, "checkpoint_every": checkpoint_every, "error_compensation": True}
    whole = run_rounds(loop_in(tmp_path / "whole", drift, **options))

    def kill(event: object) -> None:
        if (event.kind, event.server_round) == moment:  # type: ignore[attr-defined]
            raise Killed

    cut = loop_in(tmp_path / "cut", drift, **options)
    with pytest.raises(Killed):
        run_rounds(dataclasses.replace(cut, notify=kill))
    resumed = run_rounds(cut)
    for module, spectrum in whole.state.spectra.items():
        for name in ("U", "S", "Vh"):
            assert torch.equal(getattr(spectrum, name), getattr(resumed.state.spectra[module], name))
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")


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


def untimed(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
