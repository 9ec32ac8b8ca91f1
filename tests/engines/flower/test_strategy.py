"""The strategy, with Flower's own messages, against stock PEFT and plain numpy."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from flexlora.engines.flower.strategy import FlexLoraStrategy, StrategyError, mean_metrics

ALPHA, RANKS = 6.0, {11: 1, 12: 2, 13: 4}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(6, 5, bias=False), nn.Linear(5, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tall(self.wide(x))


def adapted(rank: int) -> Any:
    return get_peft_model(Net(), LoraConfig(r=rank, lora_alpha=int(ALPHA), target_modules=["wide", "tall"]))


def initial(rank: int = 4) -> ArrayRecord:
    torch.manual_seed(1)
    return ArrayRecord(get_peft_model_state_dict(adapted(rank)))


class Nodes:
    """A Grid whose nodes are PEFT models that add noise of their own to what they are sent."""

    def __init__(self, changes: dict[int, Callable[[RecordDict], Any]] | None = None) -> None:
        self.changes, self.seen = changes or {}, list[Message]()
        self.products: dict[str, list[tuple[float, np.ndarray]]] = {}

    def get_node_ids(self) -> list[int]:
        return list(RANKS)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self._reply(message) for message in messages]

    def _reply(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        if message.metadata.message_type == "query":
            answered = RecordDict({"config": ConfigRecord({"lora-rank": RANKS[node_id]})})
            return Message(answered, reply_to=message)
        self.seen.append(message)
        state = message.content.array_records["arrays"].to_torch_state_dict()
        model = adapted(int(message.content.config_records["config"]["lora-rank"]))
        set_peft_model_state_dict(model, state)
        rng = torch.Generator().manual_seed(node_id)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter += torch.randn(parameter.shape, generator=rng)
        trained = get_peft_model_state_dict(model)
        for name, layer in model.base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                delta = layer.get_delta_weight("default").detach().double().numpy()
                self.products.setdefault(name, []).append((float(node_id), delta))
        content = RecordDict(
            {"arrays": ArrayRecord(trained), "metrics": MetricRecord({"num-examples": node_id, "loss": float(node_id)})}
        )
        changed = self.changes.get(node_id, lambda content: content)(content)
        return Message(changed, reply_to=message)


@pytest.fixture(autouse=True)
def _ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda seconds: None)


def deltas(record: ArrayRecord) -> dict[str, np.ndarray]:
    """Return the change of each module that a stock PEFT model makes of a state dict at rank 4."""
    model = adapted(4)
    set_peft_model_state_dict(model, record.to_torch_state_dict())
    return {
        name: layer.get_delta_weight("default").detach().double().numpy()
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("rank_of", [None, RANKS, RANKS.__getitem__])
def test_a_round_is_the_best_approximation_of_the_mean_of_what_peft_models_trained(rank_of: Any) -> None:
    strategy, grid = FlexLoraStrategy(ALPHA, rank_of=rank_of), Nodes()
    messages = list(strategy.configure_train(1, initial(), ConfigRecord({"lr": 0.1}), grid))  # type: ignore[arg-type]
    ranks = {one.metadata.dst_node_id: one.content.config_records["config"]["lora-rank"] for one in messages}
    assert ranks == RANKS
    assert all(one.content.config_records["config"]["lr"] == 0.1 for one in messages)
    arrays, metrics = strategy.aggregate_train(1, grid.send_and_receive(messages))
    assert arrays is not None and metrics is not None
    for name, got in deltas(arrays).items():
        parts = grid.products[name]
        mean = sum(weight * delta for weight, delta in parts) / sum(weight for weight, _ in parts)
        np.testing.assert_allclose(got, truncated(mean, 4), atol=2e-5)
    assert metrics["loss"] == pytest.approx((11**2 + 12**2 + 13**2) / 36) and metrics["num-excluded"] == 0
    # The next round sends each node the best approximation of its own rank.
    grid.seen.clear()
    following = list(strategy.configure_train(2, arrays, ConfigRecord(), grid))  # type: ignore[arg-type]
    (smallest,) = [one for one in following if one.metadata.dst_node_id == 11]
    state = smallest.content.array_records["arrays"].to_torch_state_dict()
    for name, whole in deltas(arrays).items():
        A, B = (state[f"base_model.model.{name}.lora_{factor}.weight"].double().numpy() for factor in "AB")
        np.testing.assert_allclose(ALPHA * B @ A, truncated(whole, 1), atol=2e-5)


def test_a_whole_run_goes_through_flowers_own_loop() -> None:
    strategy, grid = FlexLoraStrategy(ALPHA, fraction_evaluate=0.0), Nodes()
    result = strategy.start(grid, initial(), num_rounds=2)  # type: ignore[arg-type]
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert {key: array.shape for key, array in result.arrays.items()} == {
        key: array.shape for key, array in initial().items()
    }


def bad_shape(content: RecordDict) -> RecordDict:
    content["arrays"] = initial(3)
    return content


def with_nan(content: RecordDict) -> RecordDict:
    arrays = content.array_records["arrays"]
    key = sorted(arrays)[0]
    arrays[key] = Array(np.full(arrays[key].shape, np.nan, np.float32))
    return content


def without_weight(content: RecordDict) -> RecordDict:
    content["metrics"] = MetricRecord({"loss": 1.0})
    return content


def huge_weight(content: RecordDict) -> RecordDict:
    content["metrics"] = MetricRecord({"num-examples": 1e300})
    return content


def pickled(content: RecordDict) -> RecordDict:
    arrays = content.array_records["arrays"]
    arrays[sorted(arrays)[0]] = Array("float32", (1, 5), "numpy.ndarray", b"\x93NUMPY\x01\x00garbage")
    return content


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: Error(5, "gone"), "Flower reported error 5"),
        (bad_shape, "rank must be 1"),
        (with_nan, "must be finite"),
        (without_weight, "num-examples"),
        (huge_weight, "at most 2**53; got 1e+300"),
        (pickled, "cannot be read"),
        (lambda content: RecordDict({"metrics": content["metrics"]}), "one ArrayRecord"),
    ],
)
def test_a_reply_that_cannot_be_used_is_left_out_and_named(change: Any, reason: str) -> None:
    strategy, grid = FlexLoraStrategy(ALPHA), Nodes({11: change})
    messages = list(strategy.configure_train(1, initial(), ConfigRecord(), grid))  # type: ignore[arg-type]
    arrays, metrics = strategy.aggregate_train(1, grid.send_and_receive(messages))
    assert arrays is not None and metrics is not None and metrics["num-excluded"] == 1
    ((server_round, node_id, why),) = strategy.exclusions
    assert (server_round, node_id) == (1, 11) and reason in why


def test_evaluation_means_are_weighted_by_examples() -> None:
    strategy, grid = FlexLoraStrategy(ALPHA), Nodes()
    messages = list(strategy.configure_evaluate(1, initial(), ConfigRecord(), grid))  # type: ignore[arg-type]
    measured = strategy.aggregate_evaluate(1, grid.send_and_receive(messages))
    assert measured is not None and measured["loss"] == pytest.approx((11**2 + 12**2 + 13**2) / 36)


def test_sampling_depends_on_seed_and_round_alone() -> None:
    def drawn(seed: int, server_round: int) -> list[int]:
        strategy = FlexLoraStrategy(ALPHA, rank_of=RANKS, fraction_train=0.34, seed=seed)
        messages = strategy.configure_train(server_round, initial(), ConfigRecord(), Nodes())  # type: ignore[arg-type]
        return [one.metadata.dst_node_id for one in messages]

    assert drawn(3, 1) == drawn(3, 1) and len(drawn(3, 1)) == 1
    assert len({tuple(drawn(seed, 1)) for seed in range(20)}) == 3


def test_factors_that_were_trained_before_are_where_a_run_starts() -> None:
    model = adapted(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    before = ArrayRecord(get_peft_model_state_dict(model))
    strategy = FlexLoraStrategy(ALPHA, rank_of=dict.fromkeys(RANKS, 4))
    message, *_ = strategy.configure_train(1, before, ConfigRecord(), Nodes())  # type: ignore[arg-type]
    for name, delta in deltas(message.content.array_records["arrays"]).items():
        np.testing.assert_allclose(delta, deltas(before)[name], atol=1e-5)


@pytest.mark.parametrize("rank", [0, 5, True, "8"])
def test_a_node_whose_rank_cannot_be_served_is_left_out(rank: Any) -> None:
    strategy = FlexLoraStrategy(ALPHA, rank_of={**RANKS, 12: rank})
    messages = strategy.configure_train(1, initial(), ConfigRecord(), Nodes())  # type: ignore[arg-type]
    assert [one.metadata.dst_node_id for one in messages] == [11, 13]
    assert "must be in 1..4" in strategy.exclusions[0][2]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "fedsa_lora"}, "more than factors, or less"),
        ({"method": "ffa_lora"}, "more than factors, or less"),
        ({"fraction_train": 0.0}, "fraction_train"),
        ({"fraction_evaluate": 1.5}, "fraction_evaluate"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(StrategyError, match=reason):
        FlexLoraStrategy(ALPHA, **settings)


def test_arrays_that_are_no_lora_adapter_are_refused_by_key() -> None:
    arrays = initial()
    arrays["base_model.model.wide.lora_magnitude_vector"] = Array(np.zeros((5, 1), np.float32))
    with pytest.raises(StrategyError, match="lora_magnitude_vector"):
        list(FlexLoraStrategy(ALPHA).configure_train(1, arrays, ConfigRecord(), Nodes()))  # type: ignore[arg-type]


def test_a_folded_tail_does_not_fit_into_a_state_dict() -> None:
    strategy, grid = FlexLoraStrategy(ALPHA, options={"fold_tail": True, "error_compensation": True}), Nodes()
    with pytest.raises(StrategyError, match="leave fold_tail out"):
        strategy.start(grid, initial(), num_rounds=2)  # type: ignore[arg-type]


def test_metrics_that_only_some_report_are_left_out_of_means() -> None:
    records = [MetricRecord({"n": 1, "loss": 1.0, "odd": 2.0}), MetricRecord({"n": 3, "loss": 2.0})]
    assert dict(mean_metrics([(1.0, records[0]), (3.0, records[1])], "n")) == {"loss": 1.75}
