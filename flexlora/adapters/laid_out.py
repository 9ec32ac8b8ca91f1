"""Gives the modules of an adapter one rank and one integer ``lora_alpha`` without changing what they compute.

PEFT alone reads ``alpha_pattern``, and few readers ``rank_pattern``: converters know one ``lora_alpha``, servers one
rank, and PEFT's own hotswap matches patterns with other names than loading does. So what is written rests on neither:
one whole ``lora_alpha`` serves all modules, the rest of a scaling goes evenly into both factors, and smaller ranks are
padded with fresh rows of ``A`` and zero columns of ``B``, which change nothing and can still be trained.
"""

import math
from collections.abc import Mapping
from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.adapters.rank_layout import common_rank
from flexlora.lora.factors import LoraFactors

LARGEST_ALPHA = 2**32 - 1
"""Ollama decodes ``lora_alpha`` as an unsigned integer of 32 bits."""


def common_alpha(adapter: Mapping[str, LoraFactors], stored: Mapping[str, int]) -> int:
    """Return the ``lora_alpha`` of a configuration: what all modules have as it is, or else its ``r``.

    Args:
        stored: Module path -> the rank to write.
    """
    alphas = {_whole_alpha(factors) for factors in adapter.values()}
    is_padded = any(factors.rank != stored[path] for path, factors in adapter.items())
    alpha = alphas.pop() if len(alphas) == 1 else None
    return common_rank(stored) if alpha is None or is_padded else alpha


def _whole_alpha(factors: LoraFactors) -> int | None:
    """Return the alpha that divided by the rank is the scaling, None where no whole number in range is."""
    alpha = factors.scaling * factors.rank
    if not math.isfinite(alpha) or not 1 <= round(alpha) <= LARGEST_ALPHA:
        return None
    return round(alpha) if round(alpha) / factors.rank == factors.scaling else None


def laid_out(path: str, factors: LoraFactors, rank: int, lora_alpha: int) -> LoraFactors:
    """Return the same change with ``rank`` directions and the scaling ``lora_alpha / rank``.

    Factors are scaled in float64, those that stay as they are keep their type.
    """
    if rank > factors.rank:
        factors = factors.extend(fresh_rows(path, rank - factors.rank, factors.A.shape[1]))
    return factors.with_balanced_scaling(lora_alpha / rank)


def fresh_rows(path: str, num_rows: int, in_features: int) -> Float[Tensor, "num_rows in_features"]:
    """Return rows of ``A`` to train from, as PEFT draws them (``kaiming_uniform_``), always the same for a path."""
    seed = int.from_bytes(blake2b(path.encode(), digest_size=7).digest(), "big")
    rows = torch.rand(num_rows, in_features, generator=torch.Generator().manual_seed(seed))
    return (2 * rows - 1) / math.sqrt(in_features)
