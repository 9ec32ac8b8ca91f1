"""Who trains in a round on the virtual clock, from what, and resuming to the same bits."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from flexlora.federation.clients import ClientSpec
from flexlora.lora.factors import LoraFactors
from flexlora.rounds import loop as rounds
from flexlora.rounds.checkpoint import Checkpoint
from flexlora.rounds.clock import Policy
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.records import read_records
from flexlora.uplink.wire import encode_broadcast


def test_waiting_for_everybody_on_a_clock_changes_nothing_but_tells_the_time(
    tmp_path, drift, loop_in, clocked, untimed
):
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


def test_late_clients_are_recorded_as_failures_and_their_bytes_count(
    tmp_path, adapter_with_changes, drift, loop_in, clocked
):
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


def test_clients_that_are_lost_on_the_way_are_never_trained(tmp_path, loop_in, clocked):
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
    tmp_path, policy, moment, drift, loop_in, assert_resumes_to, clocked, untimed
):
    options = {"num_rounds": 6, "cohort_size": 3, "checkpoint_every": 2}
    unsteady = {"dropout": 0.1, "availability": 0.7}
    whole = run_rounds(clocked(loop_in(tmp_path / "whole", drift, **options), policy, **unsteady))
    cut = clocked(loop_in(tmp_path / "cut", drift, **options), policy, **unsteady)
    assert_resumes_to(whole, cut, moment)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")


def test_an_asynchronous_run_trains_clients_from_what_they_were_sent(
    tmp_path, adapter_with_changes, drift, loop_in, clocked
):
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def change(server_round: int, client: ClientSpec, factors: Mapping[str, LoraFactors]) -> object:
        seen[server_round, client.client_id] = factors["block.attn"].delta()
        return drift(server_round, client, factors)

    loop = clocked(loop_in(tmp_path, change, num_rounds=12), Policy("async", buffer_size=2))
    states = [loop.aggregator.init(adapter_with_changes())]
    save = rounds.save_checkpoint
    kept: list[set[str]] = []

    def saved(folder: Path, checkpoint: Checkpoint, keep: int, best_round: int | None) -> None:
        if checkpoint.server_round:
            states.append(checkpoint.state)
            kept.append(set(checkpoint.sent))
        save(folder, checkpoint, keep, best_round)

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


def test_clients_that_change_nothing_leave_an_asynchronous_run_where_it_is(
    tmp_path, loop_in, exact_singular_values, clocked
):
    run_rounds(clocked(loop_in(tmp_path, num_rounds=8), Policy("async", buffer_size=2)))
    record = read_records(tmp_path / "records.jsonl")[-1]
    for module, expected in exact_singular_values().items():
        np.testing.assert_allclose(record.spectra[module].singular_values, expected, rtol=1e-5)
