"""Costs by hand: memory, traffic and time of small shapes."""

from typing import Literal

import pytest
import torch

from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import LoraFactors
from flexlora.rounds.costs import (
    HEADER_BYTES_PER_TENSOR,
    STEP_EFFICIENCY,
    BaseShape,
    LocalWork,
    client_cost,
    device_cost,
    matrix_rate,
    tail_bytes,
)
from flexlora.rounds.devices import DeviceProfile
from flexlora.uplink.compression import Compression, compressed_size

SHAPES = {"attn": (12, 8), "mlp": (20, 8)}
BASE = BaseShape(
    num_parameters=1000, num_layers=2, hidden_size=8, intermediate_size=20, vocab_size=30, bytes_per_parameter=2
)
BOX = DeviceProfile("box", 1e9, 1e6, 100.0, 50.0, latency_seconds=0.5)


@pytest.mark.parametrize(("optimizer", "copies"), [("adamw", 4), ("sgd", 3)])
def test_a_client_pays_for_weights_factors_activations_and_logits(optimizer: str, copies: int) -> None:
    work = LocalWork(num_tokens=600, batch_tokens=50, answer_tokens=10, optimizer=optimizer)
    cost = client_cost(BASE, {"attn": 2, "mlp": 3}, SHAPES, work, 1e6, wire_bytes=2)
    trained = 2 * (12 + 8) + 3 * (20 + 8)
    kept = 50 * (2 * (10 * 8 + 6 * 20) * 2 + (8 + 2 + 8 + 3) * 4)
    assert cost.num_trainable == trained
    assert cost.memory_bytes == 1000 * 2 + trained * 4 * copies + kept + 10 * 30 * 4 * 3
    assert cost.transfer_bytes == trained * 2 + 4 * HEADER_BYTES_PER_TENSOR
    assert cost.train_seconds == pytest.approx(600 * (4 * 1000 + 6 * trained) / (1e6 * STEP_EFFICIENCY))


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_updates_cost_what_they_take_on_the_way(bits: Literal[8, 4]) -> None:
    shapes = {f"model.layers.{number}.self_attn.q_proj": (96, 300) for number in range(4)}
    work = LocalWork(num_tokens=10, batch_tokens=5, answer_tokens=2, optimizer="sgd")
    cost = client_cost(BASE, dict.fromkeys(shapes, 5), shapes, work, 1e6, 4, bits)
    sent = Broadcast({name: LoraFactors(torch.zeros(5, 300), torch.zeros(96, 5), 1.0) for name in shapes})
    assert cost.up_bytes == pytest.approx(compressed_size(sent, Compression(bits)), rel=0.05)
    assert cost.transfer_bytes == client_cost(BASE, dict.fromkeys(shapes, 5), shapes, work, 1e6, 4).up_bytes


def test_a_device_trains_at_the_rate_of_its_profile_and_pays_latency_both_ways() -> None:
    work = LocalWork(num_tokens=600, batch_tokens=50, answer_tokens=10, optimizer="adamw")
    cost = client_cost(BASE, {"attn": 2}, SHAPES, work, matrix_rate(BOX), wire_bytes=4)
    spent = device_cost(BOX, cost, 300, 100)
    assert spent.compute_seconds == pytest.approx(600 * (4 * 1000 + 6 * 40) / 1e6)
    assert (spent.download_seconds, spent.upload_seconds) == (3.5, 2.5)
    assert spent.seconds == pytest.approx(6.0 + spent.compute_seconds)


def test_a_tail_is_what_the_server_has_beyond_the_clients_ranks() -> None:
    # 3 more ranks of attn, 5 of mlp, which the client leaves out; none of a module where it has more.
    assert tail_bytes({"attn": 2}, {"attn": 5, "mlp": 5}, SHAPES, 2) == (3 * 20 + 5 * 28) * 2
    assert tail_bytes({"attn": 9, "mlp": 5}, {"attn": 5, "mlp": 5}, SHAPES, 2) == 0
