"""Trainers are threads of this process, so that a test says when each of them answers or fails."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from flexlora.data.prompts import EncodedExample
from flexlora.engines import chunks
from flexlora.engines.chunk_trainer import AskTask, TrainTask
from flexlora.engines.dispatch import ChunkLostError, Dispatcher, RemoteTrainer, TrainerPool
from flexlora.engines.simulation import SimulationEngine
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast, ClientFailure, Reply, Update
from flexlora.lora.factors import LoraFactors
from flexlora.training.one_client import LocalTraining

PLAN = RankPlan("any", (("", 1),))
COHORT = [ClientSpec(f"client {index}", PLAN, 1) for index in range(6)]
BROADCASTS = {PLAN: Broadcast({"layer": LoraFactors(torch.ones(1, 2), torch.ones(3, 1), 1.0)})}
SECONDS = 20


class Fake:
    """Answers a chunk with what ``answer`` yields."""

    def __init__(self, answer: Callable[[TrainTask], Iterator[Update | ClientFailure]], error: Exception | None = None):
        self.answer, self.error = answer, error
        self.tasks: list[TrainTask] = []
        self.asked: list[AskTask] = []
        self.stopped, self.closed = threading.Event(), threading.Event()

    def prepare(self) -> None:
        if self.error is not None:
            raise self.error

    def train(self, task: TrainTask) -> Iterator[Update | ClientFailure]:
        self.tasks.append(task)
        yield from self.answer(task)

    def ask(self, task: AskTask) -> Iterator[Reply | ClientFailure]:
        self.asked.append(task)
        for client_id, request in task.requests.items():
            if request == b"die":
                raise ChunkLostError("it died", has_begun=True)
            yield Reply(client_id, b"there " + request)

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        self.closed.set()


def there(task: TrainTask) -> Iterator[Update]:
    for client in task.clients:
        yield Update(client.client_id, {}, 1.0, {"here": 0.0})


def train_here(model, broadcast, examples, settings, learning_rate, seed):
    return broadcast.trainable, {"loss": 1.0, "steps": 0.0}


def examples_of(client_id: str) -> list[EncodedExample]:
    return [EncodedExample((1, 2), (1, 2))]


@pytest.fixture(autouse=True)
def chunks_of_two(monkeypatch) -> None:
    # One step of a client has two tokens.
    monkeypatch.setattr(chunks, "_STEP_TOKENS", {"cpu": (4, 4)})


@pytest.fixture
def pool() -> Iterator[TrainerPool]:
    pool = TrainerPool()
    yield pool
    pool.close()
    assert not any(thread.is_alive() for thread in pool._threads)


@pytest.fixture
def train(model, pool, order_of):
    """Returns a function that trains the cohort with some trainers and, unless told otherwise, nowhere else."""
    engine = SimulationEngine(model, examples_of, LocalTraining(batch_size=1, max_steps=1), train_one=train_here)

    def train(*trainers, shares_work=False, cohort=COHORT, engine=engine):
        for trainer in trainers:
            pool.add(trainer)
        return Dispatcher(engine, pool, 1).train(
            order_of(1, cohort, BROADCASTS),
            num_processes=len(trainers) + shares_work,
            shares_work=shares_work,
            before_chunk=lambda: None,
        )

    return train


def ids(outcomes) -> list[str]:
    return [outcome.client_id for outcome in outcomes]


def where(outcomes) -> str:
    """Returns ``t`` for each client that a trainer trained, ``h`` for each trained here."""
    return "".join("t" if "here" in outcome.metrics else "h" for outcome in outcomes)


def test_a_fake_is_a_trainer():
    assert isinstance(Fake(there), RemoteTrainer)


def test_outcomes_come_in_cohort_order_though_a_later_chunk_is_done_first(train):
    second_is_done = threading.Event()

    def answer(task):
        is_first = task.clients[0] is COHORT[0]
        assert not is_first or second_is_done.wait(SECONDS)
        yield from there(task)
        if not is_first:
            second_is_done.set()

    outcomes = list(train(Fake(answer), Fake(answer)))
    assert ids(outcomes) == ids(COHORT)
    assert where(outcomes) == "tttttt"


def test_the_first_outcome_of_a_chunk_does_not_wait_for_the_others(train):
    goes_on = threading.Event()

    def answer(task):
        for outcome in there(task):
            yield outcome
            assert goes_on.wait(SECONDS)

    outcomes = train(Fake(answer), cohort=COHORT[:2])
    assert next(outcomes).client_id == "client 0"
    goes_on.set()
    assert ids(outcomes) == ["client 1"]


def test_this_process_shares_the_work_if_asked_to(train, pool):
    def answer(task):
        while not pool.seconds_here:
            time.sleep(0.01)
        yield from there(task)

    outcomes = list(train(Fake(answer), shares_work=True))
    assert ids(outcomes) == ids(COHORT)
    assert "hh" in where(outcomes)


def test_a_chunk_that_cannot_be_sent_trains_here_even_if_others_do_not(train, model):
    def some_are_gone(client_id):
        if client_id == "client 3":
            raise OSError("disk is gone")
        return examples_of(client_id)

    lacking = SimulationEngine(model, some_are_gone, LocalTraining(batch_size=1, max_steps=1), train_one=train_here)
    outcomes = list(train(Fake(there), engine=lacking))
    assert ids(outcomes) == ids(COHORT)
    assert outcomes[3].reason == "OSError: disk is gone"
    assert where(outcomes[:3] + outcomes[4:]) == "tthtt"


def test_an_engine_that_cannot_be_pickled_trains_here_and_says_so(train, model, caplog):
    own_way = SimulationEngine(
        model, examples_of, LocalTraining(), train_one=lambda *arguments: (BROADCASTS[PLAN].trainable, {})
    )
    unused = Fake(there)
    assert where(train(unused, engine=own_way)) == "hhhhhh"
    assert not unused.tasks
    assert "Clients train in one process, because the training cannot be pickled" in caplog.text


def test_a_chunk_that_is_lost_once_begun_becomes_failures_of_the_clients_that_are_missing(train):
    def answer(task):
        if task.clients[0] is COHORT[2]:
            yield Update("client 2", {}, 1.0, {"here": 0.0})
            raise ChunkLostError("it died", has_begun=True)
        yield from there(task)

    outcomes = list(train(Fake(answer)))
    assert ids(outcomes) == ids(COHORT)
    (failure,) = (outcome for outcome in outcomes if isinstance(outcome, ClientFailure))
    assert (failure.client_id, failure.stage, failure.reason) == ("client 3", "train", "it died")
    assert failure.down_bytes > 0


def test_a_chunk_that_is_lost_before_it_is_begun_is_given_out_again(train):
    lost = []

    def answer(task):
        if not lost:
            lost.append(task)
            raise ChunkLostError("it died", has_begun=False)
        yield from there(task)

    trainer = Fake(answer)
    assert where(train(trainer)) == "tttttt"
    assert sum(task.clients == lost[0].clients for task in trainer.tasks) == 2


def test_trainers_that_cannot_start_or_are_of_no_use_leave_the_work_to_others(train, pool, caplog):
    def odd(task):
        raise ValueError("odd answer")
        yield

    useful = Fake(there)
    outcomes = list(train(Fake(there, OSError("no memory")), Fake(odd), useful))
    assert all(isinstance(outcome, Update) for outcome in outcomes)
    assert ids(outcomes) == ids(COHORT)
    assert pool.trainers[-1] is useful
    assert caplog.text.count("Training continues in fewer processes, because one could not be started") <= 1


def test_without_any_trainer_that_can_start_this_process_trains(train, caplog):
    assert where(train(Fake(there, OSError("no memory")))) == "hhhhhh"
    assert "because one could not be started: no memory" in caplog.text


def test_a_caller_that_stops_early_stops_the_trainers_at_work_for_it(train):
    begun = threading.Event()

    def answer(task):
        begun.set()
        assert trainer.stopped.wait(SECONDS)
        raise ChunkLostError("stopped", has_begun=True)
        yield

    trainer, idle = Fake(answer), Fake(there)
    outcomes = train(trainer, shares_work=True, cohort=COHORT[:4])
    next(outcomes)
    assert begun.wait(SECONDS)
    outcomes.close()
    assert trainer.stopped.is_set() and not idle.stopped.is_set()


def test_closing_a_pool_closes_its_trainers_and_then_what_they_use(pool):
    trainer, order = Fake(there), []
    trainer.close = lambda: order.append("trainer")
    pool.add(trainer)
    pool.resources.callback(order.append, "resource")
    pool.close()
    assert order[:2] == ["trainer", "resource"]


def held(task: TrainTask) -> Iterator[Update]:
    for client in task.clients:
        yield Update(client.client_id, {}, 1.0, is_held=True)


class Here:
    """A client of this process in the phases of a round."""

    def begin(self, holding):
        return self

    def answer(self, kind, request):
        return b"here " + request


@pytest.fixture
def dispatcher(model, pool, order_of):
    """Returns a dispatcher of which a trainer and this process have trained, and the trainer."""
    engine = SimulationEngine(model, examples_of, LocalTraining(batch_size=1, max_steps=1), train_one=train_here)

    has_begun = threading.Event()

    def answer(task):
        has_begun.set()
        while not pool.seconds_here:
            time.sleep(0.01)
        yield from held(task)

    trainer, dispatcher = Fake(answer), Dispatcher(engine, pool, 1)
    pool.add(trainer)
    order = order_of(1, COHORT, BROADCASTS, phases=Here())
    outcomes = dispatcher.train(order, num_processes=2, shares_work=True, before_chunk=lambda: has_begun.wait(SECONDS))
    assert all(outcome.is_held for outcome in outcomes)
    return dispatcher, trainer


def test_clients_are_asked_where_they_trained_and_answers_come_in_order(dispatcher, pool):
    asked, trainer = dispatcher
    there = set(pool.holders)
    assert 0 < len(there) < len(COHORT)
    requests = {client.client_id: client.client_id.encode() for client in reversed(COHORT)}
    replies = list(asked.ask("keys", requests))
    assert ids(replies) == list(requests)
    for reply in replies:
        where = b"there " if reply.client_id in there else b"here "
        assert reply == Reply(reply.client_id, where + requests[reply.client_id])
    assert [(task.kind, set(task.requests)) for task in trainer.asked] == [("keys", there)]


def test_clients_of_a_trainer_that_dies_while_it_answers_fail(dispatcher, pool):
    asked, _ = dispatcher
    first, *others = pool.holders
    here = next(client.client_id for client in COHORT if client.client_id not in pool.holders)
    replies = list(asked.ask("keys", {first: b"1", here: b"2", **dict.fromkeys(others, b"die")}))
    assert replies[:2] == [Reply(first, b"there 1"), Reply(here, b"here 2")]
    assert replies[2:] == [ClientFailure(one, "keys", "it died", 3) for one in others]


def test_at_the_end_of_a_round_all_forget(dispatcher, pool):
    asked, trainer = dispatcher
    asked.forget()
    assert trainer.asked[-1] == AskTask(None) and not pool.holders
    assert all(isinstance(one, ClientFailure) for one in asked.ask("keys", {"client 0": b"", "client 5": b""}))
    assert asked.forget() is None and len(trainer.asked) == 1
