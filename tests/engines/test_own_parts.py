"""Real training of clients that keep factors, train cores or chosen entries, or each get their own broadcast."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from flexlora.data.prompts import EncodedExample
from flexlora.engines.base import Parcel, RoundOrder
from flexlora.engines.chunk_trainer import packed, unpacked
from flexlora.engines.dispatch import Dispatcher, TrainerPool
from flexlora.engines.open_round import OpenRound
from flexlora.engines.processes import ChildProcesses, ProcessEngine
from flexlora.engines.simulation import SimulationEngine
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.kept_factors import KeptFactorsError, kept_of, with_kept, without_kept
from flexlora.federation.known_rows import mask_of
from flexlora.federation.messages import Broadcast, ClientFailure, SparseMask, Update
from flexlora.federation.streams import stream_seed
from flexlora.lora.factors import LoraFactors
from flexlora.training.base_model import target_modules
from flexlora.training.one_client import LocalTraining, train_client
from flexlora.uplink.compression import Compression, compressed_size, read_compressed
from flexlora.uplink.wire import encode_update

PLAN = RankPlan("plan", (("q_proj|down_proj", 3),))
COHORT = [ClientSpec("ann", PLAN, 3), ClientSpec("bob", PLAN, 4), ClientSpec("cyd", PLAN, 5)]
SETTINGS = LocalTraining("sgd", batch_size=2)


def examples_of(client_id):
    rng = np.random.default_rng(len(client_id) + ord(client_id[0]))
    number = {client.client_id: client.num_examples for client in COHORT}[client_id]
    rows = [tuple(rng.integers(3, 259, 12).tolist()) for _ in range(number)]
    return [EncodedExample(row, (*[-100] * 6, *row[6:])) for row in rows]


@pytest.fixture
def shapes(model):
    shapes = target_modules(model.network, "all-linear")
    return {path: shapes[path] for path in PLAN.resolve(shapes)}


@pytest.fixture
def adapter(shapes, random_adapter, scaling):
    return random_adapter(shapes, dict.fromkeys(shapes, 3), scaling)


@pytest.fixture
def engine(model):
    return SimulationEngine(model, examples_of, SETTINGS)


def alone(model, start, client, server_round=1):
    """Return what ``train_client`` makes of a start for a client, with its seed in this round."""
    seed = stream_seed(11, "train", server_round, client.client_id)
    trained, _ = train_client(model, start, examples_of(client.client_id), SETTINGS, 0.01 / server_round, seed)
    return trained, model.read_cores()


def assert_close(found, expected):
    for path, own in expected.items():
        torch.testing.assert_close(found[path].A, own.A, rtol=0, atol=1e-4)
        torch.testing.assert_close(found[path].B, own.B, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["A", "B"])
def test_a_client_trains_from_what_it_kept_and_returns_it_beside_its_update(
    engine, model, adapter, random_adapter, shapes, scaling, order_of, name
):
    sent = Broadcast(adapter, kept=name)
    other = random_adapter(shapes, dict.fromkeys(shapes, 3), scaling, 8)
    kept = {"bob": {path: getattr(own, name) for path, own in other.items()}}
    updates = list(engine.train(order_of(1, COHORT, {PLAN: sent}, kept=kept)))
    for client, update in zip(COHORT, updates, strict=True):
        trained, _ = alone(model, with_kept(sent, kept.get(client.client_id)), client)
        assert_close(
            {path: dataclasses.replace(own, **{name: update.kept[path]}) for path, own in update.payload.items()},
            trained,
        )
        assert all(torch.equal(getattr(update.payload[path], name), getattr(adapter[path], name)) for path in adapter)
        assert update.up_bytes == len(encode_update(update, sent, "float32"))


def test_a_kept_factor_of_another_rank_fails_its_client_with_the_reason(engine, adapter, order_of):
    kept = {"ann": {path: own.B[:, :2] for path, own in adapter.items()}}
    failed, *others = engine.train(order_of(1, COHORT, {PLAN: Broadcast(adapter, kept="B")}, kept=kept))
    assert isinstance(failed, ClientFailure) and "a kept B must have the shape" in failed.reason
    assert all(isinstance(update, Update) for update in others)
    with pytest.raises(KeptFactorsError, match="Keep the ranks of a client the same"):
        with_kept(Broadcast(adapter, kept="B"), kept["ann"])


def test_who_keeps_nothing_starts_and_shows_as_ever(adapter):
    plain, keeps = Broadcast(adapter), Broadcast(adapter, kept="A")
    assert with_kept(plain, {"x": torch.ones(1)}) is plain and with_kept(keeps, None) is keeps
    assert kept_of(adapter, None) is None and without_kept(adapter, plain) is adapter


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_cores_come_back_and_the_factors_as_they_were_sent(engine, model, adapter, order_of, wire_dtype):
    sent = Broadcast(adapter, train_factors="core", cores={path: torch.eye(3) for path in adapter})
    order = order_of(1, COHORT, {PLAN: sent}, wire_dtype=wire_dtype)
    arrived = order.parcel_of(COHORT[0]).arrived
    for client, update in zip(COHORT, engine.train(order), strict=True):
        _, cores = alone(model, arrived, client)
        for path, core in cores.items():
            assert torch.equal(update.cores[path], core.to(getattr(torch, wire_dtype)))
            assert not torch.equal(update.cores[path], torch.eye(3).to(core.dtype))
            assert torch.equal(update.payload[path].A, arrived.trainable[path].A)


def test_chosen_entries_come_back_alone(engine, model, shapes, order_of):
    mask = SparseMask(0.1, 2)
    whole = {path: LoraFactors(torch.eye(shape[1]), torch.zeros(shape), 1.0) for path, shape in shapes.items()}
    sent = Broadcast(whole, train_factors="B", known_A="identity", mask=mask)
    for client, update in zip(COHORT, engine.train(order_of(1, COHORT, {PLAN: sent})), strict=True):
        trained, _ = alone(model, sent, client)
        for path, own in trained.items():
            assert torch.equal(update.payload[path].B, own.B) and own.B[mask_of(mask, path, shapes[path])].all()


def own_order(order_of, adapter, **changes):
    """Return an order in which every client has a broadcast of its own."""
    order: RoundOrder = order_of(1, COHORT, {}, **changes)
    moved = {
        client.client_id: {path: LoraFactors(own.A, own.B + index, own.scaling) for path, own in adapter.items()}
        for index, client in enumerate(COHORT)
    }
    parcels = {name: Parcel(Broadcast(trainable, kept="B"), "float32") for name, trainable in moved.items()}
    return dataclasses.replace(order, parcels=parcels)


def test_every_client_trains_from_its_own_broadcast(engine, model, adapter, order_of):
    order = own_order(order_of, adapter)
    for client, update in zip(COHORT, engine.train(order), strict=True):
        sent = order.parcels[client.client_id].broadcast
        trained, _ = alone(model, sent, client)
        assert_close(
            {path: dataclasses.replace(own, B=update.kept[path]) for path, own in update.payload.items()}, trained
        )
        assert update.down_bytes == len(order.parcels[client.client_id].packet)


@pytest.mark.parametrize("kind", ["kept", "core", "compressed"])
def test_processes_train_the_same_bits_with_what_is_a_clients_own(engine, model, adapter, order_of, kind, monkeypatch):
    order = own_order(order_of, adapter, kept={"cyd": {path: 2 * own.B for path, own in adapter.items()}})
    if kind == "core":
        sent = Broadcast(adapter, train_factors="core", cores={path: torch.eye(3) for path in adapter})
        order = order_of(1, COHORT, {PLAN: sent})
    if kind == "compressed":
        kept = {f"residual/{path}.{name}": getattr(own, name) for path, own in adapter.items() for name in ("A", "B")}
        order = order_of(1, COHORT, {PLAN: Broadcast(adapter)}, compression=Compression(4, True), kept={"cyd": kept})
    # One step of a client has at most 24 tokens: a chunk for each.
    monkeypatch.setattr("flexlora.engines.chunks._STEP_TOKENS", {"cpu": (1, 1)})
    children = ChildProcesses(model, ["cpu"], 1, seconds_before_children=0.0)
    several = ProcessEngine(engine, children)
    here = list(
        Dispatcher(engine, pool := TrainerPool(), 1).train(
            order, num_processes=1, shares_work=True, before_chunk=lambda: None
        )
    )
    pool.close()
    # This process takes no work, so that the child has to train.
    children.start(1)
    there = list(
        Dispatcher(engine, children.pool, 1).train(order, num_processes=2, shares_work=False, before_chunk=lambda: None)
    )
    assert children.trainers[0].has_trained and several.children is children
    children.close()
    for found, expected in zip(there, here, strict=True):
        assert (found.client_id, found.up_bytes, found.down_bytes) == (
            expected.client_id,
            expected.up_bytes,
            expected.down_bytes,
        )
        for path, own in expected.payload.items():
            assert torch.equal(found.payload[path].A, own.A) and torch.equal(found.payload[path].B, own.B)
        for name in ("kept", "cores"):
            mine, theirs = getattr(expected, name), getattr(found, name)
            assert (mine is None) == (theirs is None)
            assert all(torch.equal(theirs[path], tensor) for path, tensor in (mine or {}).items())


def test_compressed_updates_are_what_travels_and_their_clients_remember_the_rest(engine, adapter, order_of):
    how, sent = Compression(8, True), Broadcast(adapter)
    whole = list(engine.train(order_of(1, COHORT, {PLAN: sent})))
    first = list(engine.train(order_of(1, COHORT, {PLAN: sent}, compression=how)))
    assert {update.up_bytes for update in first} == {compressed_size(sent, how)}
    for update, plain in zip(first, whole, strict=True):
        again = read_compressed(update.packet, update, sent, how)
        for path, own in update.payload.items():
            assert torch.equal(again.payload[path].A, own.A) and torch.equal(again.payload[path].B, own.B)
            change = (plain.payload[path].B - adapter[path].B).abs().max()
            assert (own.B - plain.payload[path].B).abs().max() <= change / 127 * 1.001
            error = (plain.payload[path].delta() - own.delta()).float()
            left = update.kept[f"residual/{path}.B"] @ update.kept[f"residual/{path}.A"]
            assert torch.allclose(error, left, atol=1e-5)
    # Each client rounds in its own way, and in another one each round.
    kept = {update.client_id: update.kept for update in first}
    second = list(engine.train(order_of(1, COHORT, {PLAN: sent}, compression=how, kept=kept)))
    without = list(engine.train(order_of(1, COHORT, {PLAN: sent}, compression=how)))
    for update, plain, expected in zip(second, without, first, strict=True):
        path = next(iter(adapter))
        assert torch.equal(plain.payload[path].B, expected.payload[path].B)
        assert not torch.equal(update.payload[path].B, plain.payload[path].B)


def test_a_task_holds_what_its_clients_need_and_no_more(engine, adapter, order_of, monkeypatch):
    monkeypatch.setattr("flexlora.engines.chunks._STEP_TOKENS", {"cpu": (1, 1)})
    order = own_order(order_of, adapter, kept={"ann": {"x": torch.ones(1)}, "bob": {"x": torch.zeros(1)}})
    pool = TrainerPool()
    work = OpenRound(order, engine, pool.condition, 3)
    with pool.condition:
        chunk = work.take(lambda chunk: True)
    task = work.task(chunk.chunk)
    assert list(task.packets) == list(task.kept) == ["ann"] and pickle.loads(task.order).kept == {}


def test_parts_in_different_types_are_unpacked_as_they_were_packed(adapter):
    factors = next(iter(adapter.values()))
    mixed = LoraFactors(factors.A, factors.B.to(torch.bfloat16), 2.0)
    update = Update("a", {"m": mixed}, 1.0, cores={"m": torch.ones(3, 3).half()}, kept={"m": factors.B.T})
    found = unpacked(packed(update))
    assert torch.equal(found.payload["m"].A, mixed.A) and torch.equal(found.payload["m"].B, mixed.B)
    assert torch.equal(found.cores["m"], update.cores["m"]) and torch.equal(found.kept["m"], update.kept["m"])
