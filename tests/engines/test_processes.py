import contextlib
import dataclasses
import importlib
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch

from flexlora.data.pretraining import BASE_FOLDER as BASE
from flexlora.data.prompts import EncodedExample
from flexlora.engines import chunks
from flexlora.engines.base import Engine
from flexlora.engines.processes import ChildProcesses, ProcessEngine
from flexlora.engines.simulation import SimulationEngine
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast, ClientFailure, Reply, Update
from flexlora.lora.factors import Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import load_base_model, target_modules
from flexlora.training.one_client import LocalTraining
from flexlora.uplink.wire import encode_broadcast

SMALL = RankPlan("small", (("self_attn", 2),))
LARGE = RankPlan("large", (("self_attn", 3), ("mlp", 5)))
# One step of 4 rows of 130 tokens is a chunk of its own.
SETTINGS = LocalTraining(batch_size=4, max_steps=1)
COHORT = [ClientSpec(f"client {index}", (SMALL, LARGE)[index % 2], 4 + index) for index in range(8)]
MODULE = "model.layers.0.self_attn.q_proj"
PATIENCE_SECONDS = 120

# A module that children can import, as they could not import this one.
CLIENT_SIDE = """
import dataclasses, os, time
from pathlib import Path
from flexlora.training.one_client import train_client

@dataclasses.dataclass(frozen=True)
class Stamp:
    "Notes in which process a client trained."
    def send(self, update, rng):
        return dataclasses.replace(update, metrics={**update.metrics, "process": os.getpid()})
    def receive(self, updates, rng):
        yield from updates

class Phases:
    "Says in which process a client answers, what it holds, and what it was asked so far; dies when told to."
    def begin(self, holding):
        return Holder(holding)

class Holder:
    def __init__(self, holding):
        self.holding, self.asked = holding, []
    def answer(self, kind, request):
        if request == b"die":
            os._exit(3)
        self.asked.append(request)
        return repr((os.getpid(), float(self.holding.update.payload["MODULE"].B.sum()), self.asked)).encode()

@dataclasses.dataclass(frozen=True)
class Stuck:
    "Trains in one process only; in others it says who it is and never ends."
    here: int
    folder: str
    interrupted: bool = False
    def __call__(self, model, broadcast, examples, settings, learning_rate, seed):
        if os.getpid() == self.here and not self.interrupted:
            return train_client(model, broadcast, examples, settings, learning_rate, seed)
        if os.getpid() == self.here:
            while not list(Path(self.folder).iterdir()):
                time.sleep(0.01)
            raise KeyboardInterrupt
        (Path(self.folder) / str(os.getpid())).touch()
        time.sleep(3600)
"""


@pytest.fixture(scope="module", autouse=True)
def every_client_is_a_chunk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_STEP_TOKENS", {"cpu": (512, 512)})
        yield


def examples_of(client_id):
    rng = np.random.default_rng(int(client_id.split()[1]))
    rows = [tuple(rng.integers(3, 259, 130).tolist()) for _ in range(4 + int(client_id.split()[1]))]
    return [EncodedExample(row, (*[-100] * 60, *row[60:])) for row in rows]


@pytest.fixture(scope="module")
def embedded():
    network, tokenizer = load_base_model(str(BASE), dtype="float32", device="cpu", attn_implementation="sdpa")
    return AdaptedModel(network, tokenizer)


@pytest.fixture(scope="module")
def broadcasts(embedded):
    shapes = target_modules(embedded.network, "all-linear")
    scaling = Scaling("constant_alpha", 16.0)
    return {plan: Broadcast(embedded.initial_adapter(plan.resolve(shapes), scaling, 0)) for plan in (SMALL, LARGE)}


@pytest.fixture(scope="module")
def client_side(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "client_side_of_the_processes_test.py").write_text(
        CLIENT_SIDE.replace("MODULE", MODULE), encoding="utf-8"
    )
    sys.path.append(str(folder))
    yield importlib.import_module("client_side_of_the_processes_test")
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def simulation(embedded):
    return SimulationEngine(embedded, examples_of, SETTINGS)


