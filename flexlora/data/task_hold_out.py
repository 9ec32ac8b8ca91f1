"""Chooses the tasks that no client has: by name, by category, and by lot, one per category in turn."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from flexlora.data.natural_instructions import NaturalInstructionsError
from flexlora.federation.streams import stream


@dataclass(frozen=True)
class HoldOut:
    """Which tasks no client has: the union of the three.

    Attributes:
        tasks: Task names, with or without ``.json``.
        categories: Categories held out as a whole.
        num_tasks: This many tasks besides, drawn by the seed, one per category in turn.
    """

    tasks: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    num_tasks: int = 0


def asked_for(hold_out: HoldOut, category_of: Mapping[str, str]) -> set[str]:
    """Return the tasks held out by name or by category.

    Raises:
        NaturalInstructionsError: The data have no such task or category.
    """
    names = {name.removesuffix(".json") for name in hold_out.tasks}
    check_known("data.unseen_tasks", names, set(category_of))
    check_known("data.unseen_categories", set(hold_out.categories), set(category_of.values()))
    return names | {task_id for task_id, category in category_of.items() if category in hold_out.categories}


def check_known(key: str, asked: set[str], known: set[str]) -> None:
    """Refuse names that the data do not hold, with those that are near them.

    Args:
        key: The key of the configuration that holds the names.

    Raises:
        NaturalInstructionsError: Some names are unknown.
    """
    unknown = sorted(asked - known)
    if not unknown:
        return
    near = {name: difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.4) for name in unknown[:5]}
    hints = "; ".join(f"{name!r} is near {', '.join(map(repr, found)) or 'nothing'}" for name, found in near.items())
    raise NaturalInstructionsError(
        f"{key} must name what the data hold; {len(unknown)} of {len(asked)} are unknown: {hints}"
    )


def choose_unseen(num_tasks: int, asked: set[str], kept: Mapping[str, str], seed: int) -> set[str]:
    """Return the held-out tasks that are left: those asked for, and ``num_tasks`` drawn, one per category in turn.

    Args:
        kept: Task -> its category.

    Raises:
        NaturalInstructionsError: There are fewer tasks, or none of those asked for is left.
    """
    rng = stream(seed, "unseen-tasks")
    unseen = asked & set(kept)
    by_category: dict[str, list[str]] = {}
    for task_id in sorted(set(kept) - unseen):
        by_category.setdefault(kept[task_id], []).append(task_id)
    pools = [by_category[category] for category in sorted(by_category)]
    pools = [[pools[i][j] for j in rng.permutation(len(pools[i]))] for i in rng.permutation(len(pools))]
    num_left = sum(map(len, pools))
    if num_tasks > num_left:
        raise NaturalInstructionsError(
            f"data.num_unseen_tasks must be at most {num_left}, the tasks that are left; got {num_tasks}"
        )
    deepest = max(map(len, pools), default=0)
    in_turn = [pool[turn] for turn in range(deepest) for pool in pools if turn < len(pool)]
    unseen.update(in_turn[:num_tasks])
    if not unseen and (asked or num_tasks):
        raise NaturalInstructionsError(
            f"none of the {len(asked)} tasks to hold out is left after the filters; hold out others, lower "
            "data.min_examples or keep tasks seen in pretraining"
        )
    return unseen
