"""Consoles and records for displays, and one small run on the embedded base."""

from collections.abc import Callable, Mapping
from io import StringIO

import pytest
from rich.console import Console

from flexlora.experiment.notebook import run
from flexlora.experiment.result import RunResult
from flexlora.rounds.records import ClientRecord, EvaluationRecord, RoundRecord, ScoreRecord

SMALL: Mapping[str, Mapping[str, object]] = {
    "model": {"num_threads": 1, "num_processes": 1},
    "data": {"num_clients": 8, "examples_per_task": 20, "num_unseen_tasks": 2, "test_examples_per_task": 1},
    "rounds": {"num_rounds": 2, "cohort_size": 3},
    "training": {"max_steps": 1},
    "evaluation": {
        "every": 2,
        "max_new_tokens": 2,
        "local_only_clients": 0,
        "rank_group_clients": 0,
        "fedit_reference": False,
        "fedit_largest_reference": False,
        "large_alone_reference": False,
    },
}

NAMES = ("[/red] a/b", "old [/slow]", "pixel [arm64]", "pixel [x86]", "a:100:b")

SCORE = ScoreRecord(rouge_l=9, exact_match=0, loss=1, num_examples=4, num_tasks=2)


@pytest.fixture(scope="session")
def names() -> tuple[str, ...]:
    """Names that a terminal may take for markup or emoji."""
    return NAMES


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), force_terminal=True, color_system=None, width=200, emoji=False)


@pytest.fixture(scope="session")
def shown() -> Callable[[Console], str]:
    """Returns what a console of these tests has shown."""
    return lambda console: console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def record_of() -> Callable[..., RoundRecord]:
    """Returns a maker of scored rounds in which the given clients failed."""
    return _record


@pytest.fixture(scope="session")
def failed() -> Callable[[str], ClientRecord]:
    """Returns a maker of clients that failed."""
    return _failed


@pytest.fixture(scope="session")
def small() -> Mapping[str, Mapping[str, object]]:
    """Settings that cut the demo down to some seconds."""
    return SMALL


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """What a finished run of them has left behind; do not change it."""
    return run("demo", tmp_path_factory.mktemp("small") / "run <i>1</i>", quiet=True, **SMALL)


def _record(server_round: int, *clients: ClientRecord) -> RoundRecord:
    scores = EvaluationRecord(unseen=SCORE, unseen_unweighted=SCORE, categories={name: SCORE for name in NAMES})
    return RoundRecord(
        server_round=server_round,
        clients=list(clients),
        num_failed=len(clients),
        evaluation=scores,
        virtual_clock_seconds=5.0 * server_round,
    )


def _failed(name: str) -> ClientRecord:
    return ClientRecord(client_id=name, plan=name, ranks={}, num_examples=1, outcome="failed", reason=f"{name} is late")
