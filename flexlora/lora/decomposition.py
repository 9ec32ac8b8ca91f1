"""What are the leading singular values of a sum of products, at the least cost, and how good is the answer?

For ``P = sum_i c_i B_i A_i`` of shape ``m x n``, with ``R`` columns in all the ``B_i`` and ``k`` directions asked for:

========== ===================================================================== =================================
method     how                                                                   taken when
========== ===================================================================== =================================
qr         QR of both stacks, SVD of the ``R x R`` core, float64                 ``R`` is small, or all is wanted
gram       float64 Gram matrices of both stacks, Cholesky, ``R x R`` eigenvalues ``R`` below ``min(m, n)``
subspace   filtered block iteration on ``P``, never formed, or formed once       ``R`` large, ``k`` small
dense_gram float64 Gram matrix of the shorter side, top eigenvectors             no gap after ``k``, or small sides
dense_svd  full SVD in float64                                                   anything else
========== ===================================================================== =================================

Every answer carries a ``Certificate``. With ``E_k`` the error of the best approximation of rank ``k`` (Eckart and
Young) it says ``||P - U S Vh|| <= (1 + excess) E_k + rounding``. A method that cannot keep ``excess`` within the
tolerance hands over to the next one down the table.

``subspace`` multiplies a block of orthonormal columns with ``P P^T``, filtered by Chebyshev polynomials that hold down
what the block does not catch. ``P^T`` times the block gives Ritz triples ``(s_j, u_j, v_j)`` with ``P^T U = V
diag(s)``, and ``P V`` the answer. Take the leading ``kept >= k`` of the triples, and let ``P_d = P - U U^T P`` be what
they leave, ``E = P_d V``, and ``eta`` at least the squared spectral norm of ``P_d``. If ``(sigma, u, v)`` is a
singular triple of ``P``, ``w`` the part of ``u`` outside ``U`` and ``z`` the part of ``v`` outside ``V``, then ``sigma
w = P_d v`` and ``sigma z = (1 - V V^T) P_d^T w``, so ``sigma^2 |z|^2 <= eta |w|^2`` and, for ``sigma^2 > eta``,

    sigma |w| <= |E V^T v| + eta |w| / sigma,    hence    |w| <= |E V^T v| sigma / (sigma^2 - eta).

``P V`` captures at least ``sum_(i<=k) sigma_i^2 (1 - |z_i|^2)``, because ``P^T P`` is at least its leading part. So
its singular values ``theta_i^(1/2)`` miss, for any ``j <= k`` with ``s_j^2 > eta``, no more than

    sum_(i<=k) (sigma_i^2 - theta_i) <= eta s_j^2 / (s_j^2 - eta)^2 ||E||^2 + (k - j) eta    (Frobenius norm).

``eta`` comes from a few random vectors ``G`` that have nothing to do with ``U``. With ``N`` the product of ``P_d^T``
and ``P_d`` in turn, ``d`` factors, and ``g`` the coefficients of ``G`` at the leading left vector of ``P_d``, ``||N
G||^2 >= ||P_d||^(2 d) |g|^2`` in spectral norms, where ``|g|^2`` is chi-squared and exceeds a value that is not small
except with a chance of our choice. The first two factors ride along with products that are needed anyway; more of
them, which cost little for so few columns, make the bound tighter. The first one also gives the energy of ``P_d``
(Laurent and Massart 2000, lemma 1). The chance is shared out over all blocks and all times that the bound is looked
at.
"""

# torch.linalg carries no type information, and LinAlgError comes from torch's private part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportConstantRedefinition=false

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import exp, frexp, inf, ldexp, lgamma, log, sqrt
from typing import Literal
from zlib import crc32

import torch
from scipy.linalg import eigh  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

Accuracy = Literal["exact", "fast"]
Method = Literal["none", "qr", "gram", "subspace", "dense_gram", "dense_svd"]

TOLERANCE: dict[Accuracy, float] = {"exact": 1e-6, "fast": 1e-3}
"""Largest ``excess``: how much worse than the best approximation of the same rank an answer may be."""

FLOOR: dict[Accuracy, float] = {"exact": 1e-9, "fast": 1e-5}
"""Additive error, relative to the norm of the change, that is accepted where the best error is nearly zero."""

FAILURE_PROBABILITY = 1e-9
"""Chance that a certificate of the randomised method does not hold."""

QR_COLUMNS = 96
GRAM_SHARE = 0.75
GRAM_COLUMNS = 4
"""Columns per direction asked for above which iterating costs less than Gram matrices of all of them."""
SMALL_SIDE = 768
BLOCK_BYTES = 64 * 2**20
STACK_BYTES = 256 * 2**20
"""Size of both stacks of the small terms up to which they are copied together once instead of once per product."""
DIRECT_COLUMNS = 128
"""Columns from which on a term is multiplied as it lies."""
NUM_PROBES = 32
LEAST_OVERSAMPLING = 16
OVERSAMPLED = 6
"""Directions asked for per column beyond them."""
FILTERED_FROM = 5
"""Products after which the edge of the filter stays where it is."""
MOST_PRODUCTS = 25
MOST_FACTORS = 32
"""Factors of the product that bounds a spectral norm."""
NUM_LOOKS = 4 * MOST_FACTORS * MOST_PRODUCTS**2
"""Bounds that may be looked at: of the norm and of the energy on both sides, for each block in either precision."""
STEEP = 1e-6
"""Singular value over the largest below which its vectors are not taken from a Gram matrix."""
MODERATE = 1e10
"""Largest size, and inverse of the smallest, of what float32 is trusted with."""


