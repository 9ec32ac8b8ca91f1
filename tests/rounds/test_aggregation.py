"""What clients keep of a round depends on whether it counted."""

import pytest
import torch

from flexlora.rounds.aggregation import AggregatedRound


@pytest.mark.parametrize("note", [None, "the state was kept"])
def test_what_rounding_lost_is_kept_only_if_the_update_is_in_the_state(note: str | None) -> None:
    own = {"m": torch.ones(2)}
    kept = {"a": {**own, "residual/m.A": torch.ones(1)}, "b": {"residual/m.A": torch.ones(1)}}
    came = AggregatedRound("state", note, [], kept)
    assert came.kept_by_clients == (kept if note is None else {"a": own})
