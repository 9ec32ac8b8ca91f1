"""Expected outcomes come from the engine of one machine, to the bit; Ray is the real one, with two actors."""

import os
import signal
import sys
import types
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from flexlora.data.pretraining import BASE_FOLDER
from flexlora.data.prompts import EncodedExample
from flexlora.engines.processes import ChildProcesses, ProcessEngine
from flexlora.engines.ray_cluster import ActorSettings, RayActors, RayEngine, RayError
from flexlora.engines.simulation import SimulationEngine
from flexlora.federation.client_types import four_types
from flexlora.federation.clients import ClientSpec
from flexlora.federation.messages import Broadcast, ClientFailure, Update
from flexlora.lora.factors import Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import load_base_model, target_modules
from flexlora.training.one_client import LocalTraining
from flexlora.uplink.phase_messages import fields_and_tensors, message
from flexlora.uplink.secure_sum import SecureSum

ray = pytest.importorskip("ray")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def engine() -> SimulationEngine:
    network, tokenizer = load_base_model(str(BASE_FOLDER), dtype="float32", device="cpu", attn_implementation="eager")
    return SimulationEngine(AdaptedModel(network, tokenizer), examples_of, LocalTraining(batch_size=2))


def examples_of(client_id: str) -> list[EncodedExample]:
    if client_id == "broken":
        raise ValueError("its disk is gone")
    number = int(client_id[1:])
    ids = tuple(range(5 + number, 25 + number))
    return [EncodedExample(ids, (-100,) * 10 + ids[10:])] * 4


@pytest.fixture(scope="module")
def clients() -> list[ClientSpec]:
    plans = list(four_types(1, 2, 4).values())
    return [ClientSpec(f"c{number:02d}", plans[number % 4], 4) for number in range(40)]


@pytest.fixture(scope="module")
def broadcasts(engine: SimulationEngine, clients: list[ClientSpec]) -> dict:
    shapes = target_modules(engine.model.network, "all-linear")
    scaling = Scaling("rslora", 2.0)
    return {
        client.plan: Broadcast(engine.model.initial_adapter(client.plan.resolve(shapes), scaling, 0))
        for client in clients
    }


@pytest.fixture(scope="module")
def actors(engine: SimulationEngine) -> Iterator[RayActors]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield RayActors(engine.model, ActorSettings())
    ray.shutdown()


def test_outcomes_are_those_of_one_machine_in_cohort_order(engine, clients, broadcasts, order_of, actors):
    cohort = [*clients[:20], ClientSpec("broken", clients[0].plan, 4), *clients[20:]]
    here = list(ProcessEngine(engine, ChildProcesses(engine.model, [], 1)).train(order_of(1, cohort, broadcasts)))
    there = list(RayEngine(engine, actors).train(order_of(1, cohort, broadcasts)))
    assert [outcome.client_id for outcome in there] == [client.client_id for client in cohort]
    for one, other in zip(here, there, strict=True):
        assert type(one) is type(other)
        if isinstance(one, ClientFailure):
            assert one == other
            continue
        assert (one.weight, one.metrics, one.up_bytes, one.down_bytes) == (
            other.weight,
            other.metrics,
            other.up_bytes,
            other.down_bytes,
        )
        for module, factors in one.payload.items():
            assert torch.equal(factors.A, other.payload[module].A)
            assert torch.equal(factors.B, other.payload[module].B)


def test_actors_that_die_lose_only_their_chunks_and_are_replaced_even_twice_in_a_round(
    engine, clients, broadcasts, order_of, actors
):
    together = RayEngine(engine, actors)
    outcomes = iter(together.train(order_of(2, clients * 4, broadcasts)))
    arrived = []
    for _ in range(2):
        handle = actors.started()[0]
        os.kill(ray.get(handle.pid.remote()), signal.SIGKILL)
        while actors.started()[0] is handle:
            arrived.append(next(outcomes))
    arrived += outcomes
    assert [outcome.client_id for outcome in arrived] == [client.client_id for client in clients * 4]
    failed = [outcome for outcome in arrived if isinstance(outcome, ClientFailure)]
    assert 0 < len(failed) < len(arrived)
    assert all(failure.reason.startswith("the actor that was to train it was lost") for failure in failed)
    assert {failure.stage for failure in failed} == {"train"}
    assert all(isinstance(outcome, Update) for outcome in together.train(order_of(3, clients, broadcasts)))


