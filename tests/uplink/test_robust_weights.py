"""Robust rules choose as dense numpy does, and keep poisoned means near the honest one."""

from typing import Any

import numpy as np
import pytest
import torch

from flexlora.aggregators.flexlora import FlexLora
from flexlora.federation.messages import Change, Update
from flexlora.lora.change import change_gram
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.uplink.robust_settings import RobustSettings, least_clients
from flexlora.uplink.robust_weights import RobustError, robust_multipliers

RULES = ["norm_bound", "krum", "multi_krum", "trimmed_mean", "median_of_means"]
NUM_CLIENTS, NUM_MALICIOUS, NOISE = 15, 3, 0.3
SHAPES = {"a": (12, 9), "b": (8, 13)}
SCALING = Scaling("rslora", 2.0)
RANKS = (2, 4, 8)
METHOD = FlexLora(SCALING, server_rank=8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def vectors(seed: int = 0) -> np.ndarray:
    """Return 12 honest changes around one and 3 liars at its reverse, the liars last."""
    draw = rng(seed)
    truth = draw.standard_normal(200)
    made = np.stack([truth + NOISE * draw.standard_normal(200) for _ in range(NUM_CLIENTS)])
    made[-NUM_MALICIOUS:] *= -2
    return made


def multipliers(rule: str, points: np.ndarray, **settings: Any) -> np.ndarray:
    made = RobustSettings(rule, NUM_MALICIOUS, **settings)  # type: ignore[arg-type]
    return robust_multipliers(made, torch.from_numpy(points @ points.T), rng(1)).numpy()


@pytest.mark.parametrize("seed", range(5))
def test_krum_is_the_client_that_dense_distances_name(seed: int) -> None:
    points = vectors(seed)
    squares = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    scores = [np.sort(np.delete(row, i))[: NUM_CLIENTS - NUM_MALICIOUS - 2].sum() for i, row in enumerate(squares)]
    assert multipliers("krum", points).nonzero()[0].tolist() == [int(np.argmin(scores))]
    best = set(np.argsort(scores)[: NUM_CLIENTS - NUM_MALICIOUS].tolist())
    assert set(multipliers("multi_krum", points).nonzero()[0].tolist()) == best


def test_the_norm_bound_scales_to_a_given_norm_or_to_the_median() -> None:
    points = vectors()
    norms = np.linalg.norm(points, axis=1)
    np.testing.assert_allclose(multipliers("norm_bound", points, max_norm=10.0), np.minimum(1, 10 / norms), rtol=1e-9)
    np.testing.assert_allclose(multipliers("norm_bound", points), np.minimum(1, np.sort(norms)[7] / norms), rtol=1e-9)


def test_the_trimmed_mean_leaves_out_those_farthest_from_the_middle() -> None:
    points = vectors()
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    middle = int(distances.sum(axis=1).argmin())
    kept = set(np.argsort(distances[middle])[: NUM_CLIENTS - NUM_MALICIOUS].tolist())
    assert set(multipliers("trimmed_mean", points).nonzero()[0].tolist()) == kept == set(range(12))


def test_median_of_means_speaks_for_a_group_without_liars() -> None:
    found = multipliers("median_of_means", vectors())
    assert set(found.tolist()) == {0.0, 1.0} and 2 <= found.sum() <= 3
    assert not found[-NUM_MALICIOUS:].any()


@pytest.mark.parametrize("rule", RULES)
def test_too_few_clients_are_refused(rule: str) -> None:
    settings = RobustSettings(rule, 2)  # type: ignore[arg-type]
    enough = least_clients(settings)
    points = rng().standard_normal((enough, 30))
    assert robust_multipliers(settings, torch.from_numpy(points @ points.T), rng()).sum() > 0
    if enough > 1:
        fewer = torch.from_numpy(points[1:] @ points[1:].T)
        with pytest.raises(RobustError, match=f"at least {enough} clients against 2"):
            robust_multipliers(settings, fewer, rng())


def moved(sent: AdapterState, target: dict[str, np.ndarray], draw: np.random.Generator) -> dict[str, LoraFactors]:
    """Return the factors after a step towards a dense target from where a client starts, with noise of its data."""
    made = {}
    for module, own in sent.items():
        push = torch.from_numpy(target[module] + NOISE * draw.standard_normal(SHAPES[module])).float()
        A = own.A + 0.1 * own.B.T @ push
        made[module] = LoraFactors(A, own.B + 0.1 * push @ own.A.T, own.scaling)
    return made


def cohort(state: Any, attack: str) -> list[Change]:
    """Return a cohort of mixed ranks, the last three clients of which attack."""
    draw = rng(4)
    truth = {module: draw.standard_normal(shape) for module, shape in SHAPES.items()}
    lie = {module: draw.standard_normal(shape) for module, shape in SHAPES.items()}
    changes = []
    for index in range(NUM_CLIENTS):
        sent = METHOD.broadcast(state, dict.fromkeys(SHAPES, RANKS[index % 3])).trainable
        is_liar = attack != "none" and index >= NUM_CLIENTS - NUM_MALICIOUS
        # A label flip trains honestly, towards something else.
        payload = moved(sent, lie if is_liar and attack == "label_flip" else truth, draw)
        if is_liar and attack in ("sign_flip", "scaling"):
            by = {"sign_flip": -4.0, "scaling": 30.0}[attack]
            payload = {
                module: LoraFactors(
                    sent[module].A + (own.A - sent[module].A),
                    sent[module].B + by * (own.B - sent[module].B),
                    own.scaling,
                )
                for module, own in payload.items()
            }
        changes.append(Change(Update(str(index), payload, 1.0), sent))
    return changes


def mean(state: Any, changes: list[Change], shares: np.ndarray) -> np.ndarray:
    """Return what the server's model changed by, by the method's own rule for changes."""
    believed = [
        Change(one.update, one.start, float(share)) for one, share in zip(changes, shares, strict=True) if share > 0
    ]
    after = METHOD.add_noisy_changes(state, believed, float(len(believed)), lambda name, *shape: torch.zeros(*shape))
    deltas = [(spectrum.delta() - state.spectra[module].delta()).numpy() for module, spectrum in after.spectra.items()]
    return np.concatenate([delta.ravel() for delta in deltas])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attack", ["sign_flip", "scaling", "label_flip"])
def test_poisoned_cohorts_of_mixed_ranks_move_the_server_less_astray_than_their_plain_mean(
    rule: str, attack: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    initial = {
        module: LoraFactors(torch.randn(8, width, generator=generator), torch.zeros(height, 8), SCALING(8))
        for module, (height, width) in SHAPES.items()
    }
    state = METHOD.init(initial)
    honest = cohort(state, "none")[: NUM_CLIENTS - NUM_MALICIOUS]
    wanted = mean(state, honest, np.ones(len(honest)))
    changes = cohort(state, attack)
    gram = change_gram([(change.start, change.update.payload) for change in changes])
    shares = robust_multipliers(RobustSettings(rule, NUM_MALICIOUS), gram, rng(2)).numpy()  # type: ignore[arg-type]
    found, plain = mean(state, changes, shares), mean(state, changes, np.ones(NUM_CLIENTS))
    errors = [float(np.linalg.norm(one - wanted) / np.linalg.norm(wanted)) for one in (plain, found)]
    # What is left of an error: nothing where exactly the liars are left out, the own spread and the ranks of the few
    # that krum and the median of means speak for, and what fits within the bound of norms.
    most = {"multi_krum": 1e-6, "trimmed_mean": 1e-6, "krum": 0.6, "median_of_means": 0.4, "norm_bound": 0.5}
    assert errors[1] < most[rule]
    # A label flip has the norm of an honest change and moves a mean less than the spread of a few honest clients.
    if attack != "label_flip" or rule in ("multi_krum", "trimmed_mean"):
        assert errors[1] < errors[0]
