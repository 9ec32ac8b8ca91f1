"""What is the weighted sum of many LoRA changes, and its singular value decomposition.

``P = sum_i w_i s_i B_i A_i`` is folded one update at a time into a ``ProductSum`` and read out as a ``Spectrum``. While
the total rank is small the factors themselves are kept: with ``L = [w_i s_i B_i]``, ``R = [A_i]``, ``L = Q1 R1`` and
``R^T = Q2 R2``, the decomposition of the small ``R1 R2^T`` is that of ``P``. Beyond ``FACTORED_SHARE`` of the shorter
side the stacks are multiplied out, block by block, and the dense float64 sum is decomposed. Both are exact to float64:
nothing goes through a Gram matrix, which would lose singular values below 1e-8 of the largest. Weights may be negative.
"""

# torch.linalg and torch.special carry no type information, and LinAlgError comes from torch's private part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false

from dataclasses import dataclass, replace
from math import hypot, isfinite
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora import FlexLoraError
from flexlora.lora.factors import FactorsError, LoraFactors

Split = Literal["b", "balanced"]

FACTORED_SHARE = 0.5
"""Total rank over ``min(out_features, in_features)`` up to which two QR decompositions cost less than one dense SVD."""


class ProductError(FlexLoraError, ValueError):
    """Changes that cannot be added up or decomposed: another shape, values that are not finite, no convergence."""


