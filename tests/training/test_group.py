import copy
import dataclasses
import weakref

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from flexlora.data.prompts import EncodedExample
from flexlora.federation.messages import Broadcast, TailPenalty
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.training import group_backward
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import target_modules
from flexlora.training.common_ranks import common_ranks
from flexlora.training.group import TrainedClient, train_group
from flexlora.training.group_decoder import written_out
from flexlora.training.group_layers import reason_against_groups
from flexlora.training.group_passes import GroupJob
from flexlora.training.linear_modules import ModelError
from flexlora.training.logits import answer_losses
from flexlora.training.one_client import DivergedError, LocalTraining, TrainingError, step_batches, train_client

SGD = LocalTraining("sgd", batch_size=2)


def alone(model, job, settings):
    return train_client(model, job.broadcast, job.examples, settings, job.learning_rate, job.seed)


def distance(left, right):
    assert left.keys() == right.keys()
    assert all(left[path].scaling == right[path].scaling for path in left)
    pairs = [(left[path], right[path]) for path in left]
    return max(float(torch.cat([(a.A - b.A).flatten(), (a.B - b.B).flatten()]).abs().max()) for a, b in pairs)


def assert_as_alone(model, jobs, outcomes, settings, tolerance=1e-5):
    for job, outcome in zip(jobs, outcomes, strict=True):
        assert isinstance(outcome, TrainedClient), outcome
        adapter, metrics = alone(model, job, settings)
        assert distance(adapter, outcome.adapter) < tolerance
        assert distance(adapter, job.broadcast.trainable) > 10 * tolerance
        assert outcome.metrics == pytest.approx(metrics, rel=1e-4)
        assert list(outcome.metrics) == list(metrics)
        assert outcome.train_seconds > 0


@pytest.mark.parametrize(
    "settings",
    [
        LocalTraining("sgd", batch_size=1, max_grad_norm=None),
        LocalTraining("sgd", batch_size=3, num_epochs=1.5, momentum=0.9, weight_decay=0.05),
        LocalTraining("sgd", batch_size=2, gradient_accumulation_steps=3, num_epochs=2.0, max_grad_norm=0.5),
        LocalTraining("sgd", batch_size=8, max_steps=2, max_grad_norm=100.0),
    ],
    ids=["batch-1", "momentum", "accumulated-clipped", "few-steps"],
)
def test_clients_train_in_a_group_as_they_do_alone(model, jobs, settings):
    assert_as_alone(model, jobs, list(train_group(model, jobs, settings)), settings)


def test_clients_whose_factors_are_padded_as_on_a_gpu_train_as_they_do_alone(model, jobs, monkeypatch):
    made = []

    def as_on_a_gpu(_, num_parameters, broadcasts):
        made.append(common_ranks("cuda", num_parameters, broadcasts))
        return made[-1]

    monkeypatch.setattr("flexlora.training.group.common_ranks", as_on_a_gpu)
    settings = LocalTraining("sgd", batch_size=2, momentum=0.9, max_grad_norm=0.5)
    for broadcasts in ((), [job.broadcast for job in jobs]):
        assert_as_alone(model, jobs, list(train_group(model, jobs, settings, broadcasts=broadcasts)), settings)
    assert not made[0].trained and made[-1].trained


@pytest.mark.parametrize("batch_size", [1, 4])
def test_adamw_in_a_group_is_adamw_alone(model, jobs, batch_size):
    # The steps of AdamW hardly depend on the size of a gradient, so a gradient of next to nothing, whose sign is a
    # matter of rounding, moves a factor as far as any other: hence learning rates at which that stays small.
    settings = LocalTraining(batch_size=batch_size, num_epochs=2.0, weight_decay=0.1)
    slow = [dataclasses.replace(job, learning_rate=job.learning_rate / 20) for job in jobs]
    assert_as_alone(model, slow, list(train_group(model, slow, settings)), settings)


@pytest.mark.parametrize("train_factors", ["A", "B"])
def test_one_factor_can_be_trained_beside_clients_that_train_both(model, make_broadcast, train_factors, make_examples):
    broadcasts = [
        make_broadcast(3, train_factors=train_factors),
        make_broadcast(3),
        make_broadcast(2, train_factors="A"),
    ]
    jobs = [GroupJob(broadcast, make_examples(5, seed), 0.02, seed) for seed, broadcast in enumerate(broadcasts)]
    settings = LocalTraining("sgd", batch_size=2, momentum=0.5, max_grad_norm=0.1)
    outcomes = list(train_group(model, jobs, settings))
    assert_as_alone(model, jobs, outcomes, settings)
    kept = "B" if train_factors == "A" else "A"
    for path, factors in outcomes[0].adapter.items():
        assert torch.equal(getattr(factors, kept), getattr(broadcasts[0].trainable[path], kept))


