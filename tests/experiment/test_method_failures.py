"""An error in a method of the user's own names its line; errors of others pass as they are."""

from collections.abc import Callable, Iterable, Iterator

import pytest

from flexlora.aggregators.base import weighed
from flexlora.aggregators.fedit import FedIt
from flexlora.errors import FlexLoraError
from flexlora.experiment.method_failures import MethodFailure, naming_failures
from flexlora.lora.factors import Scaling

SCALING = Scaling("rslora", 4.0)


def helper() -> None:
    raise KeyError("momentum")


class Mine(FedIt):
    """Calls what it is given."""

    def aggregate(self, state: object, updates: Iterable[object]) -> object:
        for update in updates:
            if callable(update):
                update()
        return state


def engine_outcomes(error: Exception) -> Iterator[object]:
    """Yield outcomes as an engine would, and fail."""
    globals_of_engine = {"__name__": "flexlora.engines.simulation", "error": error}
    exec("def outcomes():\n    yield 1\n    raise error", globals_of_engine)
    yield from globals_of_engine["outcomes"]()  # type: ignore[operator]


def attempt(updates: Iterable[object]) -> None:
    method = Mine(scaling=SCALING)
    with naming_failures(method, "mine"):
        method.aggregate({}, updates)


@pytest.mark.parametrize("call", [helper, lambda: list(weighed([], [None]))])  # type: ignore[list-item]
def test_the_function_the_file_and_the_line_are_named(call: Callable[[], None]) -> None:
    with pytest.raises(
        MethodFailure, match=r"mine failed in aggregate, .*test_method_failures\.py, line \d+: "
    ) as raised:
        attempt([call])
    assert raised.value.__cause__ is not None and "--resume" in str(raised.value)


@pytest.mark.parametrize("error", [FlexLoraError("told"), OSError("disk full"), MemoryError()])
def test_errors_that_say_all_there_is_to_say_pass(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        attempt([fail])
    assert raised.value is error


def test_an_error_of_a_client_whose_update_was_read_is_not_that_of_the_method() -> None:
    with pytest.raises(RuntimeError, match="a client"):
        attempt(engine_outcomes(RuntimeError("a client")))


def test_an_error_of_a_method_of_the_package_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mine, "__module__", "flexlora.aggregators.mine")
    with pytest.raises(KeyError, match="momentum"):
        attempt([helper])
