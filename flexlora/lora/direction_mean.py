"""Averages the changes of factors direction by direction, all measured from one common start.

With ``dA_i`` and ``dB_i`` the changes of ``A_i`` and of ``s_i B_i`` against the start, and direction ``j`` held by the
clients with ``r_i >= j``:

    A+[j] = A0[j] + sum_{r_i >= j} w_i dA_i[j] / c_j^e,     B+[:, j] likewise,     c_j = sum_{r_i >= j} w_i

``e = 1`` divides by the weight of the holders, ``e = 0`` by that of all clients. The plain sums of the factors and the
weight that holds each direction are all that is needed of the clients.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from flexlora.lora.change import factor_change
from flexlora.lora.factor_mean import FactorSums, factor_sums
from flexlora.lora.factors import AdapterState, FactorsError, LoraFactors


def mean_directions(
    start: AdapterState, updates: Iterable[tuple[AdapterState, float]], exponent: float, step: float = 1.0
) -> dict[str, LoraFactors]:
    """Return the start moved by the mean change of each direction, in float64, under the scalings of ``start``.

    A direction that no update has stays as it is; so does a module. An update that lacks a module still counts in the
    weight of all.

    Args:
        start: The server's factors in float64; they decide modules, ranks, shapes and scalings. Every client started
            from the first rows of its ``A`` and the first columns of its ``B``.
        updates: Factors with their weight, consumed once, one at a time and in order; none is kept. Ranks are at most
            those of ``start``.
        exponent: ``e``, 0 to 1.
        step: What the mean change is multiplied by.

    Raises:
        FactorsError: If an update has a module or rank that ``start`` has not, or the weights do not add up to more
            than 0.
    """
    sums, total = factor_sums(start, updates)
    return moved_directions(start, sums, total, exponent, step)


def moved_directions(
    start: AdapterState, sums: Mapping[str, FactorSums], total: float, exponent: float, step: float = 1.0
) -> dict[str, LoraFactors]:
    """Return what ``mean_directions`` does from the sums over all updates and their weight ``total``."""
    return {module: _moved(factors, sums[module], total, exponent, step) for module, factors in start.items()}


def _moved(start: LoraFactors, sums: FactorSums, total: float, exponent: float, step: float) -> LoraFactors:
    """Return one module's start moved by ``step * (sum - held * start) / (total * (held / total)^exponent)``."""
    held = sums.held
    share = (held / total).clamp_min(1e-300)
    factor = torch.where(held > 0, step / (total * share**exponent), torch.zeros_like(held))
    return LoraFactors(
        start.A + factor[:, None] * (sums.A - held[:, None] * start.A),
        start.B + (sums.B - start.B * held) * factor,
        start.scaling,
    )


def with_noisy_changes(
    start: AdapterState,
    changes: Iterable[tuple[AdapterState, AdapterState, float]],
    denominator: float,
    noise: Callable[[str, int, int], Tensor],
    step: float = 1.0,
) -> dict[str, LoraFactors]:
    """Return the start moved by ``step * (sum_i d_i (dA_i, dB_i) + noise) / denominator``, in float64.

    ``dA_i`` and ``dB_i`` are the changes of ``A_i`` and of ``s_i B_i`` against what client ``i`` started from, and zero
    in the directions and modules that it lacks. What one client adds is a function of its own change alone, because
    nothing is divided by who else took part.

    Args:
        start: The server's factors in float64; they decide modules, ranks, shapes and scalings.
        changes: Where a client started, where it ended, and ``d_i``; consumed once, one at a time and in order.
        denominator: The same whoever takes part, above 0.
        noise: Name of a tensor (``MODULE.A``, ``MODULE.B``), its height and width -> what is added to its sum.
        step: What the mean change is multiplied by.

    Raises:
        FactorsError: If a change has a module or rank that ``start`` has not.
    """
    sums = {module: _noise_of(module, own, noise) for module, own in start.items()}
    for began, ended, discount in changes:
        for module, factors in ended.items():
            most = start[module].rank if module in start else 0
            if factors.rank > most:
                raise FactorsError(
                    f"{module}: rank must be in 0..{most}, the rank of the server's factors; got {factors.rank}"
                )
            moved = factor_change(began[module], factors)
            sums[module].A[: factors.rank] += discount * moved.A
            sums[module].B[:, : factors.rank] += discount * moved.B
    return {
        module: LoraFactors(
            own.A + sums[module].A * (step / denominator),
            own.B + sums[module].B * (step / (denominator * own.scaling)),
            own.scaling,
        )
        for module, own in start.items()
    }


def _noise_of(module: str, start: LoraFactors, noise: Callable[[str, int, int], Tensor]) -> LoraFactors:
    """Return the noise of one module as a sum to add changes to, scaling 1."""
    A = noise(f"{module}.A", *start.A.shape).to(start.A)
    return LoraFactors(A, noise(f"{module}.B", *start.B.shape).to(start.B), 1.0)
