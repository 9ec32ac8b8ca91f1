import dataclasses

import numpy as np
import pytest
import torch

from flexlora.data.prompts import EncodedExample
from flexlora.engines.base import Engine, PhasedEngine
from flexlora.engines.simulation import SimulationEngine
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast, ClientFailure, Reply, Update
from flexlora.federation.streams import stream_seed
from flexlora.lora.factors import LoraFactors
from flexlora.training.base_model import target_modules
from flexlora.training.one_client import LocalTraining, train_client
from flexlora.uplink.phases import Holding, PhaseError
from flexlora.uplink.wire import encode, encode_broadcast

SMALL = RankPlan("small", (("self_attn", 2),))
LARGE = RankPlan("large", (("self_attn", 3), ("mlp", 5)))
COHORT = [
    ClientSpec("ann", LARGE, 3),
    ClientSpec("bob", SMALL, 4),
    ClientSpec("cyd", LARGE, 5),
    ClientSpec("dan", SMALL, 2),
]
SETTINGS = LocalTraining(batch_size=2)


def examples_of(client_id):
    num_examples = {client.client_id: client.num_examples for client in COHORT}[client_id]
    rng = np.random.default_rng(num_examples)
    rows = [tuple(rng.integers(3, 259, 12).tolist()) for _ in range(num_examples)]
    return [EncodedExample(row, (*[-100] * 6, *row[6:])) for row in rows]


@pytest.fixture
def broadcasts(model, random_adapter, scaling):
    shapes = target_modules(model.network, "all-linear")
    return {plan: Broadcast(random_adapter(shapes, plan.resolve(shapes), scaling)) for plan in (SMALL, LARGE)}


@pytest.fixture
def engine(model):
    return SimulationEngine(model, examples_of, SETTINGS)


def failing_for(client_id, error):
    """Returns the real training with one client that raises."""

    def train(model, broadcast, examples, settings, learning_rate, seed):
        if len(examples) == len(examples_of(client_id)):
            raise error
        return train_client(model, broadcast, examples, settings, learning_rate, seed)

    return train


def test_it_is_an_engine(engine):
    assert isinstance(engine, Engine) and isinstance(engine, PhasedEngine)


def test_updates_have_the_ranks_of_the_plans_and_the_bytes_that_travelled(engine, broadcasts, order_of, model):
    shapes = target_modules(model.network, "all-linear")
    updates = list(engine.train(order_of(3, COHORT, broadcasts)))
    assert [update.client_id for update in updates] == ["ann", "bob", "cyd", "dan"]
    for client, update in zip(COHORT, updates, strict=True):
        assert isinstance(update, Update)
        assert {path: factors.rank for path, factors in update.payload.items()} == client.plan.resolve(shapes)
        assert update.weight == client.num_examples
        assert update.down_bytes == len(encode_broadcast(broadcasts[client.plan], "float32"))
        assert update.up_bytes == len(encode(update.payload, "float32"))
        assert update.metrics["steps"] == SETTINGS.num_steps(client.num_examples)
        assert update.train_seconds > 0


@pytest.mark.parametrize("clients_per_group", [None, 1, 2])
def test_a_client_trains_as_it_would_alone(engine, broadcasts, order_of, model, clients_per_group):
    settings = LocalTraining("sgd", batch_size=2)
    engine = dataclasses.replace(engine, settings=settings, clients_per_group=clients_per_group)
    updates = {update.client_id: update for update in engine.train(order_of(2, COHORT, broadcasts))}
    (alone,) = engine.train(order_of(2, [COHORT[2]], broadcasts))
    seed = stream_seed(11, "train", 2, "cyd")
    expected, _ = train_client(model, broadcasts[LARGE], examples_of("cyd"), settings, 0.005, seed)
    for path, factors in expected.items():
        torch.testing.assert_close(updates["cyd"].payload[path].B, factors.B, rtol=0, atol=1e-4)
        torch.testing.assert_close(alone.payload[path].A, factors.A, rtol=0, atol=1e-4)


def test_rounds_and_clients_have_streams_of_their_own(model, broadcasts, order_of):
    seeds = []

    def train(model, broadcast, examples, settings, learning_rate, seed):
        seeds.append(seed)
        return broadcast.trainable, {"loss": 1.0, "steps": 1}

    engine = SimulationEngine(model, examples_of, SETTINGS, train_one=train)
    for server_round in (1, 2):
        list(engine.train(order_of(server_round, COHORT, broadcasts)))
    assert len(set(seeds)) == 8


