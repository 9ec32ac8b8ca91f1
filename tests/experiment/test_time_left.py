"""The time left follows from what trainings and answers have taken."""

from flexlora.experiment.stages import Work
from flexlora.experiment.time_left import TimeLeft


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_kind_of_work_has_a_rate_of_its_own() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    assert left.seconds_left() is None
    left.begin(Work(trainings=10, answers=40))
    left.turn_to("answers")
    clock.now += 2.0
    left.add("answers", 20)  # 0.1 s each
    assert left.seconds_left() is None, "nobody has trained yet"
    left.turn_to("trainings")
    clock.now += 9.0
    left.add("trainings", 3)  # 3 s each
    assert left.seconds_left() == 7 * 3.0 + 20 * 0.1
    clock.now += 1.5  # Goes on without an event.
    assert left.seconds_left() == 7 * 3.0 + 20 * 0.1 - 1.5
    assert left.elapsed() == 12.5


def test_references_count_from_the_beginning_and_what_was_never_done_is_not_waited_for() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    left.begin(Work(trainings=2), "trainings")
    clock.now += 4.0
    left.add("trainings", 1)
    assert left.seconds_left() == 4.0
    # The next stage says what is left in all; loading is no work.
    left.begin(Work(trainings=5))
    clock.now += 100.0
    left.begin(None, "trainings")
    assert left.seconds_left() == 5 * 4.0
