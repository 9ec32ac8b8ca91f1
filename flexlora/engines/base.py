"""How a cohort gets trained: the protocol that rounds call."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast, ClientFailure, Update


@runtime_checkable
class Engine(Protocol):
    """Trains the clients of a round; a failing client is yielded as a ``ClientFailure``, never raised."""

    def train(
        self, server_round: int, cohort: Sequence[ClientSpec], broadcasts: Mapping[RankPlan, Broadcast]
    ) -> Iterator[Update | ClientFailure]:
        """Yield one outcome per client of ``cohort``, in cohort order."""
        ...