@dataclass(frozen=True)
class Spectrum:
    """The change ``U diag(S) Vh`` of one module, scaling included.

    Attributes:
        U: Orthonormal columns.
        S: Singular values, descending.
        Vh: Orthonormal rows; the entry of largest magnitude in each is positive, which fixes the signs.
        tail: Frobenius norm of what was discarded to get here.
    """

    U: Float[Tensor, "out_features k"]
    S: Float[Tensor, " k"]
    Vh: Float[Tensor, "k in_features"]
    tail: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the change, ``(out_features, in_features)``."""
        return self.U.shape[0], self.Vh.shape[1]

    def delta(self) -> Float[Tensor, "out_features in_features"]:
        """Return the dense change."""
        return (self.U * self.S) @ self.Vh

    def truncate(self, k: int) -> "Spectrum":
        """Return the best approximation with at most ``k`` directions; what goes is added to ``tail``."""
        tail = hypot(float(self.S[k:].norm()), self.tail)
        return Spectrum(self.U[:, :k], self.S[:k], self.Vh[:k], tail)

    def below(self, rank: int) -> "Spectrum":
        """Return what ``truncate(rank)`` leaves out: the directions from ``rank`` on."""
        return Spectrum(self.U[:, rank:], self.S[rank:], self.Vh[rank:])

    def factors(
        self, rank: int, scaling: float, split: Split = "b", spare: Float[Tensor, "spare in_features"] | None = None
    ) -> LoraFactors:
        """Return factors of exactly ``rank`` whose change is the best approximation of that rank.

        ``b``: ``A = Vh[:rank]``, ``B = U S / scaling`` (the paper's); ``balanced``: ``sqrt(S / scaling)`` in each.
        Where the singular values end before ``rank`` does, ``B`` gets zero columns and ``A`` fresh rows, because a
        direction that is zero in both factors has no gradient and never learns. A smaller rank is a slice of a larger
        one.

        Args:
            rank: At least 1; may exceed the number of singular values and ``in_features``.
            scaling: Positive; what the receiver multiplies ``B @ A`` by.
            split: Where the singular values go.
            spare: Rows to make the fresh ones from, row ``j`` for direction ``j``: as they are while there is no
                singular value at all (a new adapter starts as PEFT made it), otherwise orthonormalised.
        """
        if rank < 1 or scaling <= 0:
            raise FactorsError(f"rank must be at least 1 and scaling positive; got rank {rank}, scaling {scaling}")
        kept = min(rank, int((self.S > 0).sum()))
        U, S, Vh = self.U[:, :kept], self.S[:kept] / scaling, self.Vh[:kept]
        in_A, in_B = (torch.ones_like(S), S) if split == "b" else (S.sqrt(), S.sqrt())
        A = torch.cat([in_A[:, None] * Vh, _fresh_rows(Vh, rank - kept, spare)])
        B = torch.nn.functional.pad(U * in_B, (0, rank - kept))
        return LoraFactors(A, B, scaling)


@dataclass(frozen=True)
class ProductSum:
    """A weighted sum of changes so far; ``add_product`` and ``add_spectrum`` return the next one.

    Attributes:
        left: Columns ``w_i s_i B_i`` not yet multiplied out, float64.
        right: Rows ``A_i`` that belong to them.
        dense: What has been multiplied out, or None.
        magnitude: ``sum_j |left_j| |right_j|`` over all columns ever added; rounding errors scale with it.
    """

    out_features: int
    in_features: int
    left: tuple[Tensor, ...] = ()
    right: tuple[Tensor, ...] = ()
    dense: Float[Tensor, "out_features in_features"] | None = None
    magnitude: float = 0.0


def add_product(total: ProductSum, factors: LoraFactors, weight: float) -> ProductSum:
    """Return ``total + weight * scaling * B @ A``; ``weight`` may be negative."""
    left = factors.B.detach().to(torch.float64) * (weight * factors.scaling)
    return _add_columns(total, left, factors.A.detach().to(torch.float64))


def add_spectrum(total: ProductSum, spectrum: Spectrum, values: Float[Tensor, " k"]) -> ProductSum:
    """Return ``total + U diag(values) Vh``: the directions of ``spectrum`` with other values, of any sign."""
    left = spectrum.U.to(torch.float64) * values.to(torch.float64)
    return _add_columns(total, left, spectrum.Vh.to(torch.float64))


def decompose(total: ProductSum, max_rank: int | None = None, divisor: float = 1.0) -> Spectrum:
    """Return the singular value decomposition of ``total / divisor`` with at most ``max_rank`` directions.

    Singular values at the level of the rounding errors are noise and are left out (into ``tail``), so the spectrum of
    a sum of known rank has that many directions, and a sum of nothing has none. ``U`` and ``Vh`` are stored row by row,
    as a checkpoint stores them: other strides would let a resumed run round differently.

    Args:
        total: What was added up.
        max_rank: None keeps every direction.
        divisor: Positive, usually the sum of the weights: a mean needs no second pass over the updates.

    Raises:
        ProductError: If a factor or weight was NaN or infinite, or if LAPACK finds no decomposition.
    """
    if not isfinite(total.magnitude):
        raise ProductError("factors, scalings and weights must be finite; a sum of products became NaN or infinite")
    U, S, Vh = _decompose_stacks(total) if total.dense is None else _decompose_dense(total.dense, total)
    noise = 4 * torch.finfo(torch.float64).eps * max(total.out_features, total.in_features) ** 0.5 * total.magnitude
    kept = int((S > noise).sum())
    spectrum = Spectrum(U, S / divisor, Vh).truncate(kept if max_rank is None else min(kept, max_rank))
    largest = spectrum.Vh.gather(1, spectrum.Vh.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(torch.float64)
    # Cloned, because a slice would keep every discarded direction alive for as long as the state lives.
    return Spectrum(
        (spectrum.U * signs[:, 0]).clone(memory_format=torch.contiguous_format),
        spectrum.S.clone(),
        (spectrum.Vh * signs).clone(memory_format=torch.contiguous_format),
        spectrum.tail,
    )


def spectrum_of(factors: LoraFactors, max_rank: int | None = None) -> Spectrum:
    """Return the singular value decomposition of one change with at most ``max_rank`` directions."""
    return decompose(add_product(ProductSum(*factors.shape), factors, 1.0), max_rank)


def _add_columns(
    total: ProductSum, left: Float[Tensor, "out_features columns"], right: Float[Tensor, "columns in_features"]
) -> ProductSum:
    """Return ``total + left @ right``, multiplied out only when the stacks have grown past their share."""
    shape = (left.shape[0], right.shape[1])
    if shape != (total.out_features, total.in_features):
        raise ProductError(
            f"changes of one module must have one shape, here {(total.out_features, total.in_features)}; got {shape}"
        )
    if left.shape[1] == 0:
        return total
    magnitude = total.magnitude + float(left.norm(dim=0) @ right.norm(dim=1))
    lefts, rights = (*total.left, left), (*total.right, right)
    if sum(block.shape[1] for block in lefts) <= FACTORED_SHARE * min(shape):
        return replace(total, left=lefts, right=rights, magnitude=magnitude)
    product = torch.cat(lefts, 1) @ torch.cat(rights)
    dense = product if total.dense is None else total.dense + product
    return replace(total, left=(), right=(), dense=dense, magnitude=magnitude)


def _decompose_stacks(total: ProductSum) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of ``L @ R`` by two QR decompositions and the SVD of the small core."""
    if not total.left:
        empty = torch.zeros(0, dtype=torch.float64)
        return empty.reshape(total.out_features, 0), empty, empty.reshape(0, total.in_features)
    Q1, R1 = torch.linalg.qr(torch.cat(total.left, 1))
    Q2, R2 = torch.linalg.qr(torch.cat(total.right).T)
    U, S, Vh = _thin_svd(R1 @ R2.T)
    return Q1 @ U, S, Vh @ Q2.T


def _decompose_dense(dense: Tensor, rest: ProductSum) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of ``dense`` plus the stacks not yet multiplied out."""
    if rest.left:
        dense = dense + torch.cat(rest.left, 1) @ torch.cat(rest.right)
    return _thin_svd(dense)


def _thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of a finite matrix, by a second way where LAPACK's iteration does not converge.

    With ``matrix = Q R`` the second way decomposes ``R^T``, scaled to norm 1: the same singular values, to the same
    digits, from other numbers to iterate on.
    """
    try:
        return tuple(torch.linalg.svd(matrix, full_matrices=False))
    except torch.linalg.LinAlgError:
        norm = matrix.norm()
    Q, R = torch.linalg.qr(matrix / norm)
    try:
        U, S, Vh = torch.linalg.svd(R.T, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise ProductError(
            f"a sum of products must have a singular value decomposition; the one of shape {tuple(matrix.shape)} and "
            f"norm {float(norm):.3g} did not converge in two attempts, look for a client whose update is out of scale "
            f"({error})"
        ) from error
    return Q @ Vh.T, S * norm, U.T


def _fresh_rows(
    taken: Float[Tensor, "k in_features"], count: int, spare: Float[Tensor, "spare in_features"] | None
) -> Float[Tensor, "{count} in_features"]:
    """Return ``count`` non-zero rows to follow the orthonormal rows ``taken``.

    Row ``j`` comes from ``spare[j]`` while there is one, from a random stream of fixed seed after that; it is
    orthogonal to all rows before it as long as there is room and depends on nothing that comes later.
    """
    used, in_features = taken.shape
    candidates = [] if spare is None else list(spare.to(taken)[used:])
    rows = candidates[:count] if used == 0 else []
    if len(rows) == count:
        return torch.stack(rows) if rows else taken[:0]
    candidates = candidates[len(rows) :]
    basis = torch.linalg.qr(torch.stack(rows).T).Q.T if rows else taken
    generator = torch.Generator().manual_seed(used)
    while len(rows) < count:
        drawn = torch.randn(in_features, generator=generator, dtype=torch.float64).to(taken)
        row = candidates.pop(0) if candidates else drawn
        length = row.norm()
        has_room = basis.shape[0] < in_features
        if has_room:
            for _ in range(2):  # once leaves a remainder that matters when the candidate is nearly in the span
                row = row - (row @ basis.T) @ basis
        if row.norm() <= 1e-6 * length:
            continue
        rows.append(row / row.norm())
        basis = torch.cat([basis, rows[-1][None]]) if has_room else basis
    return torch.stack(rows)
