"""Rounds with secure sums against the same rounds in the clear; clients drop out where a test says so."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest
import torch

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import ClientFailure, Reply, Update
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.records import read_records
from flexlora.uplink.phases import Holding
from flexlora.uplink.secure_total import SecureSumSettings


@dataclass
class HoldingEngine:
    """Trains as another engine does; its clients hold what they trained.

    Attributes:
        gone: Round and client -> the phases it answers before it is gone.
        asked: Round -> kinds of phases.
        forgets: How often the round was ended.
    """

    engine: object
    gone: Mapping[tuple[int, str], int] = field(default_factory=dict)
    asked: list[tuple[int, str]] = field(default_factory=list)
    forgets: int = 0

    def train(self, order) -> Iterator[Update | ClientFailure]:
        self.round, self.ends, self.answered = order.server_round, {}, {}
        for client, outcome in zip(order.cohort, self.engine.train(order), strict=True):
            if isinstance(outcome, ClientFailure):
                yield outcome
                continue
            holding = Holding(outcome, order.parcel_of(client).arrived, order.server_round, 5)
            self.ends[client.client_id] = order.phases.begin(holding)
            yield Update(client.client_id, {}, outcome.weight, down_bytes=80, is_held=True)

    def ask(self, kind, requests) -> Iterator[Reply | ClientFailure]:
        self.asked.append((self.round, kind))
        for client_id, request in requests.items():
            self.answered[client_id] = self.answered.get(client_id, 0) + 1
            if self.answered[client_id] > self.gone.get((self.round, client_id), 99):
                yield ClientFailure(client_id, kind, "its battery is empty")
                continue
            try:
                yield Reply(client_id, self.ends[client_id].answer(kind, request))
            except FlexLoraError as error:
                yield ClientFailure(client_id, kind, str(error))

    def forget(self) -> None:
        self.forgets += 1


def settings_of(summed: str) -> SecureSumSettings:
    return SecureSumSettings(summed, 20.0, threshold=0.6, columns=20)


def secure(loop, summed: str, gone: Mapping[tuple[int, str], int] | None = None):
    return dataclasses.replace(loop, engine=HoldingEngine(loop.engine, gone or {}), secure_sum=settings_of(summed))


def changes(loop, outcome):
    adapter = loop.aggregator.broadcast(outcome.state, loop.federation.server_ranks).adapter
    return {module: one.delta() for module, one in adapter.items()}


@pytest.mark.parametrize(
    ("method", "summed", "options"),
    [
        ("flexlora", "products", {}),
        ("flexlora", "products", {"error_compensation": True, "fold_tail": True}),
        ("aligned", "factors", {}),
        ("aligned", "factors", {"holder_exponent": 1.0}),
    ],
)
def test_secure_rounds_end_where_plain_ones_do(tmp_path, loop_in, drift, method, summed, options):
    plain = loop_in(tmp_path / "plain", drift, method, **options)
    hidden = secure(loop_in(tmp_path / "secure", drift, method, **options), summed)
    expected, found = changes(plain, run_rounds(plain)), changes(hidden, run_rounds(hidden))
    for module, delta in expected.items():
        torch.testing.assert_close(found[module], delta, rtol=1e-5, atol=1e-5 * float(delta.norm()))
    assert hidden.engine.forgets == 4
    for one, other in zip(
        read_records(tmp_path / "plain/records.jsonl"), read_records(tmp_path / "secure/records.jsonl"), strict=True
    ):
        assert (one.secure_sum, one.num_ok, one.train_loss) == (None, other.num_ok, other.train_loss)
        if other.server_round:
            assert other.secure_sum.num_summed == 4 and other.secure_sum.num_clipped == 0
            assert other.up_bytes == sum(phase.up_bytes for phase in other.secure_sum.phases) > 0
            assert other.down_bytes == 4 * 80 + sum(phase.down_bytes for phase in other.secure_sum.phases)
            assert {client.loss for client in other.clients} == {None}
            assert {f"secure_sum {phase.kind}" for phase in other.secure_sum.phases} < set(other.seconds)


def test_clients_that_drop_out_of_a_phase_are_recorded_with_it_and_left_out(tmp_path, loop_in, drift):
    gone = {(1, "b"): 1, (2, "d"): 2, (3, "c"): 0}

    def change(server_round, client, factors):
        if (server_round, client.client_id) in gone:
            return ClientFailure(client.client_id, "train", "its battery is empty")
        return drift(server_round, client, factors)

    hidden = secure(loop_in(tmp_path / "secure", drift, "aligned"), "factors", gone)
    plain = loop_in(tmp_path / "plain", change, "aligned")
    expected, found = changes(plain, run_rounds(plain)), changes(hidden, run_rounds(hidden))
    for module, delta in expected.items():
        torch.testing.assert_close(found[module], delta, rtol=1e-5, atol=1e-5 * float(delta.norm()))
    records = read_records(tmp_path / "secure/records.jsonl")
    stages = {
        (r.server_round, one.client_id): one.stage for r in records for one in r.clients if one.outcome == "failed"
    }
    assert stages == {(1, "b"): "shares", (2, "d"): "factors", (3, "c"): "keys"}
    assert {one.reason for r in records for one in r.clients if one.reason} == {"its battery is empty"}


def test_a_round_of_too_few_keeps_the_state_and_says_why(tmp_path, loop_in, drift):
    gone = {(2, "a"): 2, (2, "c"): 3}
    loop = secure(loop_in(tmp_path, drift, "flexlora"), "products", gone)
    run_rounds(loop)
    records = read_records(tmp_path / "records.jsonl")
    assert "there is no secure sum and the state was kept" in records[2].note
    assert records[2].spectra == records[1].spectra and records[3].note is None
    assert (records[2].num_ok, records[2].num_failed) == (0, 4)
    reasons = {one.client_id: (one.stage, one.reason) for one in records[2].clients}
    assert reasons["a"] == ("range", "its battery is empty")
    assert reasons["b"] == ("secure_sum", "there was no secure sum to be part of")
    assert loop.engine.forgets == 4


def test_a_cut_run_resumes_to_the_same_bits(tmp_path, loop_in, drift, assert_resumes_to):
    whole = run_rounds(secure(loop_in(tmp_path / "whole", drift), "products"))
    assert_resumes_to(whole, secure(loop_in(tmp_path / "cut", drift), "products"), ("client", 2))


def test_a_round_in_which_nobody_trains_keeps_the_state(tmp_path, loop_in, drift):
    def change(server_round, client, factors):
        if server_round == 2:
            return ClientFailure(client.client_id, "train", "its battery is empty")
        return drift(server_round, client, factors)

    run_rounds(secure(loop_in(tmp_path, change, "flexlora"), "products"))
    records = read_records(tmp_path / "records.jsonl")
    assert "needs at least 3 clients that trained; got 0" in records[2].note
    assert records[2].spectra == records[1].spectra and records[3].note is None


def test_a_sum_of_fewer_clients_than_a_round_needs_changes_nothing(tmp_path, loop_in, drift):
    loop = secure(loop_in(tmp_path, drift, "aligned"), "factors", {(2, "b"): 1})
    run_rounds(dataclasses.replace(loop, settings=dataclasses.replace(loop.settings, min_updates=4)))
    records = read_records(tmp_path / "records.jsonl")
    assert records[2].note == "3 clients were summed, of rounds.min_updates=4 at least; the state was kept"
    assert records[2].spectra == records[1].spectra and records[3].spectra != records[2].spectra
    assert records[2].secure_sum.num_summed == 3
