"""Orders for engines, with the little that most tests care about."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from flexlora.engines.base import Parcel, RoundOrder
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast


@pytest.fixture(scope="session")
def order_of() -> Callable[..., RoundOrder]:
    """Returns a maker of orders for a round, a cohort and its broadcasts."""

    def make(
        server_round: int, cohort: Sequence[ClientSpec], broadcasts: Mapping[RankPlan, Broadcast], **changes: Any
    ) -> RoundOrder:
        fields = {"seed": 11, "learning_rate": 0.01 / server_round, "wire_dtype": "float32", "uplink": (), **changes}
        parcels = {plan: Parcel(broadcast, fields["wire_dtype"]) for plan, broadcast in broadcasts.items()}
        return RoundOrder(server_round=server_round, cohort=cohort, parcels=parcels, **fields)

    return make