class DecompositionError(ArithmeticError):
    """No decomposition was found."""


@dataclass(frozen=True)
class Certificate:
    """How good a truncated decomposition is: ``||P - U S Vh|| <= (1 + excess) best + rounding`` in Frobenius norm.

    Attributes:
        method: How it was found.
        reason: Why that way, in words.
        norm: Frobenius norm of the whole change.
        tail: Frobenius norm of what was discarded. Like ``norm`` estimated from random probes where the change was
            never formed (``method="subspace"``), to a few per cent.
        excess: Upper bound of the relative distance to the best approximation of the same rank.
        rounding: Upper bound of what limited precision adds, absolute.
        failure_probability: Chance that the bound does not hold; 0 where nothing random was used.
    """

    method: Method
    reason: str
    norm: float
    tail: float
    excess: float = 0.0
    rounding: float = 0.0
    failure_probability: float = 0.0

    @property
    def error(self) -> float:
        """Discarded part with rounding: upper bound of the distance, as far as ``tail`` is exact."""
        return self.tail + self.rounding

    @property
    def optimal(self) -> float:
        """Lower bound of the distance of the best approximation of this rank, as far as ``tail`` is exact."""
        return max(0.0, self.tail - self.rounding) / (1.0 + self.excess)

    @property
    def energy_kept(self) -> float:
        """Share in 0..1 of the squared norm that was kept."""
        return max(0.0, 1.0 - (self.tail / self.norm) ** 2) if self.norm > 0 else 1.0

    def scaled(self, factor: float) -> "Certificate":
        """Return the certificate of the change times ``factor`` > 0."""
        return replace(self, norm=self.norm * factor, tail=self.tail * factor, rounding=self.rounding * factor)


@dataclass(frozen=True)
class Term:
    """``left @ diag(coefficients) @ right`` in whatever type it is stored, with the norms of columns and rows.

    Attributes:
        left: Shape (out_features, columns).
        right: Shape (columns, in_features).
        coefficient: Weight times scaling, of any sign.
        sizes: ``|coefficient| |left_j| |right_j|`` for each column, float64.
        right_sizes: ``|right_j|``, float64.
    """

    left: Tensor
    right: Tensor
    coefficient: float
    sizes: Tensor
    right_sizes: Tensor

    @property
    def columns(self) -> int:
        """Number of columns of ``left``."""
        return self.left.shape[1]


