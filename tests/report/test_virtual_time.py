"""Times to a target, by hand."""

from collections.abc import Callable

from flexlora.report.virtual_time import common_target, timed_run, virtual_cells
from flexlora.rounds.records import EvaluationRecord, ManifestRecord, RoundRecord


def test_the_time_to_a_target_is_that_of_the_first_evaluation_that_reached_it(
    rounds_of: Callable[..., list[RoundRecord]], manifest_of: Callable[..., ManifestRecord]
) -> None:
    run = timed_run("slow", rounds_of({0: 5.0, 2: 20.0, 3: 18.0, 4: 30.0}, 100.0), manifest_of("wait"))
    assert run is not None
    assert (run.seconds, run.num_rounds, run.best_rouge_l, run.num_ok, run.num_failed) == (400.0, 4, 30.0, 4, 4)
    assert [run.seconds_to(target) for target in (4.0, 19.0, 20.0, 20.1, 31.0, None)] == [
        0.0,
        200.0,
        200.0,
        400.0,
        None,
        None,
    ]
    assert virtual_cells(run, 31.0)[-1] == "not reached"
    assert virtual_cells(run, 19.0)[-1] == "3 min 20 s"


def test_a_run_without_virtual_time_is_none(evaluation_of: Callable[..., EvaluationRecord]) -> None:
    assert timed_run("plain", [RoundRecord(server_round=0, evaluation=evaluation_of(3))], None) is None


def test_without_a_target_it_is_the_best_of_the_weakest_run(rounds_of: Callable[..., list[RoundRecord]]) -> None:
    runs = [
        run
        for scores in ({0: 5.0, 4: 30.0}, {0: 5.0, 2: 24.0, 4: 22.0})
        if (run := timed_run("r", rounds_of(scores, 1.0), None))
    ]
    assert common_target(runs) == 24.0
    assert common_target(runs, 7.0) == 7.0
    assert common_target([]) is None
