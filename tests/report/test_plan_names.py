"""Rank plans are called after their devices."""

import pytest

from flexlora.report.plan_names import plan_names
from flexlora.rounds.records import ClientRecord, RoundRecord


def sampled(*pairs: tuple[str, str]) -> list[RoundRecord]:
    clients = [
        ClientRecord(client_id=f"{n}", plan=plan, ranks={}, num_examples=1, outcome="ok", device=device)
        for n, (plan, device) in enumerate(pairs)
    ]
    return [RoundRecord(server_round=1, clients=clients)]


def test_the_four_types_are_called_after_the_built_in_devices() -> None:
    names = plan_names(["type1", "type2", "type3", "type4"], [])
    assert list(names.values()) == ["phone", "laptop", "workstation", "server"]
    assert plan_names(["type4"], []) == {"type4": "server"}


def test_types_of_the_users_own_keep_their_names() -> None:
    assert plan_names(["ward", "type1"], []) == {"ward": "ward", "type1": "type1"}


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("type1", "pixel"), ("type2", "tower")], {"type1": "pixel", "type2": "tower"}),
        ([("type1", "b"), ("type1", "a")], {"type1": "a, b", "type2": "type2"}),
        ([("type1", "a"), ("type2", "a")], {"type1": "a (type1)", "type2": "a (type2)"}),
    ],
)
def test_simulated_devices_name_the_plans_that_they_had(pairs: list[tuple[str, str]], expected: dict[str, str]) -> None:
    assert plan_names(["type1", "type2"], sampled(*pairs)) == expected