@dataclass(frozen=True)
class Operator:
    """A sum of terms plus, possibly, a dense part: ``P`` as something that multiplies blocks of vectors.

    Attributes:
        out_features: Rows of ``P``.
        in_features: Columns of ``P``.
        terms: What has not been multiplied out.
        dense: What has, float64, or None.
        device: Where to compute.
        magnitude: Sum of the norms of all columns' products ever added: the worst case of rounding errors.
    """

    out_features: int
    in_features: int
    terms: Sequence[Term]
    dense: Tensor | None
    device: torch.device
    magnitude: float

    @cached_property
    def columns(self) -> int:
        """Total rank of the terms."""
        return sum(term.columns for term in self.terms)

    @cached_property
    def sizes(self) -> Tensor:
        """``|c_j l_j| |r_j|`` of all columns, float64."""
        parts = [term.sizes for term in self.terms]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    @cached_property
    def scale(self) -> float:
        """Root of the sum of the squared norms of all columns' products, as independent rounding errors add up."""
        dense = 0.0 if self.dense is None else float(torch.linalg.vector_norm(self.dense))
        return sqrt(float(self.sizes.square().sum()) + dense**2)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield ``left``, ``right`` and the coefficients, some columns at a time.

        What is yielded must not be changed, and is good until the next block. Large terms are taken as they lie, small
        ones gathered: once for all products while they fit into ``STACK_BYTES``, otherwise each time anew in buffers.
        """
        small: list[Term] = []
        for term in self.terms:
            if term.columns < DIRECT_COLUMNS or term.left.dtype != dtype or term.left.device != self.device:
                small.append(term)
                continue
            factors = torch.full((term.columns,), term.coefficient, dtype=dtype, device=self.device)
            yield term.left, term.right, factors
        columns = sum(term.columns for term in small)
        if not columns:
            return
        row_bytes = dtype.itemsize * (self.out_features + self.in_features)
        if row_bytes * columns <= STACK_BYTES:
            if dtype not in self._kept:
                self._kept[dtype] = next(self._gathered(small, self._buffers(dtype, columns)))
            yield self._kept[dtype]
            return
        if dtype not in self._kept:
            self._kept[dtype] = self._buffers(dtype, max(1, BLOCK_BYTES // row_bytes // 64) * 64)
        yield from self._gathered(small, self._kept[dtype])

    @cached_property
    def _kept(self) -> dict[torch.dtype, tuple[Tensor, Tensor, Tensor]]:
        return {}

    def _buffers(self, dtype: torch.dtype, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        lefts = torch.empty(self.out_features, columns, dtype=dtype, device=self.device)
        rights = torch.empty(columns, self.in_features, dtype=dtype, device=self.device)
        return lefts, rights, torch.empty(columns, dtype=dtype, device=self.device)

    def _gathered(
        self, terms: Sequence[Term], buffers: tuple[Tensor, Tensor, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the terms' columns side by side, as many at a time as the buffers hold."""
        lefts, rights, factors = buffers
        size, filled = factors.shape[0], 0
        for term in terms:
            done = 0
            while done < term.columns:
                take = min(size - filled, term.columns - done)
                lefts[:, filled : filled + take] = term.left[:, done : done + take]
                rights[filled : filled + take] = term.right[done : done + take]
                factors[filled : filled + take] = term.coefficient
                done, filled = done + take, filled + take
                if filled == size:
                    yield lefts, rights, factors
                    filled = 0
        if filled:
            yield lefts[:, :filled], rights[:filled], factors[:filled]

    def _dense_as(self, dtype: torch.dtype) -> Tensor:
        assert self.dense is not None
        if dtype not in self._dense_in:
            self._dense_in[dtype] = self.dense.to(self.device, dtype)
        return self._dense_in[dtype]

    @cached_property
    def _dense_in(self) -> dict[torch.dtype, Tensor]:
        return {}

    def apply(self, X: Tensor) -> Tensor:
        """Return ``P @ X`` in the type of ``X``."""
        Y = X.new_zeros(self.out_features, X.shape[1])
        if self.dense is not None:
            Y.addmm_(self._dense_as(X.dtype), X)
        for left, right, factors in self.blocks(X.dtype):
            Y.addmm_(left, (right @ X).mul_(factors[:, None]))
        return Y

    def apply_transposed(self, Y: Tensor) -> Tensor:
        """Return ``P.T @ Y`` in the type of ``Y``."""
        X = Y.new_zeros(self.in_features, Y.shape[1])
        if self.dense is not None:
            X.addmm_(self._dense_as(Y.dtype).T, Y)
        for left, right, factors in self.blocks(Y.dtype):
            X.addmm_(right.T, (left.T @ Y).mul_(factors[:, None]))
        return X

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Return both stacks in float64, coefficients in the left one."""
        left = torch.empty(self.out_features, self.columns, dtype=torch.float64, device=self.device)
        right = torch.empty(self.columns, self.in_features, dtype=torch.float64, device=self.device)
        start = 0
        for term in self.terms:
            stop = start + term.columns
            left[:, start:stop] = term.left
            left[:, start:stop] *= term.coefficient
            right[start:stop] = term.right
            start = stop
        return left, right

    def formed(self, dtype: torch.dtype) -> "Operator":
        """Return the same operator, multiplied out in ``dtype``."""
        if not self.terms and self.dense is not None:
            return replace(self, dense=self.dense.to(self.device, dtype))
        if self.dense is None:
            total = torch.zeros(self.out_features, self.in_features, dtype=dtype, device=self.device)
        else:
            total = self.dense.to(self.device, dtype, copy=True)
        for left, right, factors in self.blocks(dtype):
            total.addmm_(left * factors, right)
        return replace(self, terms=(), dense=total)

    def mean_rows(self, k: int) -> Tensor:
        """Return at most ``k`` columns: the terms' rows, of equal place added up, weighted by what their columns carry.

        For clients that started from common factors and learned much the same they point where ``P`` does, with the
        differences averaged out, for the price of reading ``right`` once.
        """
        most = min(k, max(term.columns for term in self.terms))
        total = torch.zeros(k // most, most, self.in_features, dtype=torch.float32, device=self.device)
        for index, term in enumerate(self.terms):
            place = total[index % (k // most)]
            weights = (term.sizes / term.right_sizes.clamp_min(1e-300)).to(place)
            for first in range(0, term.columns, most):
                rows = term.right[first : first + most].to(place)
                place[: rows.shape[0]].addcmul_(rows, weights[first : first + most, None])
        return total.flatten(0, 1).T


Triple = tuple[Tensor, Tensor, Tensor]


def truncated_svd(
    operator: Operator, k: int | None, accuracy: Accuracy = "exact", start: Tensor | None = None
) -> tuple[Triple, Certificate]:
    """Return ``U``, ``S``, ``Vh`` (float64) of the leading directions and their certificate.

    More than ``k`` directions may come back where a method finds them anyway.

    Args:
        operator: The sum; all its numbers finite.
        k: Directions asked for; None is all of them.
        accuracy: Which ``TOLERANCE`` to meet.
        start: Shape (in_features, any), directions to begin from, such as the right singular vectors of the last
            round. They cannot make the answer worse, only quicker.

    Raises:
        DecompositionError: If LAPACK finds no decomposition.
    """
    operator, unit = _tamed(operator)
    (U, S, Vh), certificate = _by_cheapest(operator, k, accuracy, start)
    return (U, S * unit, Vh), certificate.scaled(unit)


def _by_cheapest(
    operator: Operator, k: int | None, accuracy: Accuracy, start: Tensor | None
) -> tuple[Triple, Certificate]:
    """Decompose by the first method in the module's table that is worth trying and keeps the tolerance."""
    m, n = operator.out_features, operator.in_features
    side, columns = min(m, n), operator.columns
    top = columns if operator.dense is None else side
    wanted = min(side, top) if k is None else min(k, side, top)
    if wanted == 0:
        empty = torch.zeros(0, dtype=torch.float64, device=operator.device)
        triple = (empty.reshape(m, 0), empty, empty.reshape(0, n))
        return triple, Certificate("none", "there is nothing to decompose", 0.0, 0.0)
    notes: list[str] = []
    if operator.dense is None:
        if columns <= QR_COLUMNS or (wanted >= min(columns, side) and columns <= GRAM_SHARE * side):
            return _by_qr(operator, f"total rank {columns} is small")
        if columns <= GRAM_SHARE * side and (columns <= GRAM_COLUMNS * wanted or side <= SMALL_SIDE):
            reason = f"total rank {columns} is below the shorter side {side}"
            if (found := _by_gram(operator, wanted, accuracy, reason)) is not None:
                return found
            return _by_qr(operator, f"{reason}; the spectrum is too steep for Gram matrices")
    formed = None
    size = wanted + _oversampling(wanted)
    if 2 * size <= side and side > SMALL_SIDE:
        if _is_cheaper_formed(operator, size):
            formed = operator.formed(torch.float32)
        found = _by_subspace(operator, wanted, accuracy, start, formed, notes)
        if found is not None:
            return found
    if operator.dense is None and columns <= GRAM_SHARE * side:
        if (found := _by_gram(operator, wanted, accuracy, "; ".join(notes))) is not None:
            return found
        return _by_qr(operator, "; ".join(notes))
    if 4 * wanted <= 3 * side:
        reason = "; ".join(notes) or f"the shorter side {side} is small"
        if (found := _by_dense_gram(operator, wanted, accuracy, reason, formed)) is not None:
            return found
        notes.append("the spectrum is too steep for a Gram matrix")
    return _by_dense_svd(operator, "; ".join(notes) or f"{wanted} of {side} directions are asked for")


