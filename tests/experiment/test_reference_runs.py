"""Who takes part in reference runs, at which ranks, and which of them a run has."""

from types import SimpleNamespace
from typing import Any

import pytest

from flexlora.experiment.config_file import parse_config
from flexlora.experiment.control_clients import at_largest_ranks, at_smallest_ranks, only_largest
from flexlora.experiment.reference_runs import wanted_runs
from flexlora.experiment.round_loop import cohort_of
from flexlora.federation.clients import ClientSpec, RankPlan

SHAPES = {"q_proj": (4, 4), "up_proj": (8, 4)}
PLANS = {
    "phone": RankPlan("phone", (("", 1),)),
    "laptop": RankPlan("laptop", (("q_proj", 2), ("up_proj", 5))),
    "server": RankPlan("server", (("", 6),)),
    "rack": RankPlan("rack", (("q_proj", 6), ("up_proj", 6))),
}
ALL_ON = {"fedit_reference": True, "fedit_largest_reference": True, "large_alone_reference": True}


def loaded(*plans: str, **tree: Any) -> Any:
    """Return what the functions look at of a run with one client of each of these plans."""
    clients = [ClientSpec(f"{number}", PLANS[plan], 3) for number, plan in enumerate(plans)]
    participants = SimpleNamespace(clients=clients, plans={plan: PLANS[plan] for plan in plans})
    return SimpleNamespace(config=parse_config(tree, "here"), participants=participants, shapes=SHAPES)


def ranks_of(clients: list[ClientSpec]) -> dict[str, tuple[int, ...]]:
    return {client.client_id: tuple(client.plan.resolve(SHAPES).values()) for client in clients}


def test_everybody_can_be_put_at_the_smallest_or_the_largest_ranks() -> None:
    run = loaded("phone", "laptop", "server")
    assert ranks_of(at_smallest_ranks(run)) == {"0": (1, 1), "1": (1, 1), "2": (1, 1)}
    assert ranks_of(at_largest_ranks(run)) == {"0": (6, 6), "1": (6, 6), "2": (6, 6)}


def test_large_clients_are_those_with_the_largest_ranks_whatever_their_plan_is_called() -> None:
    assert ranks_of(only_largest(loaded("phone", "rack", "laptop", "server"))) == {"1": (6, 6), "3": (6, 6)}


def test_cohorts_of_some_participants_have_their_share_of_a_cohort_of_all() -> None:
    everybody = ["phone"] * 30 + ["server"] * 10
    assert cohort_of(loaded(*everybody, rounds={"cohort_size": 12}), 10) == 3
    assert cohort_of(loaded(*everybody, rounds={"cohort_size": 12}), 40) == 12
    assert cohort_of(loaded(*everybody, rounds={"cohort_fraction": 0.2}), 10) == 2
    assert cohort_of(loaded(*everybody, rounds={"cohort_size": 12}), 1) == 1


@pytest.mark.parametrize(
    ("plans", "settings", "names"),
    [
        (("phone", "server"), {}, ["fedit_smallest_rank"]),
        (("phone", "server"), ALL_ON, ["fedit_smallest_rank", "large_clients_alone", "fedit_largest_rank"]),
        (("phone", "server"), {**ALL_ON, "fedit_reference": False}, ["large_clients_alone", "fedit_largest_rank"]),
        # All clients have the same ranks, so that all three would be one run.
        (("server", "rack"), ALL_ON, ["fedit_smallest_rank"]),
        (("server", "rack"), {**ALL_ON, "fedit_reference": False}, ["large_clients_alone"]),
    ],
)
def test_a_run_has_the_references_that_are_asked_for_and_differ(
    plans: tuple[str, ...], settings: dict[str, bool], names: list[str]
) -> None:
    assert [run.name for run in wanted_runs(loaded(*plans, evaluation=settings))] == names


def test_a_run_of_fedit_has_no_reference_runs() -> None:
    assert list(wanted_runs(loaded("server", method={"name": "fedit"}, evaluation=ALL_ON))) == []


def test_every_reference_run_has_a_learning_rate_of_its_own() -> None:
    rates = {"fedit_learning_rate": 1.0, "large_alone_learning_rate": 2.0, "fedit_largest_learning_rate": 3.0}
    run = loaded("phone", "server", evaluation={**ALL_ON, **rates})
    assert [reference.learning_rate(run.config.evaluation) for reference in wanted_runs(run)] == [1.0, 2.0, 3.0]
    run = loaded("phone", "server", evaluation=ALL_ON)
    assert [reference.learning_rate(run.config.evaluation) for reference in wanted_runs(run)] == [None] * 3
