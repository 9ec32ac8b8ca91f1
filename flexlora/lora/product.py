"""Adds up LoRA changes with weights and finds the singular value decomposition of the sum.

``P = sum_i w_i s_i B_i A_i`` is folded one update at a time into a ``ProductSum`` and read out as a ``Spectrum``; which
algorithm finds it is the subject of ``decomposition``. Weights may be negative. A sum refers to the factors as they are
stored and, once these would take more memory than the change itself, multiplies them out in float64. It can be told to
keep them (because they lie in a file that is mapped into memory), or to keep no more than a number of directions, for
live rounds in which even one dense matrix per module is too much.
"""

# torch.linalg and torch.special carry no type information, and LinAlgError comes from torch's private part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import hypot, isfinite
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.errors import FlexLoraError
from flexlora.lora.certificate import Accuracy, Certificate
from flexlora.lora.decomposition import truncated_svds
from flexlora.lora.factors import FactorsError, LoraFactors
from flexlora.lora.linalg import DecompositionError, Triple
from flexlora.lora.operator import Operator, Term

Split = Literal["b", "balanced"]


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
        keep_factors: Never multiply out, however many factors there are; for factors that cost no memory.
        most_directions: Never hold more than about three times as many columns: compress to this many directions
            whenever there are, and add up in ``discarded`` what that costs. None compresses nothing.
        terms: What has not been multiplied out.
        dense: What has, float64, or None.
        magnitude: Sum of the norms of the products of all columns ever added; rounding errors scale with it.
        discarded: Frobenius norms of all that compressing has left out, added up: an upper bound of what the sum lacks.
    """

    out_features: int
    in_features: int
    keep_factors: bool = False
    most_directions: int | None = None
    terms: tuple[Term, ...] = ()
    dense: Float[Tensor, "out_features in_features"] | None = None
    magnitude: float = 0.0
    discarded: float = 0.0

    @property
    def total_rank(self) -> int:
        """Columns of all factors that have not been multiplied out."""
        return sum(term.columns for term in self.terms)


def add_product(total: ProductSum, factors: LoraFactors, weight: float) -> ProductSum:
    """Return ``total + weight * scaling * B @ A``; ``weight`` may be negative.

    The factors are referred to, not copied: they must not be changed in place afterwards.
    """
    return _add_term(total, factors.B.detach(), factors.A.detach(), weight * factors.scaling)


def add_spectrum(total: ProductSum, spectrum: Spectrum, values: Float[Tensor, " k"]) -> ProductSum:
    """Return ``total + U diag(values) Vh``: the directions of ``spectrum`` with other values, of any sign."""
    return _add_term(total, spectrum.U * values.to(spectrum.U), spectrum.Vh, 1.0)


def add_dense(total: ProductSum, change: Float[Tensor, "out_features in_features"]) -> ProductSum:
    """Return ``total + change`` for a change that is no product, such as noise; in float64.

    Raises:
        ProductError: If the change has another shape than the sum.
    """
    if tuple(change.shape) != (total.out_features, total.in_features):
        raise ProductError(
            f"a change must have the shape of the sum, {(total.out_features, total.in_features)}; got "
            f"{tuple(change.shape)}"
        )
    change = change.detach().to(torch.float64)
    dense = change.clone() if total.dense is None else total.dense + change.to(total.dense.device)
    return replace(total, dense=dense, magnitude=total.magnitude + float(change.norm()))


def decompose(
    total: ProductSum, max_rank: int | None = None, divisor: float = 1.0, accuracy: Accuracy = "exact"
) -> Spectrum:
    """Return what ``certified_decomposition`` does, without the certificate."""
    return certified_decomposition(total, max_rank, divisor, accuracy)[0]


def certified_decomposition(
    total: ProductSum,
    max_rank: int | None = None,
    divisor: float = 1.0,
    accuracy: Accuracy = "exact",
    *,
    start: Float[Tensor, "j in_features"] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Spectrum, Certificate]:
    """Return the singular value decomposition of ``total / divisor``, at most ``max_rank`` directions, and its bound.

    Singular values at the level of the rounding errors are noise and are left out (into ``tail``), so the spectrum of
    a sum of known rank has that many directions, and a sum of nothing has none. ``U`` and ``Vh`` are stored row by row,
    as a checkpoint stores them: other strides would let a resumed run round differently.

    Args:
        total: What was added up.
        max_rank: None keeps every direction.
        divisor: Positive, usually the sum of the weights: a mean needs no second pass over the updates.
        accuracy: ``exact`` is within 1e-6 of the best approximation of its rank, relative to the latter's error;
            ``fast`` within 1e-3.
        start: Rows to begin from, such as ``Vh`` of the round before: quicker where little has changed, never worse.
        device: Where to compute; None is where the factors are. The result is there too.

    Raises:
        ProductError: If a factor or weight was NaN or infinite, or if LAPACK finds no decomposition.
    """
    return certified_decompositions([total], [max_rank], divisor, accuracy, starts=[start], device=device)[0]


def certified_decompositions(
    totals: Sequence[ProductSum],
    max_ranks: Sequence[int | None],
    divisor: float = 1.0,
    accuracy: Accuracy = "exact",
    *,
    starts: Sequence[Float[Tensor, "_ _"] | None] | None = None,
    device: torch.device | str | None = None,
) -> list[tuple[Spectrum, Certificate]]:
    """Return what ``certified_decomposition`` does for every module of a model.

    Modules of one shape, total rank and maximal rank are computed as one batch where that is quicker, large ones on the
    CPU side by side, one on each thread, where there are enough of them and memory for it.

    Raises:
        ProductError: If a factor or weight was NaN or infinite, or if LAPACK finds no decomposition.
    """
    if not all(isfinite(total.magnitude) for total in totals):
        raise ProductError("factors, scalings and weights must be finite; a sum of products became NaN or infinite")
    operators = [
        Operator(
            total.out_features, total.in_features, total.terms, total.dense, _device(total, device), total.magnitude
        )
        for total in totals
    ]
    columns = None if starts is None else [None if start is None else start.T for start in starts]
    found: dict[int, tuple[Spectrum, Certificate]] = {}
    try:
        for index, triple, certificate in truncated_svds(operators, max_ranks, accuracy, columns):
            found[index] = _as_spectrum(totals[index], triple, certificate, max_ranks[index], divisor)
    except (DecompositionError, torch.linalg.LinAlgError) as error:
        raise ProductError(str(error)) from error
    return [found[index] for index in range(len(totals))]


def _as_spectrum(
    total: ProductSum, triple: Triple, certificate: Certificate, max_rank: int | None, divisor: float
) -> tuple[Spectrum, Certificate]:
    """Return the directions above the noise, with their signs fixed, and the certificate of what is left out."""
    U, S, Vh = triple
    noise = 4 * torch.finfo(torch.float64).eps * max(total.out_features, total.in_features) ** 0.5 * total.magnitude
    kept = int((S > noise).sum())
    left_out = float(S[kept:max_rank].norm())
    spectrum = Spectrum(U, S, Vh, certificate.tail).truncate(kept if max_rank is None else min(kept, max_rank))
    # By the triangle inequality, what compressing has cost before counts against the answer twice: in its own error and
    # in how far the best approximation of the compressed sum is from that of the whole.
    rounding = certificate.rounding + left_out + 2 * total.discarded
    certificate = replace(certificate, tail=spectrum.tail, rounding=rounding).scaled(1.0 / divisor)
    largest = spectrum.Vh.gather(1, spectrum.Vh.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(torch.float64)
    # Cloned, because a slice would keep every discarded direction alive for as long as the state lives.
    spectrum = Spectrum(
        (spectrum.U * signs[:, 0]).clone(memory_format=torch.contiguous_format),
        spectrum.S / divisor,
        (spectrum.Vh * signs).clone(memory_format=torch.contiguous_format),
        (spectrum.tail + total.discarded) / divisor,
    )
    return spectrum, certificate


def spectrum_of(factors: LoraFactors, max_rank: int | None = None) -> Spectrum:
    """Return the singular value decomposition of one change with at most ``max_rank`` directions."""
    return decompose(add_product(ProductSum(*factors.shape), factors, 1.0), max_rank)


def _add_term(
    total: ProductSum,
    left: Float[Tensor, "out_features columns"],
    right: Float[Tensor, "columns in_features"],
    coefficient: float,
) -> ProductSum:
    """Return ``total + coefficient * left @ right``, multiplied out only where that takes less memory."""
    shape = (left.shape[0], right.shape[1])
    if shape != (total.out_features, total.in_features):
        raise ProductError(
            f"changes of one module must have one shape, here {(total.out_features, total.in_features)}; got {shape}"
        )
    if left.shape[1] == 0:
        return total
    right_sizes, left_sizes = _norms(right, 1), _norms(left, 0)
    sizes = left_sizes * right_sizes * abs(coefficient)
    term = Term(left, right, coefficient, sizes, right_sizes)
    total = replace(total, terms=(*total.terms, term), magnitude=total.magnitude + float(sizes.sum()))
    if total.most_directions is not None:
        return _compressed(total) if total.total_rank > 2 * total.most_directions else total
    if total.keep_factors:
        return total
    stored = sum(term.columns * term.left.element_size() for term in total.terms) * sum(shape)
    if stored <= 8 * shape[0] * shape[1]:
        return total
    device = _device(total, None)
    operator = Operator(*shape, total.terms, total.dense, device, total.magnitude)
    return replace(total, terms=(), dense=operator.formed(torch.float64).dense)


def _compressed(total: ProductSum) -> ProductSum:
    """Return the sum with its leading ``most_directions`` only, the norm of the others added to ``discarded``."""
    if not isfinite(total.magnitude):
        return replace(total, terms=total.terms[-1:])  # Nothing to save: it will be refused when it is read out.
    empty = replace(total, terms=(), discarded=0.0)
    spectrum, certificate = certified_decomposition(replace(total, discarded=0.0), total.most_directions)
    compressed = add_spectrum(empty, spectrum, spectrum.S)
    lost = total.discarded + certificate.error * (1.0 + certificate.excess)
    return replace(compressed, magnitude=total.magnitude, discarded=lost)


def _norms(matrix: Tensor, dim: int) -> Tensor:
    """Return the Euclidean norms along ``dim`` in float64, from float32 sums where these cannot leave its range."""
    # Along rows the library's norm is the quicker of two ways, along columns the product with itself is.
    flat = matrix.float()
    quick = (torch.linalg.vector_norm(flat, dim=1) if dim else torch.linalg.vecdot(flat, flat, dim=0).sqrt()).double()
    if bool(((quick > 1e-15) & (quick < 1e15)).all()):
        return quick.cpu()
    return torch.linalg.vector_norm(matrix, dim=dim, dtype=torch.float64).cpu()


def _device(total: ProductSum, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if total.dense is not None:
        return total.dense.device
    return total.terms[0].left.device if total.terms else torch.device("cpu")


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
