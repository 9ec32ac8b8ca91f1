"""Keeps the change of a whole model at the server, and makes of it what clients receive.

Methods that start clients afresh each round, or send them slices of one decomposition, share this state. Base weights
never change: what a paper adds to them is here a branch of low rank that travels beside the trained factors.
"""

# torch.linalg and torch.special carry no type information.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import (
    ProductSum,
    Spectrum,
    Split,
    add_product,
    add_spectrum,
    certified_decompositions,
    spectrum_of,
)


@dataclass(frozen=True)
class GlobalChange:
    """The change of every module, and the rows that fresh directions start from.

    Attributes:
        spectra: The change per module, float64, scaling included.
        initial_rows: The ``A`` of PEFT's initial adapter per module, ``[server rank, in_features]``, float32.
    """

    spectra: Mapping[str, Spectrum]
    initial_rows: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> ``(out_features, in_features)``."""
        return {module: spectrum.shape for module, spectrum in self.spectra.items()}

    @property
    def server_ranks(self) -> dict[str, int]:
        """Module path -> rank of the adapter that the run started from."""
        return {module: rows.shape[0] for module, rows in self.initial_rows.items()}

    def slices(self, ranks: Mapping[str, int], scaling: Scaling, split: Split = "b") -> dict[str, LoraFactors]:
        """Return the best approximation of each module's change at these ranks, float32, ready to be trained on."""
        return {
            module: self.spectra[module]
            .factors(rank, scaling(rank), split, self.initial_rows[module])
            .to(torch.float32)
            for module, rank in sorted(ranks.items())
        }

    def fresh(self, ranks: Mapping[str, int], scaling: Scaling) -> dict[str, LoraFactors]:
        """Return factors without any change at these ranks, float32: the first initial rows and a zero ``B``."""
        return {
            module: self.spectra[module]
            .truncate(0)
            .factors(rank, scaling(rank), spare=self.initial_rows[module])
            .to(torch.float32)
            for module, rank in sorted(ranks.items())
        }


def global_change_of(adapter: AdapterState) -> GlobalChange:
    """Return the change of an adapter, none for PEFT's initial one, and its rows of ``A``."""
    modules = sorted(adapter)
    return GlobalChange(
        {module: spectrum_of(adapter[module]) for module in modules},
        {module: adapter[module].to(torch.float32).A for module in modules},
    )


def adding_products(
    sums: dict[str, ProductSum], updates: Iterable[tuple[AdapterState, float]]
) -> Iterator[tuple[AdapterState, float]]:
    """Yield the updates on, the products of each added to ``sums`` with its weight on the way.

    Args:
        sums: Module path -> sum so far, replaced by the next one as updates pass; has every module of an update.
        updates: Factors with their weight, consumed once, one at a time and in order.
    """
    for adapter, weight in updates:
        for module, factors in adapter.items():
            sums[module] = add_product(sums[module], factors, weight)
        yield adapter, weight


def sum_products(
    shapes: Mapping[str, tuple[int, int]], updates: Iterable[tuple[AdapterState, float]]
) -> tuple[dict[str, ProductSum], float]:
    """Return ``sum_i w_i s_i B_i A_i`` per module, and the sum of the weights.

    A module that an update lacks is a zero product there; its weight counts.

    Args:
        shapes: Module path -> ``(out_features, in_features)``, every module of an update among them.
        updates: Factors with their weight, consumed once, one at a time and in order.
    """
    sums = {module: ProductSum(*shape) for module, shape in shapes.items()}
    return sums, sum(weight for _, weight in adding_products(sums, updates))


def folded(
    branch: Mapping[str, Spectrum], changes: Mapping[str, ProductSum], divisor: float = 1.0
) -> dict[str, Spectrum]:
    """Return ``branch + changes / divisor`` per module with all its directions, which are at most the shorter side.

    Args:
        branch: What was folded before.
        changes: What to add; the same modules.
        divisor: Positive, usually the sum of the weights.
    """
    sums = [add_spectrum(changes[module], old, divisor * old.S) for module, old in branch.items()]
    found = certified_decompositions(sums, [None] * len(sums), divisor)
    return {module: spectrum for module, (spectrum, _) in zip(branch, found, strict=True)}


def truncated(
    changes: Mapping[str, ProductSum], max_ranks: Mapping[str, int] | None, divisor: float = 1.0
) -> dict[str, Spectrum]:
    """Return the best approximation of ``changes / divisor`` per module at these ranks; None keeps every direction."""
    ranks = [None if max_ranks is None else max_ranks[module] for module in changes]
    found = certified_decompositions(list(changes.values()), ranks, divisor)
    return {module: spectrum for module, (spectrum, _) in zip(changes, found, strict=True)}


def branch_factors(branch: Mapping[str, Spectrum]) -> dict[str, LoraFactors] | None:
    """Return a branch as float32 factors with scaling 1, modules without a change left out; None if none has one."""
    factors = {
        module: spectrum.factors(spectrum.S.shape[0], 1.0).to(torch.float32)
        for module, spectrum in branch.items()
        if spectrum.S.shape[0] > 0
    }
    return factors or None