def test_a_small_wire_dtype_rounds_both_ways_and_halves_the_bytes(engine, broadcasts, order_of):
    exact = next(engine.train(order_of(1, COHORT, broadcasts)))
    rounded = next(engine.train(order_of(1, COHORT, broadcasts, wire_dtype="bfloat16")))
    assert {factors.A.dtype for factors in rounded.payload.values()} == {torch.bfloat16}
    num_values = sum(factors.A.numel() + factors.B.numel() for factors in exact.payload.values())
    assert exact.up_bytes - rounded.up_bytes == pytest.approx(2 * num_values, rel=0.02)
    assert exact.down_bytes - rounded.down_bytes == pytest.approx(2 * num_values, rel=0.02)


@dataclasses.dataclass(frozen=True)
class Halve:
    """Halves the factors; powers of two change no other bit. Notes what its streams begin with."""

    drawn: list

    def send(self, update, rng):
        self.drawn.append(float(torch.rand((), generator=rng)))
        payload = {
            path: LoraFactors(factors.A / 2, factors.B / 2, factors.scaling) for path, factors in update.payload.items()
        }
        return dataclasses.replace(update, payload=payload, weight=2 * update.weight)

    def receive(self, updates, rng):
        yield from updates


def test_client_ends_of_uplink_steps_run_before_the_wire_each_with_its_own_stream(engine, broadcasts, order_of):
    drawn = []
    plain = list(engine.train(order_of(1, COHORT, broadcasts)))
    stepped = engine.train(order_of(1, COHORT, broadcasts, uplink=[Halve(drawn)]))
    for before, after in zip(plain, stepped, strict=True):
        assert (after.client_id, after.weight, after.metrics) == (before.client_id, 2 * before.weight, before.metrics)
        assert (after.up_bytes, after.down_bytes) == (len(encode(after.payload, "float32")), before.down_bytes)
        for path, factors in before.payload.items():
            assert torch.equal(after.payload[path].A * 2, factors.A)
            assert torch.equal(after.payload[path].B * 2, factors.B)
    for server_round in (1, 2):
        list(engine.train(order_of(server_round, COHORT[:1], broadcasts, uplink=[Halve(drawn)])))
    assert len(set(drawn[:4])) == 4
    assert drawn[4] == drawn[0] and drawn[5] not in drawn[:4]