def test_what_goes_wrong_within_an_actor_is_the_reason(
    engine, clients, broadcasts, order_of, actors, monkeypatch, caplog
):
    # Pickled by its name, which no actor can import.
    module = types.ModuleType("only_here")
    module.train = lambda *arguments: None
    module.train.__module__, module.train.__qualname__ = "only_here", "train"
    monkeypatch.setitem(sys.modules, "only_here", module)
    broken = replace(engine, train_one=module.train)
    outcomes = list(RayEngine(broken, actors).train(order_of(4, clients, broadcasts)))
    assert [outcome.client_id for outcome in outcomes] == [client.client_id for client in clients]
    assert {failure.reason for failure in outcomes} == {"ModuleNotFoundError: No module named 'only_here'"}
    assert "clients of a chunk are lost" in caplog.text


def test_what_cannot_be_pickled_trains_here(engine, clients, broadcasts, order_of, actors, caplog):
    own_way = replace(engine, train_one=lambda *arguments: (broadcasts[clients[0].plan].trainable, {"loss": 1.0}))
    outcomes = list(RayEngine(own_way, actors).train(order_of(5, clients[:4], broadcasts)))
    assert all(isinstance(outcome, Update) for outcome in outcomes)
    assert "Clients train in one process, because the training cannot be pickled" in caplog.text


def test_an_actor_that_does_not_fit_is_refused_by_name(engine, actors):
    actors.started()
    with pytest.raises(RayError, match=r"ray\.cpus_per_actor"):
        RayActors(engine.model, ActorSettings(cpus=64)).started()
    with pytest.raises(RayError, match=r"ray\.num_actors.*2 here; got 3"):
        RayActors(engine.model, ActorSettings(num_actors=3)).started()


def test_clients_answer_in_the_actor_that_trained_them_and_are_lost_with_it(
    engine, clients, broadcasts, order_of, actors
):
    together = RayEngine(engine, actors)
    outcomes = list(together.train(order_of(5, clients, broadcasts, phases=SecureSum())))
    assert all(outcome.is_held and not outcome.payload for outcome in outcomes)
    request = message({"session": "00" * 16, "sums": 1})
    requests = {client.client_id: request for client in reversed(clients)}
    replies = list(together.ask("keys", requests))
    assert [reply.client_id for reply in replies] == list(requests)
    keys = {fields_and_tensors(reply.data)[0]["seal"] for reply in replies}
    assert len(keys) == len(clients)
    # It remembers, so the same actor was asked.
    (refused,) = together.ask("keys", {clients[0].client_id: request})
    assert (refused.stage, refused.reason[:31]) == ("keys", "this client has given its keys ")
    os.kill(ray.get(actors.started()[0].pid.remote()), signal.SIGKILL)
    replies = list(together.ask("shares", requests))
    reasons = {reply.reason.split(":")[0] for reply in replies}
    assert "the actor that held what this client trained was lost" in reasons and len(reasons) == 2
    together.forget()
    for _ in range(2):
        outcomes = list(together.train(order_of(6, clients, broadcasts)))
    assert all(isinstance(outcome, Update) for outcome in outcomes)


# The last one, because it ends the actors.
def test_closing_the_pool_ends_the_actors_at_work_and_replaces_none(engine, clients, broadcasts, order_of, actors):
    before = list(actors.started())
    outcomes = RayEngine(engine, actors).train(order_of(6, clients * 4, broadcasts))
    next(outcomes)
    actors.pool.close()
    assert actors.started() == before
    assert not any(thread.is_alive() for thread in actors.pool._threads)
    for handle in before:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(handle.pid.remote())
    outcomes.close()
