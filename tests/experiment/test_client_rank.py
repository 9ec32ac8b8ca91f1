"""The ranks that a client chooses: the largest that fit its memory and the time of a round."""

import pytest
import torch

pytest.importorskip("flwr")

from flexlora.data.prompts import EncodedExample
from flexlora.engines.flower.client_work import ClientRefusal
from flexlora.engines.flower.run_settings import RunSettings, training_record
from flexlora.experiment import client_rank
from flexlora.experiment.client_rank import OwnLimits, choose_plan
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import load_base_model
from flexlora.training.one_client import LocalTraining

EXAMPLES = [EncodedExample(tuple(range(5, 60)), (-100,) * 40 + tuple(range(5, 20))) for _ in range(48)]
RUN = RunSettings(
    run_id="run",
    seed=0,
    base_model="embedded",
    base_sha256="0" * 64,
    dtype="float32",
    dropout=0,
    largest_rank=24,
    target_modules="all-linear",
    scaling="rslora",
    lora_alpha=2,
    template="alpaca",
    max_length=192,
    loss_on="answers",
    wire_dtype="bfloat16",
    training=training_record(LocalTraining(batch_size=4, max_steps=4)),
)


@pytest.fixture
def model() -> AdaptedModel:
    return AdaptedModel(*load_base_model("embedded", dtype="float32", device="cpu"))


def ranks_of(model: AdaptedModel, limits: OwnLimits) -> list[int]:
    return [rank for _, rank in choose_plan(RUN, model, EXAMPLES, limits).patterns]


def test_with_room_for_it_a_client_takes_the_largest_rank_that_the_run_allows(model: AdaptedModel) -> None:
    assert ranks_of(model, OwnLimits()) == [24, 24]


def test_ranks_grow_with_memory_and_what_is_too_little_is_refused(model: AdaptedModel) -> None:
    chosen = [ranks_of(model, OwnLimits(size)) for size in (31_700_000, 32_000_000, 40_000_000)]
    assert chosen == sorted(chosen)
    assert chosen[-1] == [24, 24]
    assert chosen[0] < [24, 24]
    with pytest.raises(ClientRefusal, match="no rank fits this device: at rank 1 it needs"):
        choose_plan(RUN, model, EXAMPLES, OwnLimits(4 * model.num_parameters))


def test_what_is_free_decides_where_no_memory_is_named(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_rank, "free_memory_bytes", lambda: 1000)
    with pytest.raises(ClientRefusal, match="no rank fits"):
        choose_plan(RUN, model, EXAMPLES, OwnLimits())
    assert client_rank.free_on(torch.device("cpu")) == 1000


def test_a_round_that_takes_too_long_at_any_rank_is_refused(model: AdaptedModel) -> None:
    with pytest.raises(ClientRefusal, match=r"--round-seconds\) are allowed"):
        choose_plan(RUN, model, EXAMPLES, OwnLimits(round_seconds=1e-6))


def test_a_round_that_has_time_enough_keeps_the_rank_that_fits_memory(model: AdaptedModel) -> None:
    assert ranks_of(model, OwnLimits(round_seconds=3600)) == [24, 24]
