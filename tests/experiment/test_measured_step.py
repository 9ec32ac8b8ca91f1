"""The rate that a plan takes for larger bases: measured on a few blocks, and carried on to all of them."""

import dataclasses
import threading

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from flexlora.data.pretraining import BASE_FOLDER
from flexlora.experiment import measured_step
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.measured_step import measured_rate
from flexlora.experiment.workload import Workload
from flexlora.federation.clients import RankPlan
from flexlora.rounds.costs import BaseShape
from flexlora.training.base_model import load_empty_model, target_modules
from flexlora.training.group_passes import GroupJob
from flexlora.training.one_client import LocalTraining

PLAN = RankPlan("any", (("", 4),))
CONFIG = parse_config({"data": {"name": "generated"}}, "test")


@pytest.fixture(scope="module")
def empty() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_empty_model(str(BASE_FOLDER))


@pytest.fixture
def workload(empty: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Workload:
    config = empty[0].config
    shape = BaseShape(1_000_000, 10, config.hidden_size, config.intermediate_size, config.vocab_size, 4)
    training = LocalTraining(batch_size=2, num_epochs=3.0, max_steps=7, gradient_accumulation_steps=2)
    return Workload(shape, target_modules(empty[0], "all-linear"), 40.0, 6.0, training, 4)


def rate_of(empty: tuple[PreTrainedModel, PreTrainedTokenizerBase], workload: Workload, processes: int = 1) -> float:
    rate = measured_rate(CONFIG, *empty, workload, PLAN, processes)
    assert rate is not None
    return rate


def test_what_a_block_takes_is_carried_on_to_all(
    empty: tuple[PreTrainedModel, PreTrainedTokenizerBase], workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_step, "_seconds", lambda config, base, number, *rest: 0.5 + 0.1 * number)
    trained = sum(4 * sum(shape) for shape in workload.shapes.values())
    # One step of a batch of 40 tokens takes 0.5 s and 0.1 s for each of 10 blocks, at 35 % of the rate of products.
    expected = 40 * (4 * 1_000_000 + 6 * trained) / 0.35 / 1.5
    assert rate_of(empty, workload) == pytest.approx(expected)


@pytest.mark.parametrize("processes", [1, 2])
def test_blocks_are_really_trained_beside_others_and_nothing_is_left_behind(
    empty: tuple[PreTrainedModel, PreTrainedTokenizerBase], workload: Workload, processes: int
) -> None:
    before, random = threading.active_count(), torch.get_rng_state()
    assert rate_of(empty, workload, processes) > 0
    assert threading.active_count() == before
    assert torch.equal(torch.get_rng_state(), random)


def test_where_no_few_blocks_can_be_had_there_is_no_rate(
    empty: tuple[PreTrainedModel, PreTrainedTokenizerBase], workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_layer = dataclasses.replace(workload.base, num_layers=1)
    assert measured_rate(CONFIG, *empty, dataclasses.replace(workload, base=one_layer), PLAN, 1) is None
    large = dataclasses.replace(workload.base, num_parameters=10**11)
    assert measured_rate(CONFIG, *empty, dataclasses.replace(workload, base=large), PLAN, 1) is None

    # Outcomes of clients that failed are no measurement.
    with monkeypatch.context() as patch:
        patch.setattr(measured_step, "train_group", lambda *arguments: iter([ArithmeticError()]))
        assert measured_rate(CONFIG, *empty, workload, PLAN, 1) is None

    def cannot(*arguments: object) -> float:
        raise NotImplementedError

    monkeypatch.setattr(measured_step, "_seconds", cannot)
    assert measured_rate(CONFIG, *empty, workload, PLAN, 1) is None


def test_a_base_whose_clients_train_one_by_one_is_not_measured_in_groups(
    empty: tuple[PreTrainedModel, PreTrainedTokenizerBase], workload: Workload
) -> None:
    own = GPT2Config(n_embd=32, n_head=2, n_layer=4, vocab_size=259, n_positions=64, attn_pdrop=0.0)
    with torch.device("meta"):
        network = GPT2LMHeadModel(own)
    shapes = target_modules(network, "all-linear")
    small = dataclasses.replace(workload.base, num_layers=4, hidden_size=32, intermediate_size=128, vocab_size=259)
    step = dataclasses.replace(workload, base=small, shapes=shapes)
    assert measured_rate(CONFIG, network, empty[1], step, PLAN, 1) is None


def test_long_steps_are_measured_on_some_of_their_rows(
    empty: tuple[PreTrainedModel, PreTrainedTokenizerBase], workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = measured_step.train_group

    def noted(model: object, jobs: list[GroupJob], training: LocalTraining) -> object:
        seen.append(sum(len(example.input_ids) for job in jobs for example in job.examples))
        return real(model, jobs, training)  # type: ignore[arg-type]

    monkeypatch.setattr(measured_step, "train_group", noted)
    long = dataclasses.replace(workload, batch_tokens=64 * 150.0, training=LocalTraining(batch_size=64))
    assert rate_of(empty, long) > 0
    assert set(seen) == {3 * 150}