@pytest.fixture(scope="module")
def children(embedded, client_side):
    children = ChildProcesses(embedded, ["cpu"], 1, seconds_before_children=0)
    yield children
    children.close()


@pytest.fixture
def engine(simulation, children, broadcasts, order_of):
    """Returns an engine whose child is ready."""
    engine = ProcessEngine(simulation, children)
    wait_for_children(engine, broadcasts, order_of)
    return engine


def wait_for_children(engine, broadcasts, order_of):
    for _ in range(PATIENCE_SECONDS):
        list(engine.train(order_of(1, COHORT[:4], broadcasts)))
        if engine.children.are_ready():
            return
        time.sleep(0.3)
    raise AssertionError("no child got ready")


def child_of(engine):
    (child,) = engine.children.trainers
    return child


def assert_same(outcomes, expected, **tolerance):
    assert [outcome.client_id for outcome in outcomes] == [outcome.client_id for outcome in expected]
    for outcome, other in zip(outcomes, expected, strict=True):
        assert isinstance(outcome, Update)
        assert (outcome.weight, outcome.up_bytes, outcome.down_bytes) == (
            other.weight,
            other.up_bytes,
            other.down_bytes,
        )
        assert outcome.payload.keys() == other.payload.keys()
        for path, factors in outcome.payload.items():
            for name in ("A", "B"):
                torch.testing.assert_close(
                    getattr(factors, name), getattr(other.payload[path], name), **{"rtol": 0, "atol": 0} | tolerance
                )


def test_it_is_an_engine(simulation, embedded):
    assert isinstance(ProcessEngine(simulation, ChildProcesses(embedded, [], 1)), Engine)


def test_two_processes_give_the_bits_of_one_and_the_numbers_of_a_plain_simulation(
    engine, simulation, embedded, broadcasts, order_of, client_side
):
    together = list(engine.train(order_of(2, COHORT, broadcasts, uplink=[client_side.Stamp()])))
    assert {update.metrics["process"] for update in together} == {os.getpid(), child_of(engine).process.pid}
    alone = list(ProcessEngine(simulation, ChildProcesses(embedded, [], 1)).train(order_of(2, COHORT, broadcasts)))
    assert_same(together, alone)
    assert all(update.metrics["loss"] == other.metrics["loss"] for update, other in zip(together, alone, strict=True))
    assert_same(together, list(simulation.train(order_of(2, COHORT, broadcasts))), atol=1e-5)


def test_a_client_that_fails_in_any_process_is_reported_and_the_others_go_on(engine, simulation, broadcasts, order_of):
    def some_are_empty(client_id):
        return [] if client_id in ("client 1", "client 2", "client 6") else examples_of(client_id)

    lacking = dataclasses.replace(simulation, examples_of=some_are_empty)
    outcomes = list(dataclasses.replace(engine, engine=lacking).train(order_of(1, COHORT, broadcasts)))
    failures = [outcome for outcome in outcomes if isinstance(outcome, ClientFailure)]
    assert [failure.client_id for failure in failures] == ["client 1", "client 2", "client 6"]
    assert {failure.reason for failure in failures} == {"a client needs at least one training example; got none"}
    assert failures[0].down_bytes == len(encode_broadcast(broadcasts[LARGE], "float32"))


def test_what_cannot_be_sent_to_a_child_fails_as_it_would_here(engine, simulation, broadcasts, order_of):
    def some_are_gone(client_id):
        if client_id == "client 5":
            raise OSError("disk is gone")
        return examples_of(client_id)

    lacking = dataclasses.replace(engine, engine=dataclasses.replace(simulation, examples_of=some_are_gone))
    outcomes = list(lacking.train(order_of(1, COHORT, {LARGE: broadcasts[LARGE]})))
    assert [outcome.client_id for outcome in outcomes] == [client.client_id for client in COHORT]
    failures = {outcome.client_id: outcome for outcome in outcomes if isinstance(outcome, ClientFailure)}
    assert failures.keys() == {"client 0", "client 2", "client 4", "client 5", "client 6"}
    assert (failures["client 0"].stage, failures["client 5"].stage) == ("broadcast", "train")
    assert failures["client 5"].reason == "OSError: disk is gone"


