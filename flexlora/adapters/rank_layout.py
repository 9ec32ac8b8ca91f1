"""Gives the modules of an adapter one rank and one integer ``lora_alpha`` without changing what they compute.

PEFT alone reads ``alpha_pattern``, and few readers ``rank_pattern``: converters know one ``lora_alpha``, servers one
rank, and PEFT's own hotswap matches patterns with other names than loading does. So what is written rests on neither:
one whole ``lora_alpha`` serves all modules, the rest of a scaling goes evenly into both factors, and smaller ranks are
padded with fresh rows of ``A`` and zero columns of ``B``, which change nothing and can still be trained.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.adapters.peft_format import AdapterError, is_expert
from flexlora.adapters.peft_settings import whole_number
from flexlora.lora.factors import LoraFactors

Ranks = Literal["uniform", "exact"]
"""One rank for all modules, or every module its own, which needs ``rank_pattern``."""


SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for (``max_lora_rank``)."""


LARGEST_ALPHA = 2**32 - 1
"""Ollama decodes ``lora_alpha`` as an unsigned integer of 32 bits."""


@dataclass(frozen=True)
class RankLayout:
    """How ranks are laid out in a folder.

    Attributes:
        ranks: ``uniform`` pads all modules to one rank; ``exact`` keeps the rank of each, but for experts, which all
            get the largest of theirs.
        pad_to: The one rank, a whole number of any type, of ``SERVED_RANKS``; None is the largest that a module has.

    Raises:
        AdapterError: If a value is not allowed, or ``pad_to`` is set for ``exact``.
    """

    ranks: Ranks = "uniform"
    pad_to: int | None = None

    def __post_init__(self) -> None:
        if self.ranks not in ("uniform", "exact"):
            raise AdapterError(f"ranks must be uniform or exact; got {self.ranks!r}")
        if self.pad_to is None:
            return
        rank = whole_number(self.pad_to)
        if rank not in SERVED_RANKS:
            allowed = ", ".join(str(rank) for rank in SERVED_RANKS)
            raise AdapterError(f"pad_to must be a rank that vLLM makes room for, one of {allowed}; got {self.pad_to!r}")
        object.__setattr__(self, "pad_to", rank)  # JSON takes no number of numpy
        if self.ranks == "exact":
            raise AdapterError(f"pad_to gives all modules one rank, ranks=exact each its own; got both ({self.pad_to})")

    def stored(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Return module path -> the rank to write, never below the module's own.

        Raises:
            AdapterError: If a module has a larger rank than ``pad_to``.
        """
        if self.ranks == "exact":
            return equal_expert_ranks(ranks)
        largest = max(ranks.values())
        if self.pad_to is not None and self.pad_to < largest:
            fitting = next((rank for rank in SERVED_RANKS if rank >= largest), None)
            larger = f"pad to {fitting}, or " if fitting else ""
            raise AdapterError(
                f"pad_to must be at least {largest}, the largest rank of a module; got {self.pad_to}: {larger}ask for "
                f"rank {self.pad_to} too"
            )
        return dict.fromkeys(ranks, self.pad_to or largest)


def equal_expert_ranks(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks with the largest rank of all experts for every expert.

    Stock PEFT stacks the factors of experts that transformers fuses, and knows one rank for all layers of them.
    """
    largest = max((rank for path, rank in ranks.items() if is_expert(path)), default=0)
    return {path: largest if is_expert(path) else rank for path, rank in ranks.items()}


def common_rank(ranks: Mapping[str, int]) -> int:
    """Return the ``r`` of a configuration: the rank of the experts, or else the most common, of these the largest."""
    # No pattern reaches experts that transformers fuses: stock PEFT gives them ``r``.
    deciding = [rank for path, rank in ranks.items() if is_expert(path)] or list(ranks.values())
    counts = Counter(deciding)
    return max(counts, key=lambda rank: (counts[rank], rank))


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