def _by_qr(operator: Operator, reason: str) -> tuple[Triple, Certificate]:
    """Decompose through QR of both stacks: exact to float64, small singular values included."""
    left, right = operator.stacked()
    Q1, R1 = torch.linalg.qr(left)
    Q2, R2 = torch.linalg.qr(right.T)
    U, S, Vh = thin_svd(R1 @ R2.T)
    rounding = _double_rounding(operator)
    return (Q1 @ U, S, Vh @ Q2.T), Certificate("qr", reason, float(S.norm()), 0.0, 0.0, rounding)


def _by_gram(operator: Operator, k: int, accuracy: Accuracy, reason: str) -> tuple[Triple, Certificate] | None:
    """Decompose through float64 Gram matrices of both stacks; None where their precision does not do.

    With ``L^T L = C1 C1^T`` and ``R R^T = C2 C2^T`` the singular values of ``L R`` are those of ``C1^T C2``. Its right
    singular vectors ``W`` give ``U S = L C2 W`` and ``Vh = W^T C2^-1 R``; nothing is divided by a singular value but
    the columns of ``U S``.
    """
    left, right = operator.stacked()
    lengths = right.norm(dim=1).clamp_min(1e-300)
    right /= lengths[:, None]
    left *= lengths
    G1, G2 = _gram(left), _gram(right.T)
    C1, C2 = _cholesky(G1), _cholesky(G2)
    if C1 is None or C2 is None:
        return None
    core = C1.T @ C2
    theta, W = torch.linalg.eigh(core.T @ core)
    theta, W = theta.flip(0).clamp_min(0), W.flip(1)[:, :k]
    total, largest = float(theta.sum()), float(theta[0])
    tail2 = float(theta[k:].sum())
    columns = operator.columns
    # What the Gram matrices and the eigenvalue solver may have got wrong in the k leading eigenvalues together.
    spread = float(torch.linalg.matrix_norm(G1)) * float(torch.linalg.matrix_norm(G2))
    missed = 64 * torch.finfo(torch.float64).eps * sqrt(k) * (spread + sqrt(columns) * largest)
    verdict = _verdict(missed, tail2, total, accuracy)
    S = theta[:k].sqrt()
    if verdict is None or float(S[-1]) <= 10 * STEEP * float(S[0]):
        return None
    US = left @ (C2 @ W)
    V = torch.linalg.solve_triangular(C2.T, W, upper=True).T @ right
    U = US / S
    off = max(float((U.T @ U - torch.eye(k).to(U)).abs().max()), float((V @ V.T - torch.eye(k).to(V)).abs().max()))
    if off > 1e-9:
        return None
    excess, rounding = verdict
    return (U, S, V), Certificate("gram", reason, sqrt(total), sqrt(tail2), excess, rounding)