def test_engines_share_the_children(engine, simulation, children, broadcasts, order_of):
    before = child_of(engine).process.pid
    settings = dataclasses.replace(SETTINGS, batch_size=2)
    other = ProcessEngine(dataclasses.replace(simulation, settings=settings), children)
    one, another = (next(iter(list(each.train(order_of(1, COHORT, broadcasts))))) for each in (engine, other))
    assert not torch.equal(one.payload[MODULE].B, another.payload[MODULE].B)
    assert child_of(engine).process.pid == before


def test_an_engine_that_cannot_be_pickled_trains_here(engine, simulation, children, broadcasts, order_of, caplog):
    own_way = dataclasses.replace(simulation, train_one=lambda *arguments: (broadcasts[SMALL].trainable, {"loss": 1.0}))
    outcomes = list(ProcessEngine(own_way, children).train(order_of(1, COHORT[::2], broadcasts)))
    assert all(isinstance(outcome, Update) for outcome in outcomes)
    assert "Clients train in one process, because the training cannot be pickled" in caplog.text


def test_children_ignore_an_interruption_of_their_own(engine, broadcasts, order_of):
    process = child_of(engine).process
    os.kill(process.pid, signal.SIGINT)
    assert all(isinstance(outcome, Update) for outcome in engine.train(order_of(1, COHORT, broadcasts)))
    assert process.poll() is None


def test_a_killed_child_loses_only_the_clients_it_was_training(
    engine, simulation, broadcasts, order_of, client_side, tmp_path
):
    stuck = dataclasses.replace(simulation, train_one=client_side.Stuck(os.getpid(), str(tmp_path)))
    outcomes, process_id = [], child_of(engine).process.pid
    for outcome in dataclasses.replace(engine, engine=stuck).train(order_of(1, COHORT, broadcasts)):
        outcomes.append(outcome)
        for path in tmp_path.iterdir():
            assert int(path.name) == process_id
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
    assert [outcome.client_id for outcome in outcomes] == [client.client_id for client in COHORT]
    failures = [outcome for outcome in outcomes if isinstance(outcome, ClientFailure)]
    assert len(failures) == 1
    assert failures[0].stage == "train"
    assert f"process {process_id} was killed (signal 9" in failures[0].reason
    assert "while it trained this client" in failures[0].reason
    wait_for_children(engine, broadcasts, order_of)
    assert child_of(engine).process.pid != process_id


def test_a_child_that_is_killed_between_chunks_loses_nothing(engine, broadcasts, order_of):
    child = child_of(engine)
    child.process.kill()
    outcomes = list(engine.train(order_of(1, COHORT, broadcasts)))
    assert all(isinstance(outcome, Update) for outcome in outcomes)


# Ends the child for good, so that no later test waits for another.
def test_an_interruption_passes_and_ends_the_children_that_are_at_work(
    engine, simulation, broadcasts, order_of, client_side, tmp_path
):
    process = child_of(engine).process
    stuck = dataclasses.replace(simulation, train_one=client_side.Stuck(os.getpid(), str(tmp_path), interrupted=True))
    with pytest.raises(KeyboardInterrupt):
        list(dataclasses.replace(engine, engine=stuck).train(order_of(1, COHORT, broadcasts)))
    assert process.returncode == -signal.SIGKILL


def test_without_a_child_that_can_start_training_goes_on_here_and_says_so(
    simulation, embedded, broadcasts, order_of, monkeypatch, caplog
):
    monkeypatch.setattr(sys, "executable", str(BASE / "no_python"))
    lonely = ProcessEngine(simulation, ChildProcesses(embedded, ["cpu"], 1, seconds_before_children=0))
    while not lonely.children.pool.has_given_up:
        assert all(isinstance(outcome, Update) for outcome in lonely.train(order_of(1, COHORT[:2], broadcasts)))
    assert all(isinstance(outcome, Update) for outcome in lonely.train(order_of(1, COHORT[:2], broadcasts)))
    assert caplog.text.count("Training continues in fewer processes") == 1
    assert "no_python" in caplog.text


