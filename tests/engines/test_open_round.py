import threading

import pytest
import torch

from flexlora.data.prompts import EncodedExample
from flexlora.engines import chunks
from flexlora.engines.open_round import OpenRound
from flexlora.engines.simulation import SimulationEngine
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast, ClientFailure, Update
from flexlora.lora.factors import LoraFactors
from flexlora.training.one_client import LocalTraining
from flexlora.uplink.wire import encode_broadcast

PLAN, ABSENT = RankPlan("any", (("", 1),)), RankPlan("absent", (("", 2),))
BROADCAST = Broadcast({"layer": LoraFactors(torch.ones(1, 2), torch.ones(3, 1), 1.0)})
COHORT = [ClientSpec(f"client {index}", PLAN, 1) for index in range(6)]


def examples_of(client_id):
    if client_id == "broken":
        raise OSError("disk is gone")
    return [EncodedExample((1, 2), (1, 2))]


@pytest.fixture
def open_round(model, order_of, monkeypatch):
    """Returns a maker of rounds whose chunks have two clients."""
    monkeypatch.setattr(chunks, "_STEP_TOKENS", {"cpu": (4, 4)})
    engine = SimulationEngine(model, examples_of, LocalTraining(batch_size=1))

    def make(cohort=COHORT, most_open=2):
        work = OpenRound(order_of(1, cohort, {PLAN: BROADCAST}), engine, threading.Condition(), most_open)
        work._condition.acquire()
        return work

    return make


def anything(chunk):
    return True


def update(chunk, index):
    return Update(chunk.chunk.clients[index].client_id, {}, 1.0)


def test_outcomes_wait_for_those_of_earlier_clients(open_round):
    work = open_round(COHORT[:4])
    first, second = work.take(anything), work.take(anything)
    work.put(second, update(second, 0))
    assert work.next_outcome() is None
    for index in (0, 1):
        work.put(first, update(first, index))
    work.put(second, update(second, 1))
    assert [work.next_outcome().client_id for _ in range(4)] == [client.client_id for client in COHORT[:4]]
    assert work.next_outcome() is None and work.take(anything) is None
    assert work.is_over


def test_no_more_chunks_are_open_than_allowed(open_round):
    work = open_round()
    first = work.take(anything)
    assert work.take(anything) is not None
    assert work.take(anything) is None and not work.is_over
    for index in (0, 1):
        work.put(first, update(first, index))
    assert work.take(anything) is None
    while work.next_outcome() is not None:
        pass
    assert work.take(anything).chunk.clients == COHORT[4:]


def test_a_chunk_that_one_caller_does_not_accept_is_kept_for_another(open_round):
    work = open_round(COHORT[:4])
    assert work.take(lambda chunk: COHORT[0] not in chunk.clients).chunk.clients == COHORT[2:4]
    assert work.take(anything).chunk.clients == COHORT[:2]


def test_a_chunk_that_is_given_back_is_taken_again(open_round):
    work = open_round()
    chunk = work.take(anything)
    work.give_back(chunk)
    assert work.take(anything) is chunk


def test_failures_name_the_clients_that_are_missing_and_the_bytes_they_received(open_round):
    work = open_round()
    chunk = work.take(anything)
    work.put(chunk, update(chunk, 0))
    work.fail(chunk, "it died")
    assert isinstance(work.next_outcome(), Update)
    down_bytes = len(encode_broadcast(BROADCAST, "float32"))
    assert work.next_outcome() == ClientFailure("client 1", "train", "it died", down_bytes)


@pytest.mark.parametrize("lacking", [ClientSpec("broken", PLAN, 1), ClientSpec("client 9", ABSENT, 1)])
def test_a_chunk_without_examples_or_broadcast_cannot_be_sent(open_round, lacking):
    work = open_round([COHORT[0], lacking])
    assert not work.can_be_sent(work.take(anything).chunk)


def test_a_task_has_all_that_its_clients_need(open_round):
    work, other = open_round(), open_round()
    task = work.task(work.take(work.can_be_sent).chunk)
    assert task.clients == COHORT[:2]
    assert task.examples == {client.client_id: examples_of(client.client_id) for client in COHORT[:2]}
    assert task.packets == {PLAN: encode_broadcast(BROADCAST, "float32")}
    assert task.call != other.task(other.take(other.can_be_sent).chunk).call
