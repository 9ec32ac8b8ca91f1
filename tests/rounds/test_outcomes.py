"""Outcomes are checked, pass the uplink steps and end up in the state and the records."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch

from flexlora.federation.clients import ClientSpec
from flexlora.federation.messages import ClientFailure, Update
from flexlora.lora.factors import LoraFactors
from flexlora.rounds.clock import Policy
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.records import read_records


def test_a_failing_client_is_left_out_and_reported(tmp_path, loop_in):
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


def stepped_loop(drift, loop_in, folder, steps, change=None, **options):
    return dataclasses.replace(loop_in(folder, change or drift, **options), uplink=steps)


def test_both_ends_of_an_uplink_step_run_and_without_steps_nothing_changes(tmp_path, drift, loop_in, untimed):
    plain = run_rounds(loop_in(tmp_path / "plain", drift))
    arrived: list[str | None] = []
    stepped = run_rounds(stepped_loop(drift, loop_in, tmp_path / "stepped", [Halve(arrived)]))
    assert arrived == ["a", "b", "c", "d"] * 4
    for module, spectrum in plain.state.spectra.items():
        assert torch.equal(spectrum.S, stepped.state.spectra[module].S)
        assert torch.equal(spectrum.U, stepped.state.spectra[module].U)
    assert untimed(tmp_path / "plain") == untimed(tmp_path / "stepped")


def test_the_server_draws_from_a_stream_of_its_own_in_every_round(tmp_path, drift, loop_in):
    whole, again = [], []
    run_rounds(stepped_loop(drift, loop_in, tmp_path / "whole", [ServerNoise(whole)], num_rounds=3))
    run_rounds(stepped_loop(drift, loop_in, tmp_path / "again", [ServerNoise(again)], num_rounds=2))
    assert len(set(whole)) == 12 and again == whole[:8]
    run_rounds(stepped_loop(drift, loop_in, tmp_path / "again", [ServerNoise(again)], num_rounds=3))
    assert again == whole
    other: list[float] = []
    run_rounds(stepped_loop(drift, loop_in, tmp_path / "other", [ServerNoise(other)], num_rounds=3, seed=2))
    assert not set(other) & set(whole)


def test_what_a_client_sent_is_checked_before_any_step_receives_it(tmp_path, drift, loop_in):
    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        if client.client_id == "b":
            return {module: LoraFactors(own.A * float("nan"), own.B, own.scaling) for module, own in factors.items()}
        return drift(server_round, client, factors)

    arrived: list[str | None] = []
    run_rounds(stepped_loop(drift, loop_in, tmp_path, [Halve(arrived)], change, num_rounds=1))
    assert arrived == ["a", "c", "d"]
    record = read_records(tmp_path / "records.jsonl")[-1]
    assert [client.client_id for client in record.clients if client.stage == "validate"] == ["b"]


def test_clients_a_step_does_not_ask_for_are_recorded_and_a_step_without_result_keeps_the_state(
    tmp_path, drift, loop_in
):
    first = run_rounds(stepped_loop(drift, loop_in, tmp_path / "first", [FirstOnly(1)], num_rounds=1))
    records = read_records(tmp_path / "first" / "records.jsonl")
    assert [client.client_id for client in records[1].clients] == ["a", "b", "c", "d"]
    assert records[1].note is None and records[1].seconds["aggregate"] >= 0
    # Client a has rank 1: nothing else reached the aggregator.
    assert {spectrum.S.numel() for spectrum in first.state.spectra.values()} == {1}
    run_rounds(stepped_loop(drift, loop_in, tmp_path / "none", [FirstOnly(0)], num_rounds=1))
    record = read_records(tmp_path / "none" / "records.jsonl")[1]
    assert "could not be aggregated and the state was kept" in str(record.note)
    assert len(record.clients) == 4


def test_a_step_that_folds_clients_into_one_cannot_serve_a_server_that_does_not_wait(tmp_path, clocked, drift, loop_in):
    @dataclass(frozen=True)
    class Fold:
        def send(self, update: Update, rng: torch.Generator) -> Update:
            return update

        def receive(self, updates: Iterable[Update], rng: torch.Generator) -> Iterator[Update]:
            for update in updates:
                yield dataclasses.replace(update, client_id=None)

    run_rounds(clocked(stepped_loop(drift, loop_in, tmp_path, [Fold()], num_rounds=1), Policy("async", buffer_size=2)))
    record = read_records(tmp_path / "records.jsonl")[-1]
    assert "clock.policy=async must know whose an update is" in str(record.note)
