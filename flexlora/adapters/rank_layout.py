"""Decides which rank each module of an adapter is written at: one for all that every reader understands, or its own.

PEFT alone reads ``rank_pattern``; converters and servers know one rank. Nothing here needs tensors, so that a rank that
cannot be written is refused at once.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flexlora.adapters.peft_format import AdapterError, is_expert
from flexlora.adapters.peft_settings import whole_number

Ranks = Literal["uniform", "exact"]
"""One rank for all modules, or every module its own, which needs ``rank_pattern``."""


SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for (``max_lora_rank``)."""


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