def test_a_step_that_fails_at_a_client_fails_that_client(engine, broadcasts, order_of):
    class Refusing(Halve):
        def send(self, update, rng):
            if update.client_id == "bob":
                raise ValueError("no key")
            return update

    outcomes = list(engine.train(order_of(1, COHORT, broadcasts, uplink=[Refusing([])])))
    assert [type(outcome) for outcome in outcomes] == [Update, ClientFailure, Update, Update]
    assert (outcomes[1].stage, outcomes[1].reason) == ("upload", "ValueError: no key")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("boom\nat line 2"), "RuntimeError: boom at line 2"),
        (MemoryError(), "MemoryError: no message"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_a_failing_client_is_reported_and_the_others_go_on(engine, broadcasts, order_of, error, reason):
    expected = list(dataclasses.replace(engine, train_one=train_client).train(order_of(1, COHORT, broadcasts)))
    broken = dataclasses.replace(engine, train_one=failing_for("bob", error))
    outcomes = list(broken.train(order_of(1, COHORT, broadcasts)))
    down_bytes = len(encode_broadcast(broadcasts[SMALL], "float32"))
    assert outcomes[1] == ClientFailure("bob", "train", reason, down_bytes)
    for index in (0, 2, 3):
        for path, factors in expected[index].payload.items():
            assert torch.equal(outcomes[index].payload[path].B, factors.B)


def test_clients_without_data_or_with_a_diverging_loss_fail_with_our_own_words(engine, broadcasts, order_of):
    empty = dataclasses.replace(engine, examples_of=lambda client_id: [])
    failure = next(empty.train(order_of(1, COHORT, broadcasts)))
    assert failure.reason == "a client needs at least one training example; got none"
    wild = dataclasses.replace(engine, settings=LocalTraining("sgd", batch_size=1, max_grad_norm=None))
    failure = next(wild.train(order_of(1, COHORT, broadcasts, learning_rate=1e30)))
    assert failure.stage == "train"
    assert "the loss must stay finite" in failure.reason
    assert isinstance(next(engine.train(order_of(1, COHORT, broadcasts))), Update)


def test_failures_of_broadcast_and_upload_name_their_stage(engine, broadcasts, order_of):
    outcomes = list(engine.train(order_of(1, COHORT, {SMALL: broadcasts[SMALL]})))
    assert [type(outcome) for outcome in outcomes] == [ClientFailure, Update, ClientFailure, Update]
    assert (outcomes[0].stage, outcomes[0].down_bytes) == ("broadcast", 0)
    odd = dataclasses.replace(engine, train_one=lambda *arguments: ({"path": "no factors"}, {}))
    failure = next(odd.train(order_of(1, COHORT, broadcasts)))
    assert failure.stage == "upload"
    assert failure.down_bytes > 0


def test_an_interruption_is_not_a_failing_client(engine, broadcasts, order_of):
    broken = dataclasses.replace(engine, train_one=failing_for("ann", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        next(broken.train(order_of(1, COHORT, broadcasts)))


def test_clients_train_only_when_their_outcome_is_asked_for(model, broadcasts, order_of):
    started = []

    def train(model, broadcast, examples, settings, learning_rate, seed):
        started.append(len(examples))
        return broadcast.trainable, {"loss": 1.0, "steps": 1}

    engine = SimulationEngine(model, examples_of, SETTINGS, train_one=train)
    outcomes = engine.train(order_of(1, COHORT, broadcasts))
    next(outcomes)
    assert started == [3]


def test_a_base_that_does_not_allow_groups_trains_one_by_one_and_says_so_once(
    engine, broadcasts, order_of, caplog, monkeypatch
):
    monkeypatch.setattr(engine.model, "base_drops_out", True)
    monkeypatch.setattr("flexlora.engines.simulation.train_group", None)
    for server_round in (1, 2):
        assert all(isinstance(outcome, Update) for outcome in engine.train(order_of(server_round, COHORT, broadcasts)))
    assert [record.getMessage() for record in caplog.records] == [
        "Clients train one at a time, which is slower: the base model has dropout of its own."
    ]


@dataclasses.dataclass
class Remembering:
    """Answers with what it holds and what it was asked before; refuses what is no question."""

    holding: Holding
    asked: list

    def answer(self, kind, request):
        if request == b"no question":
            raise PhaseError("this is no question")
        self.asked.append((kind, request))
        return repr((self.holding.server_round, sorted(self.holding.update.payload)[0], self.asked)).encode()


class Phases:
    def begin(self, holding):
        return Remembering(holding, [])


def test_under_phases_updates_stay_with_the_clients(engine, broadcasts, order_of):
    (plain, *_) = engine.train(order_of(1, COHORT, broadcasts))
    outcomes = list(engine.train(order_of(1, COHORT, broadcasts, phases=Phases())))
    assert [outcome.client_id for outcome in outcomes] == ["ann", "bob", "cyd", "dan"]
    for outcome in outcomes:
        assert outcome.is_held and not outcome.payload and not outcome.metrics and outcome.up_bytes == 0
    held = engine._holders["ann"].holding
    assert held.sent.trainable.keys() == broadcasts[LARGE].trainable.keys()
    for path, factors in plain.payload.items():
        assert torch.equal(held.update.payload[path].B, factors.B)
    assert len({holder.holding.seed for holder in engine._holders.values()}) == 4


def test_clients_answer_in_the_order_in_which_they_are_asked_and_remember(engine, broadcasts, order_of):
    list(engine.train(order_of(2, COHORT, broadcasts, phases=Phases())))
    first = "model.layers.0.mlp.down_proj"
    assert list(engine.ask("keys", {"cyd": b"1", "ann": b"2"})) == [
        Reply("cyd", repr((2, first, [("keys", b"1")])).encode()),
        Reply("ann", repr((2, first, [("keys", b"2")])).encode()),
    ]
    (reply,) = engine.ask("shares", {"ann": b"3"})
    assert reply.data == repr((2, first, [("keys", b"2"), ("shares", b"3")])).encode()


def test_a_client_that_does_not_answer_is_a_failure_of_that_phase(engine, broadcasts, order_of):
    list(engine.train(order_of(2, COHORT[:2], broadcasts, phases=Phases())))
    replies = list(engine.ask("keys", {"ann": b"no question", "cyd": b"who?", "bob": b"1"}))
    assert isinstance(replies[2], Reply)
    assert replies[0] == ClientFailure("ann", "keys", "this is no question", 11)
    assert (replies[1].client_id, replies[1].stage, replies[1].down_bytes) == ("cyd", "keys", 4)
    assert "holds nothing" in replies[1].reason


def test_at_the_end_of_a_round_clients_forget(engine, broadcasts, order_of):
    list(engine.train(order_of(2, COHORT, broadcasts, phases=Phases())))
    engine.forget()
    assert all(isinstance(reply, ClientFailure) for reply in engine.ask("keys", {"ann": b"", "bob": b""}))
