"""Chooses the ranks to which the factors of clients are padded, so that clients of different ranks share a bank.

On a GPU, a pass through a small base takes as long as launching its kernels; each bank needs launches of its own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import AdapterState

# Smaller factors are padded to this rank wherever the base is on a GPU.
_LEAST_ON_GPU = 16
# Passes through a larger base are bound by arithmetic, and its padded factors would take much memory.
_SMALL_ON_GPU = 500_000_000


@dataclass(frozen=True)
class CommonRanks:
    """Ranks below which no factors are stored.

    Attributes:
        least: For every module.
        trained: Module path -> rank, for factors that are trained.
        frozen: The same for those that are not.
    """

    least: int = 1
    trained: Mapping[str, int] = field(default_factory=dict)
    frozen: Mapping[str, int] = field(default_factory=dict)

    def stored(self, adapter: AdapterState, *, is_trained: bool) -> dict[str, int]:
        """Return the rank at which each module of ``adapter`` is stored: its own, or the common one."""
        common = self.trained if is_trained else self.frozen
        return {path: max(factors.rank, common.get(path, 0), self.least) for path, factors in adapter.items()}


OWN_RANKS = CommonRanks()
"""Every client's factors are stored at its own ranks."""


def common_ranks(device_type: str, num_parameters: int, broadcasts: Iterable[Broadcast]) -> CommonRanks:
    """Return the ranks to which factors are padded.

    Args:
        device_type: ``cpu`` or ``cuda``.
        num_parameters: Size of the base.
        broadcasts: All from which clients start.
    """
    if device_type != "cuda":
        return OWN_RANKS
    if num_parameters > _SMALL_ON_GPU:
        return CommonRanks(_LEAST_ON_GPU)
    branches = [(broadcast.trainable, broadcast.frozen or {}) for broadcast in broadcasts]
    return CommonRanks(
        _LEAST_ON_GPU, _largest(trained for trained, _ in branches), _largest(frozen for _, frozen in branches)
    )


def _largest(adapters: Iterable[AdapterState]) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for adapter in adapters:
        for path, factors in adapter.items():
            ranks[path] = max(ranks.get(path, 0), factors.rank)
    return ranks
