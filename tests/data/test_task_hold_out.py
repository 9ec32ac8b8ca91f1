"""Which tasks are held out: those named, those of a category, and some drawn by the seed."""

import pytest

from flexlora.data.natural_instructions import NaturalInstructionsError
from flexlora.data.task_hold_out import HoldOut, asked_for, choose_unseen


def categories(num_tasks, num_categories):
    return {f"task{n:03d}": f"category {n % num_categories}" for n in range(num_tasks)}


def test_tasks_are_asked_for_by_name_with_or_without_the_ending_and_by_category():
    hold_out = HoldOut(tasks=("task000.json", "task001"), categories=("category 2",))
    assert asked_for(hold_out, categories(9, 3)) == {"task000", "task001", "task002", "task005", "task008"}
    assert asked_for(HoldOut(num_tasks=3), categories(9, 3)) == set()


def test_tasks_drawn_by_number_come_on_top_of_those_asked_for():
    unseen = choose_unseen(2, {"task000", "task999"}, categories(9, 3), 0)
    assert "task000" in unseen and "task999" not in unseen and len(unseen) == 3


def test_tasks_drawn_by_number_spread_over_the_categories():
    category_of = categories(30, 5)
    held = [category_of[task] for task in choose_unseen(11, set(), category_of, 0)]
    assert sorted(held.count(f"category {n}") for n in range(5)) == [2, 2, 2, 2, 3]


def test_the_draw_follows_the_seed_and_not_the_order_of_tasks():
    category_of = categories(30, 5)
    turned = dict(reversed(category_of.items()))
    assert choose_unseen(5, set(), category_of, 1) == choose_unseen(5, set(), turned, 1)
    assert choose_unseen(5, set(), category_of, 1) != choose_unseen(5, set(), category_of, 2)


def test_unknown_names_are_refused_with_what_is_near_them():
    category_of = categories(12, 3)
    with pytest.raises(NaturalInstructionsError, match=r"data.unseen_tasks .* 'task01' is near 'task01\d'"):
        asked_for(HoldOut(tasks=("task01", "task002")), category_of)
    with pytest.raises(NaturalInstructionsError, match=r"data.unseen_categories .* 'Category 1' is near 'category"):
        asked_for(HoldOut(categories=("Category 1",)), category_of)


def test_more_tasks_than_there_are_and_none_at_all_are_refused():
    with pytest.raises(NaturalInstructionsError, match=r"data.num_unseen_tasks must be at most 11"):
        choose_unseen(12, {"task000"}, categories(12, 3), 0)
    with pytest.raises(NaturalInstructionsError, match="none of the 1 tasks to hold out is left"):
        choose_unseen(0, {"task999"}, categories(12, 3), 0)
