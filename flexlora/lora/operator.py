"""Multiplies blocks of vectors with a sum of products without ever forming it."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import frexp, ldexp, sqrt

import torch
from torch import Tensor

BLOCK_BYTES = 64 * 2**20
STACK_BYTES = 256 * 2**20
"""Size of both stacks of the small terms up to which they are copied together once instead of once per product."""
DIRECT_COLUMNS = 128
"""Columns from which on a term is multiplied as it lies."""
MODERATE = 1e10
"""Largest size, and inverse of the smallest, of what float32 is trusted with."""


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

        What is yielded must not be changed, and is good until the next block. All terms are gathered once for all
        products while they fit into ``STACK_BYTES``. Otherwise large ones are taken as they lie, and small ones
        gathered once if they fit, or else each time anew in buffers.
        """
        row_bytes = dtype.itemsize * (self.out_features + self.in_features)
        are_few = row_bytes * self.columns <= STACK_BYTES and len(self.terms) > 1
        small: list[Term] = []
        for term in self.terms:
            is_other = term.left.dtype != dtype or term.left.device != self.device
            if are_few or is_other or term.columns < DIRECT_COLUMNS:
                small.append(term)
                continue
            factors = torch.full((term.columns,), term.coefficient, dtype=dtype, device=self.device)
            yield term.left, term.right, factors
        columns = sum(term.columns for term in small)
        if not columns:
            return
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

    def forget_copies(self) -> None:
        """Free what was gathered or converted for products; the next one does it anew."""
        self._kept.clear()
        self._dense_in.clear()

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
        # A narrow block is multiplied faster lying down.
        rows = X.T.contiguous()
        for left, right, factors in self.blocks(X.dtype):
            Y.addmm_(left, (rows @ right.T).mul_(factors).T)
        return Y

    def apply_transposed(self, Y: Tensor) -> Tensor:
        """Return ``P.T @ Y`` in the type of ``Y``."""
        rows = Y.T.contiguous()
        X = Y.new_zeros(Y.shape[1], self.in_features)
        if self.dense is not None:
            X.addmm_(rows, self._dense_as(Y.dtype))
        for left, right, factors in self.blocks(Y.dtype):
            X.addmm_((rows @ left).mul_(factors), right)
        return X.T

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

    def mean_columns(self, k: int) -> Tensor:
        """Return at most ``k`` columns: the terms' columns of equal place added up, each times the length of its row.

        The counterpart of ``mean_rows``. They point where ``P`` does without any product with it.
        """
        most = min(k, max(term.columns for term in self.terms))
        total = torch.zeros(self.out_features, k // most, most, dtype=torch.float32, device=self.device)
        for index, term in enumerate(self.terms):
            place = total[:, index % (k // most)]
            weights = (term.right_sizes * term.coefficient).to(place)
            for first in range(0, term.columns, most):
                columns = term.left[:, first : first + most].to(place)
                place[:, : columns.shape[1]].addcmul_(columns, weights[first : first + most])
        return total.flatten(1, 2)


def tamed(operator: Operator) -> tuple[Operator, float]:
    """Return the operator over a power of two, and that power: neither float32 nor a square overflows or vanishes.

    It is the operator itself, over 1, unless weights or factors have sizes that no training reaches.
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
