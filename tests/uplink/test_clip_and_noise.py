"""One client moves a private mean by no more than the clip, and the noise has the deviation that is accounted for."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from flexlora.aggregators.aligned import Aligned
from flexlora.aggregators.fedit import FedIt
from flexlora.aggregators.flexlora import FlexLora
from flexlora.federation.messages import Change, Update
from flexlora.lora.change import change_norm
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.uplink.clip_and_noise import (
    AdaptiveClip,
    ClipAndNoise,
    ClipError,
    ClipTally,
    clipped,
    next_clip,
    round_noise,
)

SHAPES = {"a": (9, 6), "b": (8, 13)}
RANK = 6
"""As many directions as the smaller module has, so that decomposing cuts nothing off."""
SCALING = Scaling("rslora", 2.0)
METHODS = [
    pytest.param(FlexLora(SCALING, server_rank=8), (1, 2, 6, 6), id="flexlora"),
    pytest.param(Aligned(SCALING, decompose_every=None), (1, 2, 6, 6), id="aligned"),
    pytest.param(FedIt(SCALING), (6, 6, 6, 6), id="fedit"),
]
CLIP, DENOMINATOR = 0.5, 3.0


def no_noise(name: str, height: int, width: int) -> torch.Tensor:
    return torch.zeros(height, width, dtype=torch.float64)


def moved(factors: LoraFactors, generator: torch.Generator, size: float) -> LoraFactors:
    A, B = (factor + size * torch.randn(factor.shape, generator=generator) for factor in (factors.A, factors.B))
    return LoraFactors(A, B, factors.scaling)


def start(method: Any) -> Any:
    """Return the state after one round, in which every module has learned something."""
    generator = torch.Generator().manual_seed(0)
    adapter = {
        name: LoraFactors(torch.randn(RANK, width, generator=generator), torch.zeros(height, RANK), SCALING(RANK))
        for name, (height, width) in SHAPES.items()
    }
    state = method.init(adapter)
    return method.add_noisy_changes(state, changes(method, state, (RANK,), [0.3]), 1.0, no_noise)


def changes(method: Any, state: Any, ranks: Sequence[int], sizes: Sequence[float]) -> list[Change]:
    """Return what clients of these ranks do, by steps of these sizes and with weights that must not count."""
    made = []
    for index, (rank, size) in enumerate(zip(ranks, sizes, strict=True)):
        sent = method.broadcast(state, dict.fromkeys(SHAPES, rank)).trainable
        generator = torch.Generator().manual_seed(100 + index)
        payload = {name: moved(factors, generator, size) for name, factors in sent.items()}
        made.append(Change(Update(str(index), payload, 10.0 * (index + 1)), sent))
    return made


def position(method: Any, state: Any) -> np.ndarray:
    """Return the state as one vector in the space in which changes are clipped."""
    if method.traits.private_changes == "products":
        return np.concatenate([spectrum.delta().numpy().ravel() for spectrum in method.spectra(state).values()])
    adapter = getattr(state, "factors", None) or state.adapter
    return np.concatenate([part.numpy().ravel() for one in adapter.values() for part in (one.A, one.scaling * one.B)])


@pytest.mark.parametrize(("method", "ranks"), METHODS)
@pytest.mark.parametrize("size", [1e-3, 0.05, 30.0])
def test_a_client_more_or_less_moves_the_mean_by_at_most_the_clip(
    method: Any, ranks: tuple[int, ...], size: float
) -> None:
    state = start(method)
    everybody = changes(method, state, ranks, [size, 0.05, size, 2.0])
    whole = position(method, method.add_noisy_changes(state, mean_of(method, everybody), DENOMINATOR, no_noise))
    for left_out in range(len(ranks)):
        others = everybody[:left_out] + everybody[left_out + 1 :]
        found = position(method, method.add_noisy_changes(state, mean_of(method, others), DENOMINATOR, no_noise))
        norm = change_norm(everybody[left_out].start, everybody[left_out].update.payload, method.traits.private_changes)
        assert np.linalg.norm(whole - found) == pytest.approx(min(CLIP, norm) / DENOMINATOR, rel=1e-6)
    nobody = position(method, method.add_noisy_changes(state, [], DENOMINATOR, no_noise))
    np.testing.assert_allclose(nobody, position(method, state), atol=1e-10)


def mean_of(method: Any, everybody: Sequence[Change]) -> Iterator[Change]:
    return clipped(everybody, CLIP, method.traits.private_changes, ClipTally())


@pytest.mark.parametrize(("method", "ranks"), METHODS)
def test_the_noise_on_a_mean_has_the_deviation_that_is_accounted_for(method: Any, ranks: tuple[int, ...]) -> None:
    state, before = start(method), position(method, start(method))
    mechanism = ClipAndNoise(CLIP, 1.7, DENOMINATOR, method.traits.private_changes, seed=3)
    found = np.concatenate(
        [
            position(method, method.add_noisy_changes(state, [], DENOMINATOR, round_noise(mechanism, CLIP, number)))
            - before
            for number in range(1, 40)
        ]
    )
    deviation = 1.7 * CLIP / DENOMINATOR
    # Sample variances of a normal distribution lie within five of their standard errors.
    assert found.var() == pytest.approx(deviation**2, rel=5 * math.sqrt(2 / found.size))
    assert abs(found.mean()) < 5 * deviation / math.sqrt(found.size)
    kurtosis = float((found**4).mean() / found.var() ** 2)
    assert kurtosis == pytest.approx(3, abs=5 * math.sqrt(24 / found.size))


def test_rounds_and_matrices_have_noise_of_their_own_that_can_be_repeated() -> None:
    mechanism = ClipAndNoise(1.0, 1.0, 4.0, "factors", seed=3)
    first = round_noise(mechanism, 1.0, 1)("m.A", 40, 50)
    assert torch.equal(first, round_noise(mechanism, 1.0, 1)("m.A", 40, 50))
    others = [round_noise(mechanism, 1.0, 1)("m.B", 40, 50), round_noise(mechanism, 1.0, 2)("m.A", 40, 50)]
    for other in others:
        assert abs(float(np.corrcoef(first.ravel(), other.ravel())[0, 1])) < 0.15


def test_seeds_that_share_their_lower_half_do_not_share_their_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    noises = []
    for high in (0, 7 << 32):
        monkeypatch.setattr("flexlora.federation.streams.stream_seed", lambda *parts, high=high: 5 + high)
        noises.append(round_noise(ClipAndNoise(1.0, 1.0, 4.0, "factors", seed=3), 1.0, 1)("m.A", 4, 5))
    assert not torch.isclose(*noises).any()


def test_counting_who_is_within_the_clip_is_paid_for_by_noise_on_the_sum() -> None:
    adaptive = AdaptiveClip(0.5, 0.2, 5.0)
    mechanism = ClipAndNoise(1.0, 1.5, 20.0, "products", 0, adaptive)
    # Two Gaussian releases of noise multipliers z1 and z2 cost what one of (z1^-2 + z2^-2)^-1/2 costs.
    together = (mechanism.sum_multiplier**-2 + (adaptive.count_noise / 0.5) ** -2) ** -0.5
    assert together == pytest.approx(1.5, rel=1e-12)
    with pytest.raises(ClipError, match=r"above half the noise multiplier, 0\.75"):
        ClipAndNoise(1.0, 1.5, 20.0, "products", 0, AdaptiveClip(0.5, 0.2, 0.7))


def test_an_adaptive_clip_finds_the_quantile_of_the_norms() -> None:
    norms = np.random.default_rng(0).lognormal(0.0, 0.5, size=1000)
    mechanism = ClipAndNoise(0.05, 1.0, 1000.0, "products", 0, AdaptiveClip(0.7, 0.2, 20.0))
    clip = mechanism.clip
    for server_round in range(1, 101):
        clip = next_clip(mechanism, clip, ClipTally(list(norms), int((norms <= clip).sum())), server_round)
    assert clip == pytest.approx(np.quantile(norms, 0.7), rel=0.1)
    fixed = ClipAndNoise(0.05, 1.0, 1000.0, "products", 0)
    assert next_clip(fixed, 0.05, ClipTally(list(norms), 0), 1) == 0.05


def test_a_change_that_is_not_finite_and_a_clip_that_bounds_nothing_are_refused() -> None:
    sent = {"a": LoraFactors(torch.zeros(1, 4), torch.zeros(3, 1), 1.0)}
    broken = {"a": LoraFactors(torch.full((1, 4), torch.inf), torch.ones(3, 1), 1.0)}
    with pytest.raises(ClipError, match="that of 'x' is"):
        list(clipped([Change(Update("x", broken, 1.0), sent)], 1.0, "factors", ClipTally()))
    with pytest.raises(ClipError, match="clip must be finite and above 0; got 0"):
        ClipAndNoise(0.0, 1.0, 1.0, "factors", 0)
