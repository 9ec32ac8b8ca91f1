"""Ranks that fit a device, against an independent search over sums made by hand."""

from collections.abc import Mapping

import pytest

from flexlora.experiment.device_ranks import Affordable, Budget, affordable_ranks
from flexlora.experiment.workload import Workload
from flexlora.rounds.costs import STEP_EFFICIENCY, BaseShape, DeviceCost, device_cost, matrix_rate
from flexlora.rounds.devices import DeviceProfile
from flexlora.training.one_client import LocalTraining

SHAPES = {
    "l.0.self_attn.q_proj": (48, 32),
    "l.0.self_attn.k_proj": (12, 32),
    "l.0.mlp.up_proj": (80, 32),
    "l.0.mlp.down_proj": (32, 80),
}


def workload(max_steps: int = 3) -> Workload:
    base = BaseShape(
        num_parameters=20_000,
        num_layers=1,
        hidden_size=32,
        intermediate_size=80,
        vocab_size=50,
        bytes_per_parameter=4,
    )
    training = LocalTraining(batch_size=4, max_steps=max_steps)
    return Workload(base, SHAPES, batch_tokens=100, answer_tokens=20, training=training, wire_bytes=4)


def afforded(profile: DeviceProfile, budget: Budget, num_examples: float = 30) -> Affordable:
    load = workload()

    def cost_of(ranks: Mapping[str, int]) -> DeviceCost:
        cost = load.cost(ranks, num_examples, matrix_rate(profile))
        return device_cost(profile, cost, cost.transfer_bytes, cost.transfer_bytes)

    return affordable_ranks(profile, budget, SHAPES, cost_of)


def needs(attention: int, ffn: int, profile: DeviceProfile) -> tuple[float, float, float]:
    """Return memory, seconds and traffic by sums of their own over SHAPES, not by the code under test."""
    trained = attention * (48 + 32 + 12 + 32) + ffn * (80 + 32 + 32 + 80)
    inputs = 32 + attention + 32 + attention + 32 + ffn + 80 + ffn
    memory = 20_000 * 4 + trained * 16 + 100 * ((10 * 32 + 6 * 80) * 4 + inputs * 4) + 20 * 50 * 12
    sent = trained * 4 + 2 * 4 * 110
    compute = 3 * 100 * (4 * 20_000 + 6 * trained) / profile.flops_per_second
    links = sent / profile.down_bytes_per_second + sent / profile.up_bytes_per_second + 2 * profile.latency_seconds
    return memory, compute + links, 2 * sent


@pytest.mark.parametrize("memory", [480_000, 490_000, 495_000, 500_000, 520_000, 600_000, 5_000_000])
@pytest.mark.parametrize(("seconds", "traffic"), [(None, None), (0.21, None), (None, 30_000), (0.25, 26_000)])
def test_ranks_are_the_largest_that_an_independent_search_finds(
    memory: float, seconds: float | None, traffic: int | None
) -> None:
    profile = DeviceProfile("box", memory, 2e8, 4e5, 2e5, latency_seconds=0.01)
    budget = Budget((1, 2, 4, 8, 16, 32), seconds, traffic)
    # k_proj has 12 outputs, so attention stops at 8; the FFN's smallest dimension is 32.
    best = None
    for attention in (1, 2, 4, 8):
        for ffn in (1, 2, 4, 8, 16, 32):
            spent = needs(attention, ffn, profile)
            fits = spent[0] <= memory and spent[1] <= (seconds or 1e9) and spent[2] <= (traffic or 1e9)
            key = (min(attention, ffn), ffn, attention)
            if fits and (best is None or key > best):
                best = key
    found = afforded(profile, budget)
    if best is None:
        assert found.plan is None and found.reason.startswith("at rank 1 it needs ")
        return
    assert found.plan is not None and found.plan.name == "box"
    ranks = found.plan.resolve(SHAPES)
    assert (ranks["l.0.self_attn.q_proj"], ranks["l.0.mlp.up_proj"]) == (best[2], best[1])
    spent = needs(best[2], best[1], profile)
    assert found.cost.memory_bytes == int(spent[0])
    assert found.cost.seconds == pytest.approx(spent[1])
    assert found.cost.down_bytes + found.cost.up_bytes == spent[2]


def test_what_limits_a_device_is_named() -> None:
    roomy = DeviceProfile("roomy", 1e9, 1e12, 1e9, 1e9)
    assert afforded(roomy, Budget((1, 2, 4))).limited_by == ()
    # 80,000 weights in bytes, 16 a trained parameter, 393,600 of activations and 12,000 of logits at rank 2.
    tight = DeviceProfile("tight", 500_000, 1e12, 1e9, 1e9)
    assert afforded(tight, Budget((1, 2, 4, 8, 16))).limited_by == ("memory",)
    assert afforded(roomy, Budget((1, 2, 4, 8), round_bytes=20_000)).limited_by == ("traffic",)
    slow = DeviceProfile("slow", 1e9, 2e8, 1e9, 1e9)
    found = afforded(slow, Budget((1, 2, 4, 8), round_seconds=0.01))
    assert found.plan is None and found.limited_by == ("time",)
    assert "at rank 1 it needs 123 ms a round where 10 ms (devices.round_seconds) are allowed" in found.reason
    hopeless = afforded(DeviceProfile("toy", 1000, 1e12, 1e9, 1e9), Budget((2, 4)))
    assert hopeless.reason == "at rank 2 it needs 497 kB of memory and has 1.0 kB"


def test_the_rate_of_a_profile_is_that_of_whole_steps() -> None:
    assert matrix_rate(DeviceProfile("box", 1e9, 1e6, 1e9, 1e9)) * STEP_EFFICIENCY == 1e6
    # 3 steps of 4 examples of 25 tokens; more examples than steps allow change nothing, fewer do.
    profile = DeviceProfile("box", 1e9, 1e6, 1e9, 1e9)
    assert afforded(profile, Budget((1,))).cost.compute_seconds == pytest.approx(
        3 * 100 * (4 * 20_000 + 6 * (124 + 224)) / 1e6
    )
    assert afforded(profile, Budget((1,)), num_examples=8).cost.compute_seconds == pytest.approx(
        2 * 100 * (4 * 20_000 + 6 * (124 + 224)) / 1e6
    )


def test_ranks_are_never_above_the_smallest_side_even_if_all_choices_are() -> None:
    found = afforded(DeviceProfile("roomy", 1e9, 1e12, 1e9, 1e9), Budget((300,)))
    assert found.plan is not None
    assert set(found.plan.resolve(SHAPES).values()) == {12, 32}
