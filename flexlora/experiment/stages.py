"""Defines the stages of a run, for progress displays."""

from collections.abc import Callable
from dataclasses import dataclass

from flexlora.rounds.clock import clients_per_round
from flexlora.rounds.loop_parts import Loop, RoundEvent
from flexlora.rounds.records import RECORDS_FILE, read_records


@dataclass(frozen=True)
class Stage:
    """One part of a run, for progress displays: how many steps it has and how many are done already."""

    title: str
    num_steps: int | None = None
    completed: int = 0
    notes: tuple[str, ...] = ()


Notify = Callable[[RoundEvent | Stage], None]


def rounds_stage(title: str, loop: Loop) -> Stage:
    """Return the stage of a round loop, part of which may be done already."""
    # The bar counts clients, so that it moves within a round.
    done = max((record.server_round for record in read_records(loop.folder / RECORDS_FILE)), default=0)
    size = min(loop.settings.cohort_size, len(loop.federation.clients))
    size = size if loop.clock is None else clients_per_round(loop.clock.policy, size)
    return Stage(title, loop.settings.num_rounds * size, done * size)