def _by_subspace(
    operator: Operator, k: int, accuracy: Accuracy, start: Tensor | None, formed: Operator | None, notes: list[str]
) -> tuple[Triple, Certificate] | None:
    """Decompose by block iteration with the certificate of the module's docstring; None where it is not met."""
    m, n = operator.out_features, operator.in_features
    # Multiplied out, the sum has errors of float32, which only the sum itself can mend.
    exact, operator = operator, formed or operator
    reason = f"{k} of {min(m, n)} directions, {'multiplied out once' if formed else 'never multiplied out'}"
    known = _known_directions(operator, k, start)
    generator = _stream(operator, known)
    first = _first_block(operator, k, known, generator)
    probes = torch.randn(m, NUM_PROBES, generator=generator, dtype=torch.float64).to(operator.device)
    scale2, dtype, products, before, edge2 = exact.scale**2, torch.float32, 1, inf, 0.0
    left, _ = _orthonormal(operator.apply(first.to(dtype)))
    previous: Tensor | None = None
    probed: Tensor | None = None
    while True:
        columns = left if probed is not None else torch.cat([left, probes], 1)
        images = operator.apply_transposed(columns.to(dtype)).to(torch.float64)
        Z, probed = images[:, : left.shape[1]], images[:, left.shape[1] :] if probed is None else probed
        theta, rotation, (basis, mixture) = _ritz(Z, _gram(Z))
        rounding2 = (8 * torch.finfo(dtype).eps) ** 2 * (scale2 + float(theta.sum()))
        if float(theta[0]) <= rounding2:
            notes.append("the sum cancels to nothing but rounding")
            return None
        left, right = left @ rotation, basis @ mixture
        rest = _Remainder(operator, dtype, k, theta, left, right, rounding2)
        image = rest.examine(probes, probed)
        products += 2
        lost = _lost_to_rounding(theta, k, rounding2)
        verdict = rest.verdict(lost, accuracy)
        if verdict is not None:
            break
        hoped, allowed = rest.hoped(), rest.allowed(accuracy)
        is_stuck = hoped > 0.5 * before
        is_too_coarse = max(lost, rounding2) > allowed and (is_stuck or hoped <= max(10 * rounding2, allowed))
        if dtype == torch.float32 and is_too_coarse:
            dtype, operator, probed, hoped = torch.float64, exact, None, inf
            reason += f", in float64 after {products} products that left too few digits"
        elif is_stuck or products >= MOST_PRODUCTS:
            notes.append(f"no gap after direction {k} that {products} products with the sum could use")
            return None
        before = hoped
        if products <= FILTERED_FROM:
            # The edge of what is unwanted is known better than before, so the polynomial begins anew.
            edge2, previous = max(float(theta[-1]), 1e-30 * float(theta[0])), None
        following = image * (2 * theta.sqrt() / edge2) - left
        following = following if previous is None else 2 * following - previous @ rotation
        following, upper = _orthonormal(following)
        previous = torch.linalg.solve_triangular(upper, left, upper=True, left=False)
        left = following
    excess, rounding = verdict
    theta, rotation, (basis, mixture) = _ritz(image, _gram(image))
    S = theta.sqrt()
    kept = min(k, int((S > S[0] * torch.finfo(dtype).eps).sum()))
    triple = (basis @ mixture[:, :kept], S[:kept], (right @ rotation[:, :kept]).T)
    reason = f"{reason}; {products} products with it"
    return triple, Certificate("subspace", reason, sqrt(rest.total), rest.tail, excess, rounding, FAILURE_PROBABILITY)


class _Remainder:
    """``P_d``: what the leading Ritz vectors of a block leave of ``P``, and what that says of the answer.

    Attributes:
        kept: Number of vectors taken away, at least ``k``.
        eta: Upper bound of the squared spectral norm of ``P_d``.
        energy: Estimate of its squared Frobenius norm.
        coupling: Squared Frobenius norm of ``E = P_d V``.
    """

    def __init__(
        self,
        operator: Operator,
        dtype: torch.dtype,
        k: int,
        theta: Tensor,
        left: Tensor,
        right: Tensor,
        rounding2: float,
    ) -> None:
        """Take ``theta`` squared Ritz values, descending, with all left and right vectors; ``P^T left = right s``."""
        self._operator, self._dtype, self._k, self._rounding2 = operator, dtype, k, rounding2
        self._theta, self._right = theta, right
        self.kept = _cut(theta, k)
        self._left = left[:, : self.kept]
        # P^T U, from which what U takes of any image is known without a product.
        self._taken = right[:, : self.kept] * theta[: self.kept].sqrt()
        self._num_factors, self._log_scale = 0, 0.0
        self._block = left[:, :0]
        self._least, self._gain, self.eta, self.energy, self.coupling = 0.0, 0.0, inf, 0.0, 0.0

    def examine(self, probes: Tensor, probed: Tensor) -> Tensor:
        """Return ``P`` times all right vectors, having bounded norm, energy and coupling on the way.

        Args:
            probes: ``G``.
            probed: ``P^T G``.
        """
        self._multiplied(probed - self._taken @ (self._left.T @ probes))
        self.energy = float(self._block.square().sum()) * exp(self._log_scale) / probes.shape[1]
        columns = torch.cat([self._right, self._block], 1).to(self._dtype)
        images = self._operator.apply(columns).to(torch.float64)
        image, narrow = images[:, : self._right.shape[1]], images[:, self._right.shape[1] :]
        E = image[:, : self.kept]
        E = E - self._left @ (self._left.T @ E)
        inner = _gram(E)
        self.coupling, self._gain = float(inner.trace()), float(inner.diagonal()[: self._k].sum())
        self._least = float(torch.linalg.eigvalsh(inner)[-1])
        self._multiplied(narrow - self._left @ (self._left.T @ narrow))
        return image

    @property
    def total(self) -> float:
        """Estimate of the energy of ``P``."""
        return float(self._theta[: self.kept].sum()) + self.energy

    @property
    def tail(self) -> float:
        """Estimate of the norm of what the answer leaves out, which has what is in ``E`` on top of the Ritz values."""
        return sqrt(max(0.0, float(self._theta[self._k : self.kept].sum()) + self.energy - self._gain))

    def verdict(self, lost: float, accuracy: Accuracy) -> tuple[float, float] | None:
        """Return excess and rounding as ``_verdict`` does, after as many products with ``G`` as are worth it."""
        while True:
            missed, beyond = self._missed(self.eta)
            low, high = self._energy_bounds()
            best2 = float(self._theta[self._k : self.kept].sum()) + low - 2 * self._rounding2 - beyond
            missed = min(missed, high) + lost
            found = _verdict(missed, max(0.0, best2) + missed, self.total, accuracy)
            allowed = self.allowed(accuracy)
            is_hopeless = lost > allowed or self.hoped() > 0.5 * allowed
            if found is not None or is_hopeless or self._num_factors >= MOST_FACTORS:
                return found
            self._multiply()

    def hoped(self) -> float:
        """Return what would be missed if ``eta`` were as small as it may be, judging by Ritz values and ``E``."""
        following = float(self._theta[self.kept]) if self.kept < self._theta.shape[0] else 0.0
        return self._missed(min(self.eta, max(1.1 * following, self._least)))[0]

    def allowed(self, accuracy: Accuracy) -> float:
        """Return about how much may be missed for a verdict."""
        share = (1 + TOLERANCE[accuracy]) ** 2 - 1
        best2 = float(self._theta[self._k : self.kept].sum()) + self._energy_bounds()[0] - 2 * self._rounding2
        return max(share * best2, FLOOR[accuracy] ** 2 * self.total)

    def _missed(self, eta: float) -> tuple[float, float]:
        """Return the bound of what the answer misses, and that of what the leading Ritz values miss."""
        values = self._theta[: self._k]
        values = values[values > eta]
        numbers = torch.arange(values.shape[0] + 1, dtype=torch.float64, device=values.device)
        others = (self._k - numbers) * eta
        shares = torch.nn.functional.pad(values / (values - eta).square() * self.coupling, (1, 0))
        factors = torch.nn.functional.pad(values, (1, 0))
        bounds = eta * shares + others
        best = int(bounds.argmin())
        return float(bounds[best]), float((factors * shares + others)[best])

    def _energy_bounds(self) -> tuple[float, float]:
        """Return what the energy of ``P_d`` lies between: no direction of it carries more than ``eta``."""
        x = -log(FAILURE_PROBABILITY / NUM_LOOKS)
        spread = sqrt(self.eta * x / NUM_PROBES)
        low = max(0.0, sqrt(max(0.0, self.energy - spread**2)) - spread) ** 2
        worst = self.energy * NUM_PROBES / (NUM_PROBES + 2 * sqrt(NUM_PROBES * x) + 2 * x)
        return max(low, worst), (spread + sqrt(spread**2 + self.energy)) ** 2

    def _multiply(self) -> None:
        """Multiply ``G`` with one more factor."""
        block = self._block.to(self._dtype)
        if self._num_factors % 2:
            image = self._operator.apply(block).to(torch.float64)
            self._multiplied(image - self._left @ (self._left.T @ image))
        else:
            image = self._operator.apply_transposed(block).to(torch.float64)
            self._multiplied(image - self._taken @ (self._left.T @ self._block))

    def _multiplied(self, block: Tensor) -> None:
        """Take the next product and bound the norm with it."""
        self._num_factors += 1
        size = float(torch.linalg.eigvalsh(_gram(block))[-1])
        self._log_scale += log(max(size, 1e-300))
        self._block = block / sqrt(max(size, 1e-300))
        chi2 = _least_chi2(block.shape[1], FAILURE_PROBABILITY / NUM_LOOKS)
        bound = exp((self._log_scale - log(chi2)) / self._num_factors)
        self.eta = min(self.eta, (sqrt(bound) + sqrt(self._rounding2)) ** 2)


