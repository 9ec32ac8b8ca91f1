"""Defines a LoRA change: two factors and a scaling, for one module or for all of them."""

# torch.linalg and torch.special carry no type information.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.errors import FlexLoraError

ScalingPolicy = Literal["constant_alpha", "constant_ratio", "rslora"]


class FactorsError(FlexLoraError, ValueError):
    """A rank or scaling that no pair of factors can have."""


@dataclass(frozen=True)
class Scaling:
    """The rule that gives the factor in front of ``B @ A`` for a rank.

    ``constant_alpha``: ``lora_alpha / rank`` (PEFT's default, the paper's choice with 16);
    ``constant_ratio``: ``lora_alpha`` itself at every rank, that is ``alpha_i = lora_alpha * rank_i``;
    ``rslora``: ``lora_alpha / sqrt(rank)`` (arXiv:2312.03732).
    """

    policy: ScalingPolicy
    lora_alpha: float

    def __call__(self, rank: int) -> float:
        """Return the scaling at ``rank`` >= 1."""
        if self.policy == "constant_alpha":
            return self.lora_alpha / rank
        if self.policy == "constant_ratio":
            return self.lora_alpha
        return self.lora_alpha / rank**0.5


@dataclass(frozen=True)
class LoraFactors:
    """The low-rank change ``scaling * B @ A`` of one linear module.

    Nothing outside ``flexlora.lora`` multiplies or divides by ``scaling``.
    """

    A: Float[Tensor, "rank in_features"]
    B: Float[Tensor, "out_features rank"]
    scaling: float

    @property
    def rank(self) -> int:
        """Number of rows of ``A``."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the change, ``(out_features, in_features)``."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Float[Tensor, "out_features in_features"]:
        """Return the dense change ``scaling * B @ A`` in float64."""
        return self.scaling * (self.B.to(torch.float64) @ self.A.to(torch.float64))

    def norm(self) -> float:
        """Return the Frobenius norm of the change without forming it.

        With ``B = Q R`` it is ``|scaling| * ||R A||``; unlike the trace of two Gram matrices, this keeps small norms.
        """
        upper = torch.linalg.qr(self.B.to(torch.float64), mode="r").R
        return abs(self.scaling) * float(torch.linalg.matrix_norm(upper @ self.A.to(torch.float64)))

    def pad(self, rank: int) -> "LoraFactors":
        """Return the same change at a larger ``rank``: zero rows under ``A``, zero columns right of ``B``.

        The scaling stays as it is, so the result is a way to add factors up, not one to train from.
        """
        extra = rank - self.rank
        if extra < 0:
            raise FactorsError(f"padding cannot lower the rank: rank must be at least {self.rank}; got {rank}")
        A = torch.nn.functional.pad(self.A, (0, 0, 0, extra))
        B = torch.nn.functional.pad(self.B, (0, extra))
        return LoraFactors(A, B, self.scaling)

    def extend(self, rows: Float[Tensor, "more in_features"]) -> "LoraFactors":
        """Return the same change with ``rows`` under ``A`` and zero columns right of ``B``.

        Where ``rows`` are not zero, the new directions can be trained.
        """
        A = torch.cat((self.A, rows.to(self.A)))
        return LoraFactors(A, torch.nn.functional.pad(self.B, (0, rows.shape[0])), self.scaling)

    def truncate(self, rank: int) -> "LoraFactors":
        """Return the first ``rank`` rows of ``A`` and columns of ``B`` with the scaling as it is."""
        if not 0 <= rank <= self.rank:
            raise FactorsError(f"rank must be in 0..{self.rank}, the rank of the factors; got {rank}")
        return LoraFactors(self.A[:rank], self.B[:, :rank], self.scaling)

    def with_scaling(self, scaling: float) -> "LoraFactors":
        """Return the same change under another ``scaling``; ``A`` stays, ``B`` takes up the difference."""
        if scaling == 0:
            raise FactorsError("scaling must not be 0, no factors could express the change")
        if scaling == self.scaling:
            return self
        return LoraFactors(self.A, self.B * (self.scaling / scaling), scaling)

    def with_balanced_scaling(self, scaling: float) -> "LoraFactors":
        """Return the same change under another ``scaling`` above 0; both factors take up the difference, in float64.

        A change that is zero for its scaling alone has a zero ``B`` then, so that ``A`` stays one to train from.
        """
        if not scaling > 0:
            raise FactorsError(f"scaling must be above 0; got {scaling}")
        ratio = self.scaling / scaling
        if ratio == 1:
            return LoraFactors(self.A, self.B, scaling)
        if ratio == 0:
            return LoraFactors(self.A, torch.zeros_like(self.B), scaling)
        root = abs(ratio) ** 0.5
        sign = 1 if ratio > 0 else -1
        return LoraFactors(self.A.to(torch.float64) * root, self.B.to(torch.float64) * (sign * root), scaling)

    def with_core(self, core: Float[Tensor, "rank rank"]) -> "LoraFactors":
        """Return the change ``scaling * B @ core @ A`` as two factors; ``A`` stays, ``B`` takes up the core."""
        return LoraFactors(self.A, self.B @ core.to(self.B.dtype), self.scaling)

    def to(self, dtype: torch.dtype) -> "LoraFactors":
        """Return a copy in ``dtype``, stored row by row, detached from any graph and sharing no memory."""
        A, B = (
            factor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format) for factor in (self.A, self.B)
        )
        return LoraFactors(A, B, self.scaling)


AdapterState = Mapping[str, LoraFactors]
"""Module path in the base model (``model.layers.0.self_attn.q_proj``) -> its factors, keys sorted."""