def test_added_terms_of_the_loss_count_in_a_group_as_they_do_alone(model, make_broadcast, make_examples):
    broadcasts = [
        dataclasses.replace(make_broadcast(4, 3), tail_penalty=TailPenalty(0.5, 0.5)),
        make_broadcast(4, 2, seed=1),
        dataclasses.replace(make_broadcast(3, train_factors="A", seed=2), tail_penalty=TailPenalty(2.0, 0.0)),
        dataclasses.replace(make_broadcast(2, train_factors="B", seed=3), tail_penalty=TailPenalty(1.0, 0.7)),
        make_broadcast(3, frozen=(2, 4), seed=4),
    ]
    jobs = [GroupJob(broadcast, make_examples(5, seed), 0.004, seed) for seed, broadcast in enumerate(broadcasts)]
    for proximal in (0.0, 2.0):
        settings = LocalTraining("sgd", batch_size=2, momentum=0.5, proximal=proximal)
        assert_as_alone(model, jobs, list(train_group(model, jobs, settings)), settings)
    plain = [dataclasses.replace(job, broadcast=dataclasses.replace(job.broadcast, tail_penalty=None)) for job in jobs]
    for job, other in zip(jobs, plain, strict=True):
        adapters = [alone(model, one, SGD)[0] for one in (job, other)]
        assert (distance(*adapters) > 1e-4) == (job.broadcast.tail_penalty is not None)


def test_clients_that_enter_later_have_starts_of_their_own(model, make_broadcast, make_examples):
    settings = LocalTraining("sgd", batch_size=2, proximal=2.0)
    jobs = [GroupJob(make_broadcast(3, seed=seed), make_examples(4 + seed, seed), 0.004, seed) for seed in range(5)]
    outcomes = list(train_group(model, jobs, settings, clients_per_group=2))
    assert_as_alone(model, jobs, outcomes, settings)


