"""Takes a step of the server's optimiser in product space: a learning rate and momentum on what a round would give.

With ``G`` the change so far, ``C`` the one that the method's rule alone would put in its place, ``eta`` the learning
rate and ``beta`` the momentum, in every module (FedAvgM, arXiv:1909.06335, with ``C - G`` as its pseudo-gradient):

    M+ = beta M + (C - G),        G+ = G + eta M+ = (1 - eta) G + eta C + eta beta M

Both are sums of products, so they have low rank, do not depend on how a product is split into factors, and are read out
by one decomposition each. ``G+`` is cut to the server's rank ``R``. ``M+`` is cut to ``2 R``, the most that a
difference of two changes of rank ``R`` has, and what that costs is the ``tail`` of its spectrum. With ``eta = 1`` and
``beta = 0`` nothing is added to ``C`` and there is no ``M``.

It is for rules that are linear in the products, whose ``C`` is a ``ProductSum``. A learning rate for each entry
(FedAdam) is none of them: its second moments are dense and belong to one choice of factors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flexlora.lora.certificate import Accuracy
from flexlora.lora.product import ProductSum, Spectrum, add_spectrum, certified_decompositions


@dataclass(frozen=True)
class ServerOptimizer:
    """How far a round moves the server.

    Attributes:
        learning_rate: ``eta``, above 0.
        momentum: ``beta``, 0 to below 1.
        accuracy: Of the decompositions.
    """

    learning_rate: float = 1.0
    momentum: float = 0.0
    accuracy: Accuracy = "exact"


def server_step(
    optimizer: ServerOptimizer,
    current: Mapping[str, Spectrum],
    momentum: Mapping[str, Spectrum] | None,
    sums: Mapping[str, ProductSum],
    total: float,
    max_ranks: Mapping[str, int],
) -> tuple[dict[str, Spectrum], dict[str, Spectrum] | None]:
    """Return ``G+`` and ``M+`` of every module, decomposed; ``M+`` is None without momentum.

    Args:
        optimizer: Learning rate, momentum and accuracy.
        current: ``G``.
        momentum: ``M``; None is zero.
        sums: ``total * C``, with the modules of ``current``.
        total: Positive; usually the sum of the weights of a round.
        max_ranks: ``R``.

    Raises:
        ProductError: If a factor or weight was NaN or infinite, or if LAPACK finds no decomposition.
    """
    eta, beta = optimizer.learning_rate, optimizer.momentum
    moved = dict(sums)
    if beta and momentum is not None:
        moved = {module: _plus(own, momentum[module], total * beta) for module, own in moved.items()}
    stepped = moved
    if eta != 1.0:
        stepped = {module: _plus(own, current[module], total * (1.0 / eta - 1.0)) for module, own in moved.items()}
    spectra = _read_out(stepped, max_ranks, total / eta, optimizer.accuracy, current)
    if not beta:
        return spectra, None
    steps = {module: _plus(own, current[module], -total) for module, own in moved.items()}
    ranks = {module: 2 * rank for module, rank in max_ranks.items()}
    return spectra, _read_out(steps, ranks, total, optimizer.accuracy, momentum)


def _plus(total: ProductSum, spectrum: Spectrum, factor: float) -> ProductSum:
    return add_spectrum(total, spectrum, factor * spectrum.S)


def _read_out(
    sums: Mapping[str, ProductSum],
    max_ranks: Mapping[str, int],
    divisor: float,
    accuracy: Accuracy,
    before: Mapping[str, Spectrum] | None,
) -> dict[str, Spectrum]:
    """Return the decompositions of ``sums / divisor``."""
    # Where the factors are gone, the directions of the round before are where this round's are, more or less.
    starts = [None if before is None or own.dense is None else before[module].Vh for module, own in sums.items()]
    found = certified_decompositions(
        list(sums.values()), [max_ranks[module] for module in sums], divisor, accuracy, starts=starts
    )
    return {module: spectrum for module, (spectrum, _) in zip(sums, found, strict=True)}
