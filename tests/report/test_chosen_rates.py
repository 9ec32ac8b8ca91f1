"""The learning rate of an arm is the best of its tuning draws, and an edge is named."""

from collections.abc import Callable
from typing import Any

import pytest

from flexlora.report.paired import chosen_rates

MakeRow = Any


def tuned(study_row: MakeRow, losses: dict[float, list[float | None]], arm: str = "fedit") -> list[dict[str, Any]]:
    return [study_row.tuning(arm, rate, loss, draw) for rate in losses for draw, loss in enumerate(losses[rate])]


def test_the_lowest_mean_validation_loss_wins(study_row: MakeRow) -> None:
    rows = tuned(study_row, {0.01: [1.9, 1.9], 0.02: [1.6, 1.9], 0.04: [1.7, 2.0]})
    (choice,) = chosen_rates(rows).values()
    assert (choice.arm, choice.distribution, choice.learning_rate) == ("fedit", "uniform", 0.02)
    assert choice.edge is None and not choice.is_at_edge
    assert [one.mean_loss for one in choice.tried] == pytest.approx([1.9, 1.75, 1.85])
    assert choice.chosen.num_draws == 2


@pytest.mark.parametrize(
    ("losses", "edge"),
    [
        ({0.01: [1.6], 0.02: [1.7]}, "lowest"),
        ({0.01: [1.7], 0.02: [1.6]}, "highest"),
        ({0.01: [1.7]}, "only"),
    ],
)
def test_a_choice_at_the_edge_is_named(study_row: MakeRow, losses: dict[float, list[float | None]], edge: str) -> None:
    (choice,) = chosen_rates(tuned(study_row, losses)).values()
    assert choice.edge == edge and choice.is_at_edge


def test_a_rate_that_diverges_bounds_the_others_and_counts_as_the_base_model(study_row: MakeRow) -> None:
    rows = tuned(study_row, {0.01: [1.8, 1.8], 0.02: [1.7, 1.7], 0.04: [1.2, None]})
    rows += [study_row("base", draw, 2.4) for draw in range(2)]
    (choice,) = chosen_rates(rows).values()
    # The base model validates at 2.5 here: (1.2 + 2.5) / 2.
    assert choice.tried[-1].mean_loss == pytest.approx(1.85)
    assert (choice.learning_rate, choice.edge, choice.tried[-1].num_diverged) == (0.02, None, 1)


def test_rates_with_fewer_draws_wait(study_row: MakeRow) -> None:
    rows = tuned(study_row, {0.01: [1.8, 1.8], 0.02: [1.7, 1.7], 0.04: [1.2]})
    (choice,) = chosen_rates(rows).values()
    assert (choice.learning_rate, choice.edge) == (0.02, "highest")
    assert len(choice.tried) == 3


def test_equal_rates_give_the_lower_one_and_all_diverged_gives_one_all_the_same(study_row: MakeRow) -> None:
    (choice,) = chosen_rates(tuned(study_row, {0.02: [1.7], 0.01: [1.7], 0.04: [1.9]})).values()
    assert (choice.learning_rate, choice.edge) == (0.01, "lowest")
    (choice,) = chosen_rates(tuned(study_row, {0.02: [None], 0.01: [None]})).values()
    assert (choice.learning_rate, choice.chosen.mean_loss) == (0.01, None)


def test_test_draws_and_the_base_model_choose_nothing(study_row: Callable[..., dict[str, Any]]) -> None:
    rows = [study_row("fedit", learning_rate=0.5, loss=1.0), study_row("base", phase="tuning")]
    assert chosen_rates(rows) == {}


def test_arms_and_distributions_choose_for_themselves(study_row: MakeRow) -> None:
    rows = tuned(study_row, {0.01: [1.6], 0.02: [1.7]})
    rows += [{**row, "distribution": "skewed", "validation_loss": 5 - row["validation_loss"]} for row in rows]
    rows += tuned(study_row, {0.1: [1.0]}, arm="aligned")
    chosen = {key: choice.learning_rate for key, choice in chosen_rates(rows).items()}
    assert chosen == {("fedit", "uniform"): 0.01, ("fedit", "skewed"): 0.02, ("aligned", "uniform"): 0.1}


def test_a_rate_that_diverged_once_is_not_chosen_while_another_never_did(study_row: MakeRow) -> None:
    rows = tuned(study_row, {0.01: [2.2, 2.2], 0.02: [2.1, 2.1], 0.04: [1.0, None]})
    (choice,) = chosen_rates(rows).values()
    assert choice.learning_rate == 0.02
