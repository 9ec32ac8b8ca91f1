"""Averages ``A`` and ``B`` separately: ``sum_i w_i A_i / W`` and ``sum_i w_i s_i B_i / (s W)`` in every module.

The product of these means is not the mean of the products, which is the subject of ``product``. ``W`` is the weight of
all updates, so that factors of a smaller rank than the server's are taken as padded with zeros, or, direction by
direction, of those that hold it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flexlora.lora.factors import AdapterState, FactorsError, LoraFactors


def mean_factors(
    start: AdapterState,
    updates: Iterable[tuple[AdapterState, float]],
    *,
    over: Literal["all", "holders"] = "all",
    averaged: Literal["both", "A", "B"] = "both",
    importance: Callable[[LoraFactors], float] | None = None,
) -> dict[str, LoraFactors]:
    """Return the weighted mean of the factors, in float64, under the scalings of ``start``.

    Before adding, a client's ``B`` takes up the difference between its scaling and that of ``start``. Directions that
    no update of positive weight has stay as they are in ``start``: a direction that is zero in both factors would never
    learn again.

    Args:
        start: The server's adapter in float64; it decides modules, ranks, shapes and scalings.
        updates: Factors with their weight, consumed once, one at a time and in order; none is kept. Ranks are at most
            those of ``start``.
        over: ``all``: a module or direction that an update lacks counts as zero there, and the update's weight still
            counts. ``holders``: row ``j`` of ``A`` and column ``j`` of ``B`` are divided by the weight of those who
            have them.
        averaged: The factor that is averaged; the other one stays as it is in ``start``.
        importance: What the weight of an update is multiplied by in a module that it has, from its factors in float64;
            it then counts for nothing in one that it lacks. None is 1 everywhere. A module in which all weights become
            0 stays as it is.

    Raises:
        FactorsError: If an update has a module or rank that ``start`` has not, or the weights do not add up to more
            than 0.
    """
    sums, total = factor_sums(start, updates, averaged=averaged, importance=importance)
    means: dict[str, LoraFactors] = {}
    for module, own in sums.items():
        everyone = total if importance is None else own.total
        means[module] = own.mean(start[module], None if over == "holders" else everyone, averaged)
    return means


def factor_sums(
    start: AdapterState,
    updates: Iterable[tuple[AdapterState, float]],
    *,
    averaged: Literal["both", "A", "B"] = "both",
    importance: Callable[[LoraFactors], float] | None = None,
) -> tuple[dict[str, "FactorSums"], float]:
    """Return the weighted sums of the factors per module and the weight of all updates; see ``mean_factors``.

    Raises:
        FactorsError: If an update has a module or rank that ``start`` has not, or the weights do not add up to more
            than 0.
    """
    sums = {module: FactorSums.of_nothing(factors) for module, factors in start.items()}
    total = 0.0
    for adapter, weight in updates:
        total += weight
        for module, factors in adapter.items():
            rank, most = factors.rank, start[module].rank if module in start else 0
            if rank > most:
                raise FactorsError(f"{module}: rank must be in 0..{most}, the rank of the server's factors; got {rank}")
            client = factors.to(torch.float64).with_scaling(start[module].scaling)
            sums[module].add(client, weight if importance is None else weight * importance(client), averaged)
    if not total > 0:
        raise FactorsError(f"weights of updates must add up to more than 0; got {total}")
    return sums, total


@dataclass
class FactorSums:
    """Weighted sums of one module while updates come in; changed in place.

    Attributes:
        held: Weight of those who have direction ``j``.
        total: Weight of all who have the module.
        covered: Number of directions that anyone of positive weight has.
    """

    A: Tensor
    B: Tensor
    held: Tensor
    total: float = 0.0
    covered: int = 0

    @classmethod
    def of_nothing(cls, start: LoraFactors) -> "FactorSums":
        """Return the sums before any update, in the shapes of ``start``."""
        return cls(torch.zeros_like(start.A), torch.zeros_like(start.B), torch.zeros_like(start.A[:, 0]))

    @classmethod
    def of_totals(cls, start: LoraFactors, sums: LoraFactors, weight_by_rank: Mapping[int, float]) -> "FactorSums":
        """Return the sums over updates that nobody has seen one by one.

        Args:
            start: The server's factors; they decide ranks and scaling.
            sums: ``sum_i w_i A_i`` and ``sum_i w_i s_i B_i`` with scaling 1, at the rank of ``start``.
            weight_by_rank: Rank -> weight of the updates that have it.

        Raises:
            FactorsError: If the sums have another rank.
        """
        if (sums.rank, sums.shape) != (start.rank, start.shape):
            raise FactorsError(
                f"sums must have the rank and the shape of the server's factors, {start.rank} and {start.shape}; got "
                f"{sums.rank} and {sums.shape}"
            )
        own, directions = sums.to(torch.float64).with_scaling(start.scaling), torch.arange(start.rank)
        held = torch.zeros(start.rank, dtype=torch.float64)
        for rank, weight in sorted(weight_by_rank.items()):
            held += weight * (directions < rank)
        covered = max((rank for rank, weight in weight_by_rank.items() if weight > 0), default=0)
        return cls(own.A, own.B, held, float(sum(weight_by_rank.values())), covered)

    def add(self, client: LoraFactors, weight: float, averaged: str) -> None:
        """Add a client's factors, or one of them, with its weight."""
        rank = client.rank
        if averaged != "B":
            self.A[:rank] += weight * client.A
        if averaged != "A":
            self.B[:, :rank] += weight * client.B
        self.held[:rank] += weight
        self.total += weight
        if weight > 0:
            self.covered = max(self.covered, rank)

    def mean(self, start: LoraFactors, divisor: float | None, averaged: str) -> LoraFactors:
        """Return the sums over ``divisor``, or over ``held`` if it is None, where anyone has anything."""
        rank = self.covered
        by_row = self.held[:rank, None] if divisor is None else divisor
        by_column = self.held[:rank] if divisor is None else divisor
        A = start.A.clone() if averaged == "B" else torch.cat([self.A[:rank] / by_row, start.A[rank:]])
        B = start.B.clone() if averaged == "A" else torch.cat([self.B[:, :rank] / by_column, start.B[:, rank:]], 1)
        return LoraFactors(A, B, start.scaling)
