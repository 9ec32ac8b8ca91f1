"""Clients keep a factor, or each gets a broadcast of its own; expected values are added up by hand."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flexlora.aggregators.base import AggregationError, state_types
from flexlora.aggregators.settings import Traits
from flexlora.aggregators.zero_pad import ZeroPad, ZeroPadState
from flexlora.engines.base import RoundOrder
from flexlora.federation.kept_factors import kept_of, with_kept, without_kept
from flexlora.federation.message_checks import BroadcastError
from flexlora.federation.messages import Broadcast, Update
from flexlora.federation.streams import stream_seed
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.rounds.checkpoint import load_latest
from flexlora.rounds.clock import Policy
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.loop_parts import Loop
from flexlora.rounds.records import read_records
from flexlora.uplink.wire import encode_broadcast, encode_update, received_update

SCALING = Scaling("constant_alpha", 16.0)


@dataclass(frozen=True)
class KeepsB(ZeroPad):
    """Mean of A; every client keeps its B."""

    traits = Traits(personal=True)

    def broadcast(self, state: ZeroPadState, ranks: Mapping[str, int]) -> Broadcast:
        return dataclasses.replace(super().broadcast(state, ranks), kept="B")


@dataclass(frozen=True)
class ToEach(ZeroPad):
    """Client number ``i`` of a, b, c, d gets ``B + i`` and, of each module, the directions that ``fewer`` leaves."""

    fewer: int = 0

    @property
    def traits(self) -> Traits:
        return Traits(per_client=True, fewer_directions=self.fewer > 0)

    def broadcast_to(self, state: ZeroPadState, ranks: Mapping[str, int], client_id: str) -> Broadcast:
        sent = self.broadcast(state, {module: max(1, rank - self.fewer) for module, rank in ranks.items()})
        return Broadcast(
            {m: LoraFactors(own.A, own.B + "abcd".index(client_id), own.scaling) for m, own in sent.trainable.items()}
        )


def step(server_round: int, client_id: str, module: str, shape: torch.Size) -> torch.Tensor:
    """Return what a client adds to its B of a module in a round."""
    return torch.full(shape, (stream_seed(0, "step", server_round, client_id, module) % 1000) / 512)


@dataclass
class Clients:
    """Clients that add a number of their own to B; what is sent and returned travels as it does for real."""

    seen: dict[tuple[int, str], Broadcast] = dataclasses.field(default_factory=dict)

    def train(self, order: RoundOrder) -> Iterator[Update]:
        for client in order.cohort:
            parcel, name = order.parcel_of(client), client.client_id
            start = with_kept(parcel.arrived, order.kept.get(name))
            self.seen[order.server_round, name] = start
            trained = {
                module: LoraFactors(own.A, own.B + step(order.server_round, name, module, own.B.shape), own.scaling)
                for module, own in start.trainable.items()
            }
            update = Update(name, without_kept(trained, parcel.arrived), float(client.num_examples), {"loss": 1.0})
            kept = kept_of(trained, parcel.arrived.kept)
            yield dataclasses.replace(
                received_update(update, parcel.arrived, order.wire_dtype), kept=kept, down_bytes=len(parcel.packet)
            )


def loop_of(loop: Loop, method: Any) -> Loop:
    return dataclasses.replace(loop, aggregator=method, state_types=state_types(method), engine=Clients())


def test_a_client_starts_from_what_it_kept_when_it_last_trained(tmp_path, loop_in):
    loop = loop_of(loop_in(tmp_path, num_rounds=6, cohort_size=2, method="zero_pad"), KeepsB(SCALING))
    run_rounds(loop)
    assert isinstance(loop.engine, Clients)
    added: dict[str, dict[str, torch.Tensor]] = {}
    for (server_round, name), start in sorted(loop.engine.seen.items(), key=lambda item: item[0][0]):
        for module, own in start.trainable.items():
            before = added.setdefault(name, {}).get(module)
            if before is None:  # Whoever has kept nothing starts from the broadcast, whose B the server never changes.
                first = loop.aggregator.broadcast(
                    loop.aggregator.init(loop.federation.initial_adapter),
                    {module: one.rank for module, one in start.trainable.items()},
                )
                before = first.trainable[module].B
            torch.testing.assert_close(own.B, before, rtol=1e-6, atol=1e-6)
            added[name][module] = own.B + step(server_round, name, module, own.B.shape)
    assert max(sum(who == name for _, who in loop.engine.seen) for name in "abcd") > 1


def test_what_clients_keep_never_reaches_the_server_and_costs_no_bytes(tmp_path, loop_in, monkeypatch):
    seen: list[Update] = []
    method, plain = KeepsB(SCALING), ZeroPad(SCALING)

    def watch(self: ZeroPad, state: ZeroPadState, updates: Any) -> ZeroPadState:
        seen.extend(updates)
        return ZeroPad.aggregate(plain, state, seen)

    monkeypatch.setattr(KeepsB, "aggregate", watch)
    loop = loop_of(loop_in(tmp_path, num_rounds=1, method="zero_pad"), method)
    run_rounds(loop)
    state = method.init(loop.federation.initial_adapter)
    clients = {client.client_id: client for client in loop.federation.clients}
    for update in seen:
        sent = method.broadcast(state, clients[str(update.client_id)].plan.resolve(loop.federation.shapes))
        assert update.kept is None
        assert all(torch.equal(own.B, sent.trainable[module].B) for module, own in update.payload.items())
        assert update.up_bytes == len(encode_update(update, sent, "float32"))
        assert update.up_bytes < len(encode_update(update, dataclasses.replace(sent, kept=None), "float32"))


@pytest.mark.parametrize("moment", [("client", 2), ("evaluating", 3), ("done", 3)])
def test_a_run_cut_off_anywhere_resumes_to_the_same_kept_factors(tmp_path, loop_in, moment, untimed):
    class Killed(BaseException):
        pass

    def kill(event: Any) -> None:
        if (event.kind, event.server_round) == moment:
            raise Killed

    options = {"num_rounds": 5, "cohort_size": 3, "method": "zero_pad"}
    run_rounds(loop_of(loop_in(tmp_path / "whole", **options), KeepsB(SCALING)))
    cut = loop_of(loop_in(tmp_path / "cut", **options), KeepsB(SCALING))
    with pytest.raises(Killed):
        run_rounds(dataclasses.replace(cut, notify=kill))
    run_rounds(cut)
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")
    file = Path("checkpoints") / "round-0005" / "state.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    found = load_latest(tmp_path / "cut" / "checkpoints", (ZeroPadState, LoraFactors))
    assert found is not None and found.kept.keys() == set("abcd")


def test_methods_whose_clients_keep_nothing_have_the_checkpoints_they_had(tmp_path, loop_in, drift):
    run_rounds(loop_in(tmp_path, drift, num_rounds=1))
    tree = json.loads((tmp_path / "checkpoints" / "round-0001" / "state.json").read_bytes())
    assert tree.keys() == {"format_version", "server_round", "sha256", "progress", "state", "sent", "digest"}
    assert "kept" not in tree["progress"]["loop"]


def test_a_kept_factor_that_is_not_finite_fails_its_client(tmp_path, loop_in, monkeypatch):
    real = step
    monkeypatch.setitem(globals(), "step", lambda r, c, m, s: real(r, c, m, s) * (torch.nan if c == "b" else 1.0))
    loop = loop_of(loop_in(tmp_path, num_rounds=2, method="zero_pad"), KeepsB(SCALING))
    run_rounds(loop)
    for record in read_records(tmp_path / "records.jsonl")[1:]:
        failed = [client for client in record.clients if client.outcome == "failed"]
        assert [client.client_id for client in failed] == ["b"]
        assert "the B that the client keeps must be finite" in str(failed[0].reason)
    assert isinstance(loop.engine, Clients)
    assert all(own.B.isfinite().all() for start in loop.engine.seen.values() for own in start.trainable.values())


def test_every_client_gets_its_own_broadcast(tmp_path, loop_in):
    loop = loop_of(loop_in(tmp_path, num_rounds=1, method="zero_pad"), ToEach(SCALING))
    run_rounds(loop)
    state = loop.aggregator.init(loop.federation.initial_adapter)
    assert isinstance(loop.engine, Clients)
    for client in loop.federation.clients:
        common = loop.aggregator.broadcast(state, client.plan.resolve(loop.federation.shapes))
        for module, own in loop.engine.seen[1, client.client_id].trainable.items():
            assert torch.equal(own.B, common.trainable[module].B + "abcd".index(client.client_id))


@pytest.mark.parametrize("on_a_clock", [False, True])
def test_records_have_the_ranks_and_bytes_of_what_each_client_was_sent(tmp_path, loop_in, clocked, on_a_clock):
    method = ToEach(SCALING, fewer=2)
    loop = loop_of(loop_in(tmp_path, num_rounds=2, cohort_size=3, method="zero_pad"), method)
    if on_a_clock:  # The two slow clients are too late.
        loop = clocked(loop, Policy("deadline", deadline_seconds=5.0))
    run_rounds(loop)
    clients = {client.client_id: client for client in loop.federation.clients}
    state = method.init(loop.federation.initial_adapter)
    for client in read_records(tmp_path / "records.jsonl")[1].clients:
        plan = clients[client.client_id].plan
        sent = method.broadcast_to(state, plan.resolve(loop.federation.shapes), client.client_id)
        assert client.down_bytes == len(encode_broadcast(sent, "float32"))
        if client.outcome == "ok":
            assert client.ranks == {"attn": 1, "mlp": 1 if plan.name == "low" else 2}
            assert client.up_bytes == len(encode_update(Update("x", sent.trainable, 1.0), sent, "float32"))
        else:
            assert on_a_clock and client.stage in ("train", "upload", "late")


def test_a_broadcast_that_nobody_could_use_ends_the_run_with_the_rule(tmp_path, loop_in):
    class Fewer(ToEach):
        """Sends fewer directions than asked for without saying so."""

        traits = Traits(per_client=True)  # type: ignore[assignment]

    loop = loop_of(loop_in(tmp_path, num_rounds=2, method="zero_pad"), Fewer(SCALING, fewer=2))
    with pytest.raises(BroadcastError, match="the rank of a broadcast must be 3, as asked for; got 1"):
        run_rounds(loop)


def test_late_changes_of_cores_are_refused(tmp_path, loop_in, clocked):
    loop = clocked(loop_in(tmp_path, num_rounds=1), Policy("async", buffer_size=1))

    class Cores(Clients):
        def train(self, order: RoundOrder) -> Iterator[Update]:
            for update in super().train(order):
                yield dataclasses.replace(update, cores={})

    run_rounds(dataclasses.replace(loop, engine=Cores()))
    assert "clients train cores" in str(read_records(tmp_path / "records.jsonl")[1].note)
    assert issubclass(AggregationError, ValueError)