def _cut(theta: Tensor, k: int) -> int:
    """Return after which Ritz value, the ``k``-th or a later one, to cut.

    What follows should be far below the ``k``-th, and what comes before well known: far above the end of the block.
    """
    here = float(theta[k - 1])
    best, least = k, inf
    unknown = (theta[-1] / theta.clamp_min(1e-300)).square().cumsum(0).tolist()
    for kept, following in enumerate(theta[k:].tolist(), start=k):
        if here > 1.1 * following:
            cost = (here / (here - 1.1 * following)) ** 2 * unknown[kept - 1]
            best, least = (kept, cost) if cost < least else (best, least)
    return best


def _by_dense_gram(
    operator: Operator, k: int, accuracy: Accuracy, reason: str, formed: Operator | None
) -> tuple[Triple, Certificate] | None:
    """Decompose through the float64 Gram matrix of the shorter side; None where its precision does not do.

    For ``fast`` the sum is multiplied out in float32 first, in float64 where that turns out to be too coarse.
    """
    m, n = operator.out_features, operator.in_features
    eps, scale2 = torch.finfo(torch.float64).eps, operator.scale**2
    for dtype in (torch.float32, torch.float64) if operator.terms and accuracy == "fast" else (torch.float64,):
        if formed is None or dtype == torch.float64:
            formed = operator.formed(dtype)
        assert formed.dense is not None
        rounding2 = (8 * torch.finfo(dtype).eps) ** 2 * scale2
        W = formed.dense.to(torch.float64)
        W = W.T if m < n else W
        theta, V = _top_eigenvectors(_gram(W), k + 1)
        total = float(torch.linalg.vector_norm(W)) ** 2
        theta = theta.clamp_min(0)
        missed = 16 * eps * (sqrt(k) + sqrt(min(m, n))) * total + _lost_to_rounding(theta, k, rounding2)
        theta, V = theta[:k], V[:, :k]
        tail2 = max(0.0, total - float(theta.sum()))
        verdict = _verdict(missed, tail2, total, accuracy)
        if verdict is not None and float(theta[-1]) > (10 * STEEP) ** 2 * float(theta[0]):
            S = theta.sqrt()
            other = W @ (V / S)
            off = float((other.T @ other - torch.eye(k).to(other)).abs().max())
            if off <= 1e-9:
                U, Vh = (V, other.T) if m < n else (other, V.T)
                excess, rounding = verdict
                return (U, S, Vh), Certificate("dense_gram", reason, sqrt(total), sqrt(tail2), excess, rounding)
    return None