def test_the_last_words_of_a_child_that_cannot_start_are_passed_on(
    simulation, embedded, broadcasts, order_of, monkeypatch, caplog, tmp_path
):
    (tmp_path / "transformers.py").write_text("raise ImportError('broken installation')", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    lonely = ProcessEngine(simulation, ChildProcesses(embedded, ["cpu"], 1, seconds_before_children=0))
    for _ in range(PATIENCE_SECONDS):
        assert all(isinstance(outcome, Update) for outcome in lonely.train(order_of(1, COHORT[:2], broadcasts)))
        if lonely.children.pool.has_given_up:
            break
        time.sleep(0.3)
    assert "ended with exit status 1: ImportError: broken installation" in caplog.text
    assert lonely.children.pool.trainers == []


def test_a_short_run_starts_no_child(simulation, embedded, broadcasts, order_of):
    short = ProcessEngine(simulation, ChildProcesses(embedded, ["cpu"], 1, seconds_before_children=3600))
    assert len(list(short.train(order_of(1, COHORT[:2], broadcasts)))) == 2
    assert short.children.trainers == []


def test_chunks_are_cut_no_further_ahead_than_outcomes_are_taken(simulation, embedded, broadcasts, order_of):
    asked = []

    def counted(client_id):
        asked.append(client_id)
        return examples_of(client_id)

    slow = ProcessEngine(dataclasses.replace(simulation, examples_of=counted), ChildProcesses(embedded, [], 1))
    outcomes = slow.train(order_of(1, COHORT, broadcasts))
    next(outcomes)
    assert asked == ["client 0"]
    outcomes.close()


def test_children_end_when_they_are_no_longer_referred_to(simulation, embedded, broadcasts, order_of):
    passing = ProcessEngine(simulation, ChildProcesses(embedded, ["cpu"], 1, seconds_before_children=0))
    list(passing.train(order_of(1, COHORT[:2], broadcasts)))
    process = child_of(passing).process
    del passing
    assert process.returncode == -signal.SIGKILL


def test_clients_answer_in_the_process_where_they_trained_and_are_lost_with_it(
    engine, simulation, broadcasts, order_of, client_side
):
    expected = {
        one.client_id: float(one.payload[MODULE].B.sum()) for one in simulation.train(order_of(1, COHORT, broadcasts))
    }
    order = order_of(1, COHORT, broadcasts, phases=client_side.Phases())
    for _ in range(PATIENCE_SECONDS):
        assert all(outcome.is_held for outcome in engine.train(order))
        if 0 < len(engine.children.pool.holders) < len(COHORT):
            break
        engine.forget()
    there = list(engine.children.pool.holders)
    for asked in ([b"1"], [b"1", b"2"]):
        for reply in engine.ask("keys", {client.client_id: asked[-1] for client in COHORT}):
            process, total, heard = eval(reply.data)
            assert process == (child_of(engine).process.pid if reply.client_id in there else os.getpid())
            assert heard == asked and total == pytest.approx(expected[reply.client_id], abs=1e-3)
    here = next(client.client_id for client in COHORT if client.client_id not in there)
    lost, kept = engine.ask("keys", {there[0]: b"die", here: b"3"})
    assert isinstance(kept, Reply)
    assert (lost.client_id, lost.stage) == (there[0], "keys")
    assert "ended with exit status 3" in lost.reason and "while it answered" in lost.reason
    (lost,) = engine.ask("keys", {there[0]: b"4"})
    assert "has ended" in lost.reason
    wait_for_children(engine, broadcasts, order_of)
    (lost,) = engine.ask("keys", {there[0]: b"5"})
    assert "holds nothing" in lost.reason or "was replaced" in lost.reason
    engine.forget()
