"""Measures how far an adapter moved from where it started, over all modules at once.

A change is measured in one of two spaces. Of ``products`` it is ``D = s B A - s0 B0 A0`` per module, which is what a
mean of products sees; of ``factors`` it is ``(A - A0, s B - s0 B0)``, which is what a mean of factors sees. Norms are
Frobenius norms, joint over the modules: the root of the sum of their squares.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lora.factors import AdapterState, FactorsError, LoraFactors

ChangeSpace = Literal["products", "factors"]
"""What a change is measured in; see the module."""


def product_change(start: LoraFactors, end: LoraFactors) -> LoraFactors:
    """Return ``s B A - s0 B0 A0`` as factors of twice the rank, float64, scaling 1.

    It is ``(s B - s0 B0) A + s0 B0 (A - A0)``: nothing large cancels, so that a small change of large factors keeps its
    digits.
    """
    A, B = _difference(start, end)
    first, own = start.to(torch.float64), end.to(torch.float64)
    return LoraFactors(torch.cat([own.A, A]), torch.cat([B, first.with_scaling(1.0).B], dim=1), 1.0)


def factor_change(start: LoraFactors, end: LoraFactors) -> LoraFactors:
    """Return ``A - A0`` and ``s B - s0 B0``, float64, scaling 1; their product means nothing."""
    A, B = _difference(start, end)
    return LoraFactors(A, B, 1.0)


def change_norm(start: AdapterState, end: AdapterState, space: ChangeSpace) -> float:
    """Return the joint norm of the change of an adapter.

    A dense matrix is never formed: the norm of a change of products is that of the product of its small factors after
    one QR, which, unlike the trace of two Gram matrices, keeps small norms.

    Args:
        start: Where it started, every module of ``end`` among it.
        end: Where it ended, at the same ranks; a module that it lacks ended where it started.
        space: What the change is measured in.

    Raises:
        FactorsError: If ``end`` has a module that ``start`` lacks, or ranks or shapes differ.
    """
    surplus = sorted(end.keys() - start.keys())
    if surplus:
        raise FactorsError(f"a change needs a start in every module; got none for {surplus[0]!r}")
    squares = 0.0
    for module, own in end.items():
        if space == "products":
            squares += product_change(start[module], own).norm() ** 2
        else:
            moved = factor_change(start[module], own)
            squares += float(moved.A.square().sum() + moved.B.square().sum())
    return squares**0.5


def _difference(start: LoraFactors, end: LoraFactors) -> tuple[Tensor, Tensor]:
    """Return ``A - A0`` and ``s B - s0 B0`` in float64."""
    if (start.rank, start.shape) != (end.rank, end.shape):
        raise FactorsError(
            f"a change needs the rank and the shape of its start, {start.rank} and {start.shape}; got {end.rank} and "
            f"{end.shape}"
        )
    first, own = start.to(torch.float64).with_scaling(1.0), end.to(torch.float64).with_scaling(1.0)
    return own.A - first.A, own.B - first.B


def change_gram(changes: Sequence[tuple[AdapterState, AdapterState]]) -> Float[Tensor, "clients clients"]:
    """Return the inner products of the changes of products of every two clients, over all modules, in float64.

    ``<D_i, D_j> = sum over modules of tr(B_i^T B_j A_j A_i^T)`` for ``D_i = B_i A_i`` at twice the rank of a client: a
    dense matrix is never formed, and ranks may differ.

    Args:
        changes: Where each client started and ended; a module that an end lacks did not move.
    """
    gram = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for module in sorted({module for _, end in changes for module in end}):
        moved = [
            (i, product_change(start[module], end[module])) for i, (start, end) in enumerate(changes) if module in end
        ]
        A, B = torch.cat([one.A for _, one in moved]), torch.cat([one.B for _, one in moved], dim=1)
        owner = torch.repeat_interleave(
            torch.tensor([i for i, _ in moved]), torch.tensor([one.rank for _, one in moved])
        )
        for i, one in moved:
            products = ((one.B.T @ B) * (one.A @ A.T)).sum(dim=0)
            gram[i].index_add_(0, owner, products)
    return (gram + gram.T) / 2
