"""Sketches a sum of products in two passes, so that each client only has to add small matrices to a sum.

With ``P = sum_i w_i s_i B_i A_i`` and ``Omega [in_features, k]`` of orthonormal columns (Halko et al., arXiv:0909.4061;
FedASK and PowerSGD on products):

    Y = sum_i w_i s_i B_i (A_i Omega),   Q R = Y,   Z = sum_i w_i s_i A_i^T (B_i^T Q),   P ~ Q (Q^T Q)^-1 Z^T

It is exact, to the digits of ``Q``, if ``k`` is at least the rank of ``P``. ``Omega`` begins with the rows that clients
started from, to which ``P`` is close, and goes on at random. The last columns are probes: what the range of the others
leaves of them says how large the error is, before they are used as well. ``(Q^T Q)^-1`` undoes the rounding of ``Q`` on
its way.
"""

# torch.linalg carries no type information.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportConstantRedefinition=false

from math import hypot, sqrt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lora.factors import LoraFactors

NUM_PROBES = 4
"""Columns of a sketch by which its error is measured."""


def sketch_columns(
    warm: Float[Tensor, "rows in_features"], num_columns: int, rng: np.random.Generator
) -> Float[Tensor, "in_features {num_columns}"]:
    """Return ``Omega`` in float64: as many of the ``warm`` rows as there is room for before the probes, then random.

    The columns from any one on are uniformly distributed in what the columns before leave.

    Args:
        warm: Need not be orthonormal; rows that depend on others are replaced by random ones.
        num_columns: ``k``, at most ``in_features``.
        rng: The same at every end.
    """
    in_features = warm.shape[1]
    num_warm = min(warm.shape[0], max(0, num_columns - NUM_PROBES))
    drawn = torch.from_numpy(rng.standard_normal((in_features, num_columns)))
    start = warm[:num_warm].to(torch.float64).T
    Q, R = torch.linalg.qr(start)
    sizes = R.diagonal().abs()
    kept = Q[:, sizes > 1e-6 * sizes.max()] if num_warm else Q
    rest = drawn[:, kept.shape[1] :]
    for _ in range(2):
        rest = rest - kept @ (kept.T @ rest)
    return torch.cat([kept, torch.linalg.qr(rest).Q], 1)


def range_part(factors: LoraFactors, Omega: Float[Tensor, "in_features k"]) -> Float[Tensor, "out_features k"]:
    """Return what one client adds to ``Y`` before its weight, ``s B (A Omega)`` in float64."""
    wide = factors.to(torch.float64)
    return factors.scaling * (wide.B @ (wide.A @ Omega))


def projection_part(factors: LoraFactors, Q: Float[Tensor, "out_features k"]) -> Float[Tensor, "in_features k"]:
    """Return what one client adds to ``Z`` before its weight, ``s A^T (B^T Q)`` in float64."""
    wide = factors.to(torch.float64)
    return factors.scaling * (wide.A.T @ (wide.B.T @ Q.to(torch.float64)))


def range_of(Y: Float[Tensor, "out_features k"], in_features: int) -> tuple[Float[Tensor, "out_features j"], float]:
    """Return orthonormal ``Q`` that spans the columns of ``Y``, in float32, and the norm of what it leaves of ``P``.

    The norm is estimated, from what the columns before the probes leave: an upper estimate for all of ``Q``, with its
    rounding. A column that adds nothing is left out: its direction would be noise.

    Args:
        Y: The sum, in float64; of its columns the last are the probes.
        in_features: Of ``P``.
    """
    k = Y.shape[1]
    num_probes = min(NUM_PROBES, k)
    first, probes = Y[:, : k - num_probes], Y[:, k - num_probes :]
    scale = float(Y.norm())
    left = probes
    if first.shape[1] and scale > 0:
        U, S, _ = torch.linalg.svd(first, full_matrices=False)
        U = U[:, S > 1e-12 * scale]
        for _ in range(2):
            left = left - U @ (U.T @ left)
    unseen = in_features - (k - num_probes)
    rounding = torch.finfo(torch.float32).eps * scale
    error = hypot(sqrt(unseen / num_probes) * float(left.norm()), rounding)
    U, S, _ = torch.linalg.svd(Y, full_matrices=False)
    kept = max(1, int((S > 1e-12 * scale).sum()))
    return U[:, :kept].to(torch.float32).contiguous(), error


def product_of(Q: Float[Tensor, "out_features j"], Z: Float[Tensor, "in_features j"]) -> LoraFactors:
    """Return the sum that a sketch stands for as factors in float64 with scaling 1, ``B = Q`` and ``A`` the rest."""
    wide = Q.to(torch.float64)
    return LoraFactors(torch.linalg.solve(wide.T @ wide, Z.T.contiguous()), wide, 1.0)


def largest_in_rows(start: LoraFactors, change: float) -> float:
    """Return a bound of the norm of any row of ``s B A`` after training has moved each entry by at most ``change``.

    ``s (max_a ||B_a|| + sqrt(r) change) (||A||_2 + sqrt(r in_features) change)``
    """
    A, B, rank = start.A.to(torch.float64), start.B.to(torch.float64), start.rank
    longest = float(torch.linalg.vector_norm(B, dim=1).max()) + sqrt(rank) * change
    return abs(start.scaling) * longest * (float(torch.linalg.matrix_norm(A, 2)) + sqrt(A.numel()) * change)


def largest_in_columns(start: LoraFactors, change: float) -> float:
    """Return the same bound for any column: ``s (max_a ||A^T_a|| + sqrt(r) change) (||B||_2 + ...)``."""
    return largest_in_rows(LoraFactors(start.B.T.contiguous(), start.A.T.contiguous(), start.scaling), change)
