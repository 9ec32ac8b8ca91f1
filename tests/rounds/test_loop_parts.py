"""What a loop remembers, and when it stops."""

from flexlora.rounds.clock import Breakdown, ClockState, Trip
from flexlora.rounds.loop_parts import Progress, Stopwatch


def test_rounds_without_updates_stop_a_loop_only_in_a_row() -> None:
    progress = Progress().after_updates(0, 2).after_updates(3, 2).after_updates(0, 2)
    assert (progress.stopped, progress.failed_rounds_in_a_row, progress.num_updates) == (None, 1, 3)
    assert "no update could be used in 2 rounds in a row" in str(progress.after_updates(0, 2).stopped)


def test_evaluations_without_a_lower_loss_stop_a_loop_if_it_has_patience() -> None:
    progress = Progress().after_evaluation(7, 2.0, 2).after_evaluation(7, 2.0, 2)
    assert (progress.best_validation_loss, progress.evaluations_without_gain, progress.stopped) == (2.0, 1, None)
    assert progress.after_evaluation(7, 1.5, 2).evaluations_without_gain == 0
    assert progress.after_evaluation(7, None, 2) == progress
    assert progress.after_evaluation(7, 2.5, None).stopped is None
    assert "did not fall below 2.0000 in 2 evaluations" in str(progress.after_evaluation(7, 2.5, 2).stopped)


def test_the_first_reason_to_stop_is_kept() -> None:
    stopped = Progress(best_validation_loss=1.0, stopped="enough")
    assert stopped.after_evaluation(7, 2.0, 1).stopped == "enough"


def test_progress_comes_back_from_plain_values() -> None:
    trip = Trip("a", 1, 0.0, 1.0, 2.0, 1.0, 10, 5, Breakdown(0.5, "dropped out"))
    progress = Progress(2.0, 1, clock=ClockState(3.0, 4, (trip,)))
    assert Progress.from_json(progress.to_json(), {}, {}) == progress
    # An earlier version wrote less.
    assert Progress.from_json({"num_updates": 3}, {}, {}) == Progress(num_updates=3)


def test_a_stage_that_comes_twice_counts_twice() -> None:
    watch = Stopwatch({"train": 5.0})
    for _ in range(2):
        with watch.stage("train"):
            pass
    assert 5.0 < watch.seconds["train"] < 6.0