def test_frozen_branches_of_any_rank_are_added_and_stay(model, make_broadcast, make_examples):
    broadcasts = [make_broadcast(3, frozen=(2, 0, 5)), make_broadcast(3), make_broadcast(2, 0, frozen=(7,), seed=3)]
    jobs = [GroupJob(broadcast, make_examples(5, seed), 0.02, seed) for seed, broadcast in enumerate(broadcasts)]
    outcomes = list(train_group(model, jobs, SGD))
    assert_as_alone(model, jobs, outcomes, SGD)
    without = dataclasses.replace(jobs[0], broadcast=Broadcast(broadcasts[0].trainable))
    assert distance(alone(model, without, SGD)[0], outcomes[0].adapter) > 1e-4


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_a_group_equals_stock_peft_with_a_stock_optimiser(
    make_network, tokenizer, random_adapter, targets, make_examples
):
    """Independent of train_client: get_peft_model, state dicts, transformers' own loss, one example after the other."""
    rank, alpha, settings = 4, 6, LocalTraining("adamw", batch_size=3, max_grad_norm=None, weight_decay=0.01)
    model = AdaptedModel(make_network(), tokenizer)
    shapes = target_modules(model.network, targets)
    jobs = [
        GroupJob(
            Broadcast(
                random_adapter(shapes, dict.fromkeys(shapes, rank), Scaling("constant_alpha", float(alpha)), seed)
            ),
            make_examples(5, seed),
            1e-3,
            seed,
        )
        for seed in range(3)
    ]
    peft = get_peft_model(make_network(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    for job, outcome in zip(jobs, train_group(model, jobs, settings), strict=True):
        state = {
            f"base_model.model.{path}.lora_{name}.weight": getattr(factors, name)
            for path, factors in job.broadcast.trainable.items()
            for name in "AB"
        }
        set_peft_model_state_dict(peft, state)
        parameters = [parameter for parameter in peft.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, job.learning_rate, weight_decay=0.01, foreach=False)
        for batch in step_batches(job.examples, settings, np.random.default_rng(job.seed)):
            logits = [peft(input_ids=torch.tensor([example.input_ids])).logits[0, :-1] for example in batch]
            labels = torch.cat([torch.tensor(example.labels[1:]) for example in batch])
            optimizer.zero_grad()
            functional.cross_entropy(torch.cat(logits), labels).backward()
            optimizer.step()
        trained = {name: parameter.detach() for name, parameter in peft.named_parameters()}
        for path, factors in outcome.adapter.items():
            for name in "AB":
                expected = trained[f"base_model.model.{path}.lora_{name}.default.weight"]
                torch.testing.assert_close(getattr(factors, name), expected, rtol=0, atol=1e-5)


def test_who_else_is_in_the_group_does_not_matter(model, jobs):
    settings = LocalTraining("sgd", batch_size=2, num_epochs=2.0, momentum=0.9)
    together = list(train_group(model, jobs, settings))
    backwards = list(train_group(model, jobs[::-1], settings))[::-1]
    for most in (1, 2, 4):
        narrow = list(train_group(model, jobs, settings, most))
        for left, middle, right in zip(together, narrow, backwards, strict=True):
            assert distance(left.adapter, middle.adapter) < 1e-5
            assert distance(left.adapter, right.adapter) < 1e-5
            assert left.metrics == pytest.approx(middle.metrics, rel=1e-4)


def test_the_same_group_gives_the_same_bits(model, jobs):
    first, again = (list(train_group(model, jobs, LocalTraining(batch_size=2))) for _ in range(2))
    assert [distance(left.adapter, right.adapter) for left, right in zip(first, again, strict=True)] == [0.0] * 6
    assert [left.metrics for left in first] == [right.metrics for right in again]


def test_dropout_has_a_stream_of_its_own_for_each_client(make_network, tokenizer, jobs):
    model, still = AdaptedModel(make_network(), tokenizer, dropout=0.3), AdaptedModel(make_network(), tokenizer)
    settings = LocalTraining("sgd", batch_size=2, num_epochs=2.0)
    state = torch.get_rng_state()
    together = list(train_group(model, jobs, settings))
    assert torch.equal(torch.get_rng_state(), state)
    for job, outcome, dry in zip(jobs, together, train_group(still, jobs, settings), strict=True):
        (by_itself,) = train_group(model, [job], settings)
        assert distance(outcome.adapter, by_itself.adapter) < 1e-5
        assert distance(outcome.adapter, dry.adapter) > 1e-4
    (other,) = train_group(model, [dataclasses.replace(jobs[0], seed=99)], settings)
    assert distance(together[0].adapter, other.adapter) > 1e-4


def test_a_client_that_diverges_or_cannot_train_fails_alone(model, jobs):
    settings = LocalTraining("sgd", batch_size=1, max_grad_norm=None)
    broken = list(jobs)
    broken[1] = dataclasses.replace(jobs[1], learning_rate=1e30)
    broken[2] = dataclasses.replace(jobs[2], examples=[])
    stranger = dict(jobs[3].broadcast.trainable) | {
        "model.layers.9.q_proj": jobs[3].broadcast.trainable["model.layers.0.self_attn.q_proj"]
    }
    broken[3] = dataclasses.replace(jobs[3], broadcast=Broadcast(stranger))
    broken[4] = dataclasses.replace(jobs[4], examples=[EncodedExample((1, 9999), (1, 2))])
    outcomes = list(train_group(model, broken, settings))
    errors = [DivergedError, TrainingError, ModelError, IndexError]
    assert [type(outcome) for outcome in outcomes[1:5]] == errors
    assert "the loss must stay finite; it was nan at step" in str(outcomes[1])
    fine = [jobs[0], jobs[5]]
    assert_as_alone(model, fine, [outcomes[0], outcomes[5]], settings)


def test_a_step_without_answers_moves_nothing(model, make_broadcast, make_examples):
    silent = [dataclasses.replace(example, labels=(-100,) * len(example.labels)) for example in make_examples(2)]
    jobs = [
        GroupJob(make_broadcast(2), [*silent, make_examples(1)[0]], 0.01, 0),
        GroupJob(make_broadcast(2, seed=1), make_examples(4), 0.01, 1),
    ]
    settings = LocalTraining("sgd", batch_size=1, momentum=0.9, weight_decay=0.1)
    assert_as_alone(model, jobs, list(train_group(model, jobs, settings)), settings)


def test_clients_enter_only_when_there_is_room_and_outcomes_keep_their_order(model, jobs):
    entered = []

    def arriving():
        for index, job in enumerate(jobs):
            entered.append(index)
            yield job

    outcomes = train_group(model, arriving(), SGD, 2)
    assert entered == []
    first = next(outcomes)
    # Two train and one stands at the door.
    assert len(entered) <= 4
    assert distance(first.adapter, alone(model, jobs[0], SGD)[0]) < 1e-5
    assert len(list(outcomes)) == 5


def test_the_model_is_as_before_between_outcomes(model, jobs):
    model.load(jobs[0].broadcast)
    before, modules = model.read(), dict(model.network.named_modules())
    tokens, labels = [jobs[0].examples[0].input_ids], [jobs[0].examples[0].labels]
    with torch.no_grad():
        loss = answer_losses(model, tokens, labels, 0)
    outcomes = train_group(model, jobs, SGD)
    next(outcomes)
    assert dict(model.network.named_modules()) == modules
    with torch.no_grad():
        assert torch.equal(answer_losses(model, tokens, labels, 0), loss)
    outcomes.close()
    assert distance(model.read(), before) == 0.0
    assert all(parameter.grad is None for parameter in model.network.parameters())


@pytest.mark.parametrize("targets", [["v_proj"], ["v_proj", "lm_head"]])
def test_what_was_loaded_before_has_no_part_in_a_group(
    make_network, tokenizer, random_adapter, scaling, targets, make_examples
):
    fresh, used = (AdaptedModel(make_network(), tokenizer) for _ in range(2))
    others = target_modules(used.network, ["q_proj", "lm_head"])
    used.load(Broadcast(random_adapter(others, dict.fromkeys(others, 3), scaling, 1)))
    shapes = target_modules(fresh.network, targets)
    job = GroupJob(
        Broadcast(random_adapter(shapes, dict.fromkeys(shapes, 2), scaling, 2)), make_examples(3), 4e-3, seed=0
    )
    (expected,), (outcome,) = train_group(fresh, [job], SGD), train_group(used, [job], SGD)
    assert distance(expected.adapter, outcome.adapter) < 1e-7


def test_a_bfloat16_base_gives_float32_factors_that_move_the_same_way(
    make_network, tokenizer, make_broadcast, make_examples
):
    job = GroupJob(make_broadcast(2), make_examples(8), 0.01, 0)
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        (outcome,) = train_group(AdaptedModel(make_network(dtype), tokenizer), [job], SGD)
        assert {factors.B.dtype for factors in outcome.adapter.values()} == {torch.float32}
        before = job.broadcast.trainable
        moved.append(torch.cat([(factors.B - before[path].B).flatten() for path, factors in outcome.adapter.items()]))
    assert functional.cosine_similarity(*moved, dim=0) > 0.98


CONFIGS = {
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralConfig, {"sliding_window": 4}),
    "gemma": (GemmaConfig, {"head_dim": 8}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_architectures_train_in_groups_too(name, tokenizer, random_adapter, scaling, make_examples):
    config_class, own = CONFIGS[name]
    sizes = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "initializer_range": 0.2,
    }
    config = config_class(vocab_size=259, hidden_size=32, **sizes, **own)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config).eval()
    for dtype in (torch.float32, torch.bfloat16):
        assert (written_out(copy.deepcopy(network).to(dtype)) is not None) == (name == "qwen2")
    model, shapes = AdaptedModel(network, tokenizer), target_modules(network, "all-linear")
    assert reason_against_groups(network, shapes, base_drops_out=model.base_drops_out) is None
    jobs = []
    for rank in (1, 2, 3):
        wild = random_adapter(shapes, dict.fromkeys(shapes, rank), scaling, rank)
        adapter = {path: LoraFactors(0.3 * own.A, 0.3 * own.B, own.scaling) for path, own in wild.items()}
        jobs.append(GroupJob(Broadcast(adapter), make_examples(5, rank), 0.01, rank))
    assert_as_alone(model, jobs, list(train_group(model, jobs, SGD)), SGD)


def test_where_memory_runs_out_fewer_clients_train_at_a_time(model, jobs, monkeypatch):
    """The card of this test has room for so many padded tokens in a pass; what a failed pass computed is freed."""
    kept, most, settings = [], 120, LocalTraining("sgd", batch_size=4)
    whole = group_backward.GroupBackward.__call__

    def limited(self, rows, num_clients):
        class Activations:
            pass

        activations = Activations()
        assert all(one() is None for one in kept)
        if len(rows) * max(row.length for row in rows) > most:
            kept.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, rows, num_clients)

    monkeypatch.setattr(group_backward.GroupBackward, "__call__", limited)
    outcomes = list(train_group(model, jobs, settings))
    assert len(kept) > 2
    monkeypatch.undo()
    assert_as_alone(model, jobs, outcomes, settings)


def test_a_client_for_whom_there_is_never_enough_memory_fails_alone(model, jobs, monkeypatch):
    whole = group_backward.GroupBackward.__call__
    longest = [max(len(example.input_ids) for example in job.examples) for job in jobs]
    too_long = max(longest)
    assert longest.count(too_long) == 1

    def limited(self, rows, num_clients):
        if max(row.length for row in rows) == too_long:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, rows, num_clients)

    monkeypatch.setattr(group_backward.GroupBackward, "__call__", limited)
    outcomes = list(train_group(model, jobs, SGD))
    failed = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, torch.OutOfMemoryError)]
    assert failed == [longest.index(too_long)]
    assert sum(isinstance(outcome, TrainedClient) for outcome in outcomes) == len(jobs) - 1