def _by_dense_svd(operator: Operator, reason: str) -> tuple[Triple, Certificate]:
    """Decompose the sum, multiplied out in float64."""
    dense = operator.formed(torch.float64).dense
    assert dense is not None
    U, S, Vh = thin_svd(dense)
    return (U, S, Vh), Certificate("dense_svd", reason, float(S.norm()), 0.0, 0.0, _double_rounding(operator))


def thin_svd(matrix: Tensor) -> Triple:
    """Return the thin SVD of a finite matrix, by a second way where LAPACK's iteration does not converge.

    With ``matrix = Q R`` the second way decomposes ``R^T``, scaled to norm 1: the same singular values, to the same
    digits, from other numbers to iterate on.

    Raises:
        DecompositionError: If neither converges.
    """
    try:
        return tuple(torch.linalg.svd(matrix, full_matrices=False))
    except torch.linalg.LinAlgError:
        norm = matrix.norm()
    Q, R = torch.linalg.qr(matrix / norm)
    try:
        U, S, Vh = torch.linalg.svd(R.T, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(
            f"a sum of products must have a singular value decomposition; the one of shape {tuple(matrix.shape)} and "
            f"norm {float(norm):.3g} did not converge in two attempts, look for a client whose update is out of scale "
            f"({error})"
        ) from error
    return Q @ Vh.T, S * norm, U.T


def _tamed(operator: Operator) -> tuple[Operator, float]:
    """Return the operator over a power of two, and that power: neither float32 nor a square overflows or vanishes.

    It is the operator itself, over 1, unless weights or factors are of sizes that no training arrives at.
    """
    unit = 1.0 if _is_moderate(operator.magnitude) else ldexp(1.0, frexp(operator.magnitude)[1] - 1)
    if unit == 1.0 and all(_is_tame(term) for term in operator.terms):
        return operator, 1.0
    terms: list[Term] = []
    for term in operator.terms:
        lengths = torch.where(term.right_sizes > 0, term.right_sizes, 1.0)
        left = term.left.double() * (lengths * (term.coefficient / unit)).to(term.left.device)
        right = term.right.double() / lengths[:, None].to(term.right.device)
        terms.append(Term(left, right, 1.0, term.sizes / unit, term.right_sizes / lengths))
    dense = None if operator.dense is None else operator.dense / unit
    return replace(operator, terms=terms, dense=dense, magnitude=operator.magnitude / unit), unit


def _is_tame(term: Term) -> bool:
    sizes = term.right_sizes[term.right_sizes > 0].tolist()
    return all(_is_moderate(size) for size in (abs(term.coefficient), *sizes))


def _is_moderate(size: float) -> bool:
    return size == 0 or 1 / MODERATE <= size <= MODERATE


def _double_rounding(operator: Operator) -> float:
    longer = max(operator.out_features, operator.in_features)
    return 4 * torch.finfo(torch.float64).eps * sqrt(longer) * operator.magnitude


def _verdict(missed: float, tail2: float, total: float, accuracy: Accuracy) -> tuple[float, float] | None:
    """Return excess and rounding of an answer that misses at most ``missed`` of the best energy; None if too much.

    Args:
        missed: Upper bound of the best captured energy minus the captured one.
        tail2: Lower bound of the energy that the answer discards.
        total: Energy of the whole.
        accuracy: What is asked for.
    """
    best = tail2 - missed
    if best > 0:
        excess = sqrt(1 + missed / best) - 1
        if excess <= TOLERANCE[accuracy]:
            return excess, 0.0
    if sqrt(missed) <= FLOOR[accuracy] * sqrt(total):
        return 0.0, sqrt(missed)
    return None


def _lost_to_rounding(theta: Tensor, k: int, rounding2: float) -> float:
    """Return what picking ``k`` of the singular vectors of ``P + E`` instead of ``P`` can cost in captured energy.

    With a gap after ``k`` that ``E`` cannot close, mixing across it costs at most ``sum |E_ij|^2 sigma_i^2 / (sigma_i^2
    - sigma_j^2)`` and the factors' own errors ``|E|^2``; without one, directions change places whose values are as near
    as ``E`` is large.

    Args:
        theta: Squared singular values, descending, as far as they are known.
        k: Number picked.
        rounding2: ``|E|^2``, Frobenius norm.
    """
    here = float(theta[k - 1])
    following = float(theta[k]) if k < theta.shape[0] else 0.0
    size = sqrt(rounding2)
    linear = rounding2 + 4 * k * sqrt(here) * size
    if sqrt(here) - sqrt(following) <= 4 * size:
        return linear
    return min(linear, rounding2 * (1 + 8 * here / (here - following)))


def _ritz(Z: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the squared singular values of ``Z``, descending, its right singular vectors, and the left ones.

    The latter as two matrices whose product they are. ``inner`` is ``Z^T Z``, in whose eigenvalues small values have
    lost their digits, so where there are any, ``Z`` itself is decomposed.
    """
    theta, rotation = torch.linalg.eigh(inner)
    theta, rotation = theta.flip(0).clamp_min(0), rotation.flip(1)
    if float(theta[-1]) > STEEP * float(theta[0]):
        return theta, rotation, (Z, rotation / theta.sqrt())
    basis, upper = _orthonormal(Z, inner)
    mixture, S, rotation = thin_svd(upper)
    return S.square(), rotation.T, (basis, mixture)


def _least_chi2(b: int, chance: float) -> float:
    """Return a value that a chi-squared variable with ``b`` degrees of freedom falls below with at most ``chance``.

    From ``P(chi2_b < x) <= (x / 2)^(b / 2) / Gamma(b / 2 + 1)``.
    """
    return 2 * exp(2 / b * (log(chance) + lgamma(b / 2 + 1)))


def _known_directions(operator: Operator, k: int, start: Tensor | None) -> Tensor:
    """Return at most ``k`` of the columns to begin from, float32, largest entry 1; what is not finite counts as 0."""
    if start is None:
        if not operator.terms:
            return torch.zeros(operator.in_features, 0, device=operator.device)
        start = operator.mean_rows(k)
    known = torch.nan_to_num(start[:, :k].to(operator.device, torch.float64), 0.0, 0.0, 0.0)
    return (known / known.abs().amax(0).clamp_min(1e-300)).to(torch.float32)


def _stream(operator: Operator, known: Tensor) -> torch.Generator:
    """Return random numbers that do not depend on ``known``, the same for the same ``known``.

    From a fixed seed they would: last round's directions were found with the very block that is to judge them now. And
    nobody who knows only a part of the sum can tell what they will be.
    """
    of_sum = crc32(operator.sizes.cpu().numpy().tobytes())
    return torch.Generator().manual_seed(crc32(known.cpu().contiguous().numpy().tobytes(), of_sum))


def _first_block(operator: Operator, k: int, known: Tensor, generator: torch.Generator) -> Tensor:
    """Return the block to begin with: ``k`` columns from what is known, then independent normal ones."""
    n = operator.in_features
    missing = k - known.shape[1]
    parts = [known]
    if missing:
        parts.append(torch.randn(n, missing, generator=generator).to(operator.device))
    parts.append(torch.randn(n, _oversampling(k), generator=generator).to(operator.device))
    return torch.cat(parts, 1)


def _oversampling(k: int) -> int:
    """Return the number of columns beyond ``k``: with more of them fewer products with the sum are needed."""
    return max(LEAST_OVERSAMPLING, k // OVERSAMPLED)


def _is_cheaper_formed(operator: Operator, size: int) -> bool:
    """Return whether multiplying the sum out pays for block products with it."""
    m, n, columns, products = operator.out_features, operator.in_features, operator.columns, 4
    if not columns:
        return True
    return columns * m * n + products * m * n * size < products * columns * (m + n) * size


def _orthonormal(Y: Tensor, inner: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``Q`` (float64) with orthonormal columns and an upper triangular ``R`` with ``Y = Q R``.

    By Cholesky of the float64 Gram matrix, twice where the columns are far from orthogonal, by Householder where they
    are nearly dependent.
    """
    Y = Y.to(torch.float64)
    inner = _gram(Y) if inner is None else inner
    lengths = inner.diagonal().sqrt().clamp_min(1e-300)
    upper, info = torch.linalg.cholesky_ex(inner / (lengths[:, None] * lengths), upper=True)
    least = float(upper.diagonal().min()) if int(info) == 0 else 0.0
    if least > 1e-7:
        upper = upper * lengths
        Q = torch.linalg.solve_triangular(upper, Y, upper=True, left=False)
        if least > 1e-2:
            return Q, upper
        again, info = torch.linalg.cholesky_ex(_gram(Q), upper=True)
        if int(info) == 0:
            return torch.linalg.solve_triangular(again, Q, upper=True, left=False), again @ upper
    Q, upper = torch.linalg.qr(Y)
    # A column that is nothing but rounding must not look like a captured direction: it bounds nothing.
    smallest = 1e-300 + 1e-16 * float(upper.diagonal().abs().max())
    diagonal = upper.diagonal()
    diagonal.copy_(torch.where(diagonal.abs() < smallest, torch.full_like(diagonal, smallest), diagonal))
    return Q, upper


def _gram(X: Tensor) -> Tensor:
    """Return ``X.T @ X``, the lower part mirrored from the upper one, which alone is computed."""
    size, step = X.shape[1], 128
    result = torch.empty(size, size, dtype=X.dtype, device=X.device)
    for start in range(0, size, step):
        stop = min(size, start + step)
        result[start:stop, start:] = X[:, start:stop].T @ X[:, start:]
        result[stop:, start:stop] = result[start:stop, stop:].T
    return result


def _cholesky(gram: Tensor) -> Tensor | None:
    """Return the lower factor of a Gram matrix that may be singular, with jitter at the level of its rounding."""
    lengths = gram.diagonal().sqrt()
    if not bool((lengths > 0).all()):
        return None
    scaled = gram / (lengths[:, None] * lengths)
    scaled.diagonal().add_(1e-14)
    lower, info = torch.linalg.cholesky_ex(scaled)
    return lower * lengths[:, None] if int(info) == 0 else None


def _top_eigenvectors(gram: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest eigenvalues, descending, and their vectors."""
    size = gram.shape[0]
    if gram.device.type == "cpu" and 4 * k < size:
        values, vectors = eigh(gram.numpy(), subset_by_index=[size - k, size - 1], driver="evr", check_finite=False)
        # Of many equal eigenvalues LAPACK's selection has been seen to find fewer than it was asked for.
        if len(values) == k:
            return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1).contiguous()
    theta, V = torch.linalg.eigh(gram)
    return theta.flip(0)[:k], V.flip(1)[:, :k].contiguous()
