"""A cohort trained over Flower's messages, and every way in which a client can fail to come back."""

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, Error, RecordDict

from flexlora.engines.base import Engine, PhasedEngine, RoundOrder
from flexlora.engines.flower import records
from flexlora.engines.flower.engine import FlowerEngine, FlowerEngineError, Patience
from flexlora.engines.flower.envelope import Envelope, from_bytes
from flexlora.engines.flower.exchange import MOST_HELD
from flexlora.engines.flower.nodes import ClientNodes
from flexlora.engines.flower.records import FACTORS, to_records
from flexlora.engines.flower.run_settings import RunSettings
from flexlora.federation.clients import ClientSpec
from flexlora.federation.message_checks import check_update
from flexlora.federation.messages import Broadcast, ClientFailure, Reply, Update
from flexlora.uplink.compression import Compression, compressed_size, memory_of_round, remembered_round
from flexlora.uplink.phase_messages import message
from flexlora.uplink.secure_sum import SecureSum
from flexlora.uplink.wire import decode_broadcast, encode_update


@pytest.fixture(autouse=True)
def every_payload_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send small payloads as large ones are sent; see ``test_records.py`` for small ones."""
    monkeypatch.setattr(records, "MOST_BYTES_BESIDE", 0)


@pytest.fixture
def engine(grid: Any, flower_run: RunSettings) -> FlowerEngine:
    nodes = ClientNodes(grid, flower_run)
    assert nodes.wait_for(lambda names: len(names) == 2, 60)
    return FlowerEngine(grid, flower_run, nodes, Patience(rejoin_seconds=0.0))


@pytest.fixture
def order(
    engine: FlowerEngine, order_of: Callable[..., RoundOrder], first_broadcast: Callable[[int], Broadcast]
) -> RoundOrder:
    cohort = [found.spec for found in engine.nodes.connected().values()]
    broadcasts = {client.plan: first_broadcast(max(rank for _, rank in client.plan.patterns)) for client in cohort}
    return order_of(1, cohort, broadcasts, seed=7, wire_dtype="bfloat16")


def failure_of(outcomes: list[Update | ClientFailure], client_id: str) -> ClientFailure:
    (found,) = [one for one in outcomes if one.client_id == client_id]
    assert isinstance(found, ClientFailure), found
    return found


def patient(engine: FlowerEngine, **changes: Any) -> FlowerEngine:
    return dataclasses.replace(engine, patience=Patience(rejoin_seconds=0.0, **changes))


def test_clients_are_known_by_what_they_say_about_themselves(engine: FlowerEngine) -> None:
    assert isinstance(engine, Engine)
    found = engine.nodes.connected()
    assert [(name, own.spec.plan.name, own.spec.num_examples) for name, own in found.items()] == [
        ("north", "rank-2", 20),
        ("south", "rank-4", 20),
    ]


def test_updates_come_in_cohort_order_with_the_bytes_that_travelled(engine: FlowerEngine, order: RoundOrder) -> None:
    north, south = engine.train(order)
    assert isinstance(north, Update) and isinstance(south, Update)
    assert (north.client_id, south.client_id) == ("north", "south")
    assert {own.rank for own in north.payload.values()} == {2} and {own.rank for own in south.payload.values()} == {4}
    assert all(own.B.dtype == torch.bfloat16 and own.B.any() for own in north.payload.values())
    assert north.down_bytes == len(order.parcel_of(order.cohort[0]).packet)
    assert north.up_bytes == len(encode_update(north, order.parcel_of(order.cohort[0]).arrived, "bfloat16"))
    assert north.metrics["steps"] == 2 and north.weight == 20.0


def test_compressed_updates_arrive_in_the_bytes_announced_and_whole_ones_are_refused(
    grid: Any,
    flower_run: RunSettings,
    order_of: Callable[..., RoundOrder],
    first_broadcast: Callable[[int], Broadcast],
) -> None:
    run = flower_run.model_copy(update={"upload_bits": 4})
    nodes = ClientNodes(grid, run)
    assert nodes.wait_for(lambda names: len(names) == 2, 60)
    engine = FlowerEngine(grid, run, nodes, Patience(rejoin_seconds=0.0))
    cohort = [found.spec for found in engine.nodes.connected().values()]
    broadcasts = {client.plan: first_broadcast(max(rank for _, rank in client.plan.patterns)) for client in cohort}
    how = Compression(4)
    order = order_of(1, cohort, broadcasts, seed=7, wire_dtype="bfloat16", compression=how)
    for client, update in zip(cohort, engine.train(order), strict=True):
        assert isinstance(update, Update), update
        sent = order.parcel_of(client).arrived
        assert update.up_bytes == compressed_size(sent, how)
        check_update(update, sent, {name: own.shape for name, own in sent.trainable.items()})
        assert any(own.B.any() for own in update.payload.values())
        assert update.kept is None
    eight = dataclasses.replace(order, compression=Compression(8))
    refused = list(engine.train(eight))
    assert all(
        isinstance(one, ClientFailure) and "8 bits a number was expected; got 4" in one.reason for one in refused
    )


def test_a_client_is_told_which_of_its_updates_counted_last(
    grid: Any,
    flower_run: RunSettings,
    order_of: Callable[..., RoundOrder],
    first_broadcast: Callable[[int], Broadcast],
) -> None:
    run = flower_run.model_copy(update={"upload_bits": 8, "error_feedback": True})
    nodes = ClientNodes(grid, run)
    assert nodes.wait_for(lambda names: len(names) == 2, 60)
    engine = FlowerEngine(grid, run, nodes, Patience(rejoin_seconds=0.0))
    cohort = [found.spec for found in engine.nodes.connected().values()]
    broadcasts = {client.plan: first_broadcast(max(rank for _, rank in client.plan.patterns)) for client in cohort}
    options = {"seed": 7, "wire_dtype": "bfloat16", "compression": Compression(8, True)}
    first = {one.client_id: one for one in engine.train(order_of(5, cohort, broadcasts, **options))}
    assert [remembered_round(one.kept) for one in first.values() if isinstance(one, Update)] == [5, 5]
    asked = []
    grid.nodes = {node: lambda request, node=node: asked.append(from_bytes(request)) for node in grid.nodes}
    kept = {"north": memory_of_round(5)}
    with contextlib.suppress(Exception):
        list(engine.train(order_of(6, cohort, broadcasts, kept=kept, **options)))
    told = {request.fields["client_id"]: request.fields["remembers"] for request in asked}
    assert told == {"north": 5} or told == {"north": 5, "south": None}


@pytest.mark.parametrize(
    "metadata", ['{"scalings": ["adapter"]}', '{"fields": null}', '{"scalings": {"adapter": null}}']
)
def test_no_payload_of_a_client_ends_the_round(
    engine: FlowerEngine, grid: Any, order: RoundOrder, metadata: str
) -> None:
    changed = json.loads(metadata)

    def forged(reply: Envelope) -> Envelope:
        content = {"version": 1, "scalings": {"adapter": {}}, "fields": {}, **changed}
        content["checksum"] = f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
        payload = safetensors.torch.save({}, {"flexlora": json.dumps(content, sort_keys=True)})
        return dataclasses.replace(reply, payload=payload)

    grid.faults = {11: forged}
    outcomes = list(engine.train(order))
    assert "must have scalings" in failure_of(outcomes, "north").reason
    assert isinstance(outcomes[1], Update)


def test_a_round_gives_the_same_twice(engine: FlowerEngine, order: RoundOrder) -> None:
    first, second = (list(engine.train(order)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert isinstance(one, Update) and isinstance(other, Update)
        assert all(torch.equal(one.payload[name].A, own.A) for name, own in other.payload.items())


def test_bfloat16_factors_are_one_array_that_safetensors_reads(
    engine: FlowerEngine, grid: Any, order: RoundOrder
) -> None:
    grid.faults = {11: "silent", 12: "silent"}
    list(patient(engine, deadline_seconds=0.05).train(order))
    message = next(one for one in grid.sent.values() if one.metadata.dst_node_id == 11)
    (array,) = message.content.array_records[FACTORS].values()
    assert array.stype == "safetensors"
    sent = decode_broadcast(array.data)
    assert all(own.A.dtype == torch.bfloat16 for own in sent.trainable.values())


def nan_update(reply: Envelope) -> Envelope:
    blob = bytearray(reply.payload)
    start = 8 + int.from_bytes(blob[:8], "little")
    blob[start : start + 2] = b"\xc0\x7f"
    return dataclasses.replace(reply, payload=bytes(blob))


def twice(reply: Envelope) -> Envelope:
    return reply


twice.twice = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fault", "stage", "reason"),
    [
        (Error(5), "train", "its SuperNode is gone"),
        (Error(8, "stopped\nresponding"), "train", "its ClientApp stopped working (stopped responding)"),
        (Error(77), "train", "Flower reported error 77"),
        (lambda reply: RecordDict(), "validate", "must hold the record 'flexlora'"),
        (lambda reply: dataclasses.replace(reply, payload=b"garbage"), "validate", "cannot be read"),
        (lambda reply: dataclasses.replace(reply, payload=b""), "validate", "cannot be read"),
        (lambda reply: dataclasses.replace(reply, payload=reply.payload + bytes(2 << 20)), "validate", "at most"),
        (nan_update, "validate", "does not match its checksum"),
        (lambda reply: dataclasses.replace(reply, kind="letter"), "validate", "answered 'letter'"),
        (
            lambda reply: Envelope("update", {**reply.fields, "server_round": 0}, reply.payload),
            "stale",
            "server_round 0",
        ),
        (lambda reply: Envelope("update", {**reply.fields, "run_id": "other"}, reply.payload), "stale", "run_id"),
        (lambda reply: Envelope("update", {**reply.fields, "client_id": "south"}, reply.payload), "stale", "'south'"),
        (
            lambda reply: Envelope("update", {**reply.fields, "base_sha256": "f" * 64}, reply.payload),
            "validate",
            "its base model has other weights",
        ),
        (lambda reply: Envelope("failure", {"stage": "odd", "reason": "a\nb"}), "train", "a b"),
        (
            lambda reply: to_records(
                reply, ArrayRecord({"factors": Array("float32", (1,), "numpy.ndarray", reply.payload)})
            ),
            "validate",
            "stored as safetensors",
        ),
    ],
)
def test_a_client_that_does_not_come_back_fails_alone_and_says_why(
    engine: FlowerEngine, grid: Any, order: RoundOrder, fault: Any, stage: str, reason: str
) -> None:
    grid.faults = {11: fault}
    outcomes = list(engine.train(order))
    failed = failure_of(outcomes, "north")
    assert failed.stage == stage and reason in failed.reason
    assert failed.down_bytes == len(order.parcel_of(order.cohort[0]).packet)
    assert isinstance(outcomes[1], Update) and outcomes[1].client_id == "south"


def test_a_second_reply_to_a_message_is_dropped(engine: FlowerEngine, grid: Any, order: RoundOrder) -> None:
    grid.faults = {11: twice}
    assert [type(one) for one in engine.train(order)] == [Update, Update]


def test_a_slow_client_misses_the_deadline_and_those_behind_it_do_not(
    engine: FlowerEngine, grid: Any, order: RoundOrder
) -> None:
    grid.faults = {11: "silent"}
    outcomes = list(patient(engine, deadline_seconds=0.05).train(order))
    failed = failure_of(outcomes, "north")
    assert (failed.stage, "deadline" in failed.reason) == ("stale", True)
    assert isinstance(outcomes[1], Update)


def test_a_late_reply_is_not_taken_for_one_of_the_next_round(
    engine: FlowerEngine, grid: Any, order: RoundOrder
) -> None:
    grid.faults = {11: "silent"}
    list(patient(engine, deadline_seconds=0.05).train(order))
    grid.faults = {}
    outcomes = list(engine.train(dataclasses.replace(order, server_round=2)))
    assert all(isinstance(one, Update) for one in outcomes)
    assert len(grid.sent) == 1, "the late one still waits where nobody asks for it"


def test_a_round_that_wants_fewer_updates_than_it_asks_for_ends_when_they_are_there(
    engine: FlowerEngine, grid: Any, order: RoundOrder
) -> None:
    grid.faults = {11: "silent"}
    outcomes = list(patient(engine, num_wanted=1).train(order))
    assert [one.client_id for one in outcomes] == ["south", "north"]
    assert "ended when 1 updates were there" in failure_of(outcomes, "north").reason


def test_a_client_that_is_not_connected_fails_without_being_asked(
    engine: FlowerEngine, grid: Any, order: RoundOrder
) -> None:
    del grid.nodes[11]
    outcomes = list(engine.train(order))
    failed = failure_of(outcomes, "north")
    assert failed.stage == "broadcast" and "was not connected" in failed.reason
    assert isinstance(outcomes[1], Update)


def test_a_restarted_client_is_found_again_on_its_new_node(engine: FlowerEngine, grid: Any, order: RoundOrder) -> None:
    grid.nodes[21] = grid.nodes.pop(11)
    assert all(isinstance(one, Update) for one in patient(engine).train(order))
    assert engine.nodes.node_of("north") == 21


def test_of_two_nodes_of_one_name_the_first_takes_part_until_it_leaves(
    engine: FlowerEngine, grid: Any, silo_works: Any
) -> None:
    grid.nodes[31] = silo_works["north"].answer
    engine.nodes.wait_for(lambda names: engine.nodes.num_pending == 0, 10)
    assert engine.nodes.node_of("north") == 11
    del grid.nodes[11]
    engine.nodes.look()
    assert engine.nodes.node_of("north") == 31


def test_a_node_with_another_base_model_cannot_take_part(grid: Any, flower_run: RunSettings, silo_works: Any) -> None:
    lines: list[str] = []
    nodes = ClientNodes(grid, flower_run.model_copy(update={"base_sha256": "0" * 64}), lines.append)
    nodes.wait_for(lambda names: nodes.num_pending == 0 and bool(nodes.refused), 60)
    assert not nodes.connected() and sorted(nodes.refused) == [11, 12]
    assert "must have the same weights" in nodes.refused[11] and len(lines) == 2


def test_a_node_takes_part_under_the_name_of_its_key_alone(grid: Any, flower_run: RunSettings) -> None:
    lines: list[str] = []
    nodes = ClientNodes(grid, flower_run, lines.append, {11: "north", 12: "north"}.get)
    assert nodes.wait_for(lambda names: bool(names) and not nodes.num_pending, 60)
    assert list(nodes.connected()) == ["north"] and nodes.node_of("north") == 11
    assert "its key is that of north, and it calls itself south" in nodes.refused[12]
    assert any("use --name north" in line for line in lines)


def test_replies_of_a_large_cohort_are_never_all_in_memory(
    grid: Any, flower_run: RunSettings, silo_works: Any, order_of: Callable[..., RoundOrder], first_broadcast: Any
) -> None:
    work = silo_works["north"]
    trained: dict[str, Any] = {}

    def answer(client_id: str) -> Callable[[bytes], bytes]:
        """Answer as north does, under another name; training is the same for all and done once."""
        from flexlora.engines.flower.envelope import from_bytes, to_bytes

        def reply(request: bytes) -> bytes:
            asked = from_bytes(request)
            own = Envelope(asked.kind, {**asked.fields, "client_id": "north"}, asked.payload)
            if asked.kind not in trained:
                trained[asked.kind] = from_bytes(work.answer(to_bytes(own)))
            got = trained[asked.kind]
            return to_bytes(Envelope(got.kind, {**got.fields, "client_id": client_id}, got.payload))

        return reply

    grid.nodes = {number: answer(f"client-{number:02d}") for number in range(16)}
    nodes = ClientNodes(grid, flower_run)
    assert nodes.wait_for(lambda names: len(names) == 16, 60)
    grid.most_pulled = 0
    cohort: list[ClientSpec] = [found.spec for found in nodes.connected().values()]
    order = order_of(1, cohort, {cohort[0].plan: first_broadcast(2)}, seed=7, wire_dtype="bfloat16")
    outcomes = FlowerEngine(grid, flower_run, nodes).train(order)
    assert sum(isinstance(one, Update) for one in outcomes) == 16
    assert grid.most_pulled == MOST_HELD


def test_steps_of_the_uplink_are_refused(engine: FlowerEngine, order: RoundOrder) -> None:
    class Step:
        def send(self, update: Update, rng: torch.Generator) -> Update:
            return update

        def receive(self, updates: Any, rng: torch.Generator) -> Any:
            return updates

    with pytest.raises(FlowerEngineError, match="cannot be sent to the clients"):
        next(engine.train(dataclasses.replace(order, uplink=(Step(),))))


def keys_request(num_sums: int) -> bytes:
    return message({"session": "ab" * 16, "sums": num_sums})


def test_clients_hold_what_they_trained_and_answer_further_phases(engine: FlowerEngine, order: RoundOrder) -> None:
    assert isinstance(engine, PhasedEngine)
    outcomes = list(engine.train(dataclasses.replace(order, phases=SecureSum())))
    assert [(one.client_id, isinstance(one, Update) and one.is_held) for one in outcomes] == [
        ("north", True),
        ("south", True),
    ]
    assert all(isinstance(one, Update) and not one.payload and not one.metrics for one in outcomes)
    keys = list(engine.ask("keys", {"south": keys_request(2), "north": keys_request(2)}))
    assert [one.client_id for one in keys] == ["south", "north"]
    assert all(isinstance(one, Reply) and one.data for one in keys)
    (failed,) = engine.ask("odd", {"north": b""})
    assert isinstance(failed, ClientFailure) and failed.stage == "odd" and "knows no phase" in failed.reason


def test_a_client_that_holds_nothing_says_so(engine: FlowerEngine, grid: Any, order: RoundOrder) -> None:
    list(engine.train(dataclasses.replace(order, phases=SecureSum())))
    list(engine.train(dataclasses.replace(order, server_round=2)))
    (failed,) = engine.ask("keys", {"north": keys_request(2)})
    assert isinstance(failed, ClientFailure) and "holds nothing of round 2" in failed.reason
    del grid.nodes[12]
    engine.nodes.look()
    (failed,) = engine.ask("keys", {"south": keys_request(2)})
    assert isinstance(failed, ClientFailure) and "not connected" in failed.reason


def test_phases_that_clients_do_not_know_are_refused(engine: FlowerEngine, order: RoundOrder) -> None:
    class Odd:
        def begin(self, holding: Any) -> Any:
            return holding

    with pytest.raises(FlowerEngineError, match="know no phases of Odd"):
        next(engine.train(dataclasses.replace(order, phases=Odd())))
