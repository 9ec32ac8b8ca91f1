"""Averages ``A`` and ``B`` separately: ``sum_i w_i A_i / sum w`` and ``sum_i w_i s_i B_i / (s sum w)`` in every module.

The product of these means is not the mean of the products, which is the subject of ``product``. Factors of a smaller
rank than the server's are taken as padded with zeros.
"""

from collections.abc import Iterable

import torch

from flexlora.lora.factors import AdapterState, FactorsError, LoraFactors


def mean_factors(start: AdapterState, updates: Iterable[tuple[AdapterState, float]]) -> dict[str, LoraFactors]:
    """Return the weighted mean of the factors, in float64, under the scalings of ``start``.

    Before adding, a client's ``B`` takes up the difference between its scaling and that of ``start``. A module or
    direction that an update lacks counts as zero there, and the update's weight still counts. Directions that no update
    has stay as they are in ``start``: a direction that is zero in both factors would never learn again.

    Args:
        start: The server's adapter in float64; it decides modules, ranks, shapes and scalings.
        updates: Factors with their weight, consumed once, one at a time and in order; none is kept. Ranks are at most
            those of ``start``.

    Raises:
        FactorsError: If an update has a module or rank that ``start`` has not, or the weights do not add up to more
            than 0.
    """
    A = {module: torch.zeros_like(factors.A) for module, factors in start.items()}
    B = {module: torch.zeros_like(factors.B) for module, factors in start.items()}
    covered, total = dict.fromkeys(start, 0), 0.0
    for adapter, weight in updates:
        total += weight
        for module, factors in adapter.items():
            rank, most = factors.rank, start[module].rank if module in start else 0
            if rank > most:
                raise FactorsError(f"{module}: rank must be in 0..{most}, the rank of the server's factors; got {rank}")
            client = factors.to(torch.float64).with_scaling(start[module].scaling)
            A[module][:rank] += weight * client.A
            B[module][:, :rank] += weight * client.B
            covered[module] = max(covered[module], rank)
    if not total > 0:
        raise FactorsError(f"weights of updates must add up to more than 0; got {total}")
    return {
        module: LoraFactors(
            torch.cat([A[module][:rank] / total, start[module].A[rank:]]),
            torch.cat([B[module][:, :rank] / total, start[module].B[:, rank:]], 1),
            start[module].scaling,
        )
        for module, rank in covered.items()
    }
