"""Makes what server and client can both make, so that it need not travel: known rows of ``A``, masks of ``B``.

Every module draws from its own stream, so that leaving one out changes no other, and a smaller rank has the first rows
of a larger one.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import SparseMask
from flexlora.federation.streams import stream_seed


class MaskError(FlexLoraError, ValueError):
    """A mask that chooses nothing or more than everything."""


def known_rows(
    known_A: int | Literal["identity"], module: str, rank: int, in_features: int
) -> Float[Tensor, "rank in_features"]:
    """Return the first ``rank`` rows of the ``A`` that this seed or name stands for, float32, on the CPU.

    For a seed these are the rows of PEFT's initial ``A``, Kaiming-uniform with slope sqrt(5): what
    ``AdaptedModel.initial_adapter`` draws from the same seed.

    Args:
        known_A: A seed, or ``identity``.
        module: Path in the base model.
        rank: For ``identity``, rows beyond ``in_features`` are zero.
        in_features: Of the module.
    """
    if known_A == "identity":
        return torch.eye(rank, in_features)
    generator = torch.Generator().manual_seed(stream_seed(known_A, "initial_adapter", module))
    return nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5), generator=generator)


def mask_of(mask: SparseMask, module: str, shape: tuple[int, int]) -> Bool[Tensor, "out_features rank"]:
    """Return which entries of the module's ``B`` the mask chooses: exactly ``num_chosen``, each as likely as any other.

    Args:
        mask: What everybody draws from.
        module: Path in the base model.
        shape: Of ``B``.

    Raises:
        MaskError: If the density is not above 0 and at most 1.
    """
    generator = torch.Generator().manual_seed(stream_seed(mask.seed, "sparse_mask", module))
    chosen = torch.zeros(math.prod(shape), dtype=torch.bool)
    chosen[torch.randperm(chosen.numel(), generator=generator)[: num_chosen(mask, shape)]] = True
    return chosen.view(shape)


def num_chosen(mask: SparseMask, shape: tuple[int, int]) -> int:
    """Return how many entries of a ``B`` of this shape the mask chooses: its density, rounded, and at least one.

    Raises:
        MaskError: If the density is not above 0 and at most 1.
    """
    if not 0 < mask.density <= 1:
        raise MaskError(f"the density of a mask must be above 0 and at most 1; got {mask.density}")
    return max(1, round(mask.density * math.prod(shape)))
