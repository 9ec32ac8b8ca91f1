"""Methods describe themselves to people and programs."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from flexlora.aggregators import registry
from flexlora.aggregators.registry import MethodError
from flexlora.experiment.method_help import describe_methods, print_methods

FILE = """
from dataclasses import dataclass
from flexlora import Traits, aggregation_method, option

@aggregation_method("mine_{number}")
@dataclass(frozen=True)
class Mine:
    "Means of [mine]."
    scaling: object
    momentum: float = option(0.5, "Share that is kept.", ge=0, lt=1)
    traits = Traits(needs_one_rank=True)
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def test_every_method_is_described_with_options_and_traits() -> None:
    methods = describe_methods()
    assert {"fedit", "flexlora", "zero_pad"} <= methods.keys()
    assert methods["fedit"]["traits"]["needs_one_rank"] and methods["fedit"]["options"] == {}
    assert methods["flexlora"]["options"]["server_rank"] == {
        "default": None,
        "values": "int or null >= 1",
        "description": "Directions the server keeps per module; null is the largest rank of any client type.",
    }
    assert list(describe_methods(["zero_pad"])) == ["zero_pad"]
    with pytest.raises(MethodError, match="got 'fedsgd'"):
        describe_methods(["fedsgd"])


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_names_of_settings_are_whole_at_any_width(width: int) -> None:
    text, methods = io.StringIO(), describe_methods()
    print_methods(Console(file=text, width=width), methods)
    printed = text.getvalue()
    wanted = {f"method.{option}" for method in methods.values() for option in method["options"]}
    assert {name for name in wanted if name not in printed} == set() and "…" not in printed
    assert max(map(len, printed.splitlines())) <= width


def test_methods_of_a_file_are_printed_whole(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE.format(number=1))
    text = io.StringIO()
    print_methods(Console(file=text, width=100), describe_methods(path=str(path)))
    for part in (
        "mine_1  Means of [mine].",
        "traits: needs_one_rank",
        "method.momentum",
        "float >= 0, < 1",
        "Share that",
    ):
        assert part in text.getvalue()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (FILE.replace("traits = ", "traits: Traits = "), "write traits = Traits"),
        (FILE.replace("Traits(needs_one_rank=True)", "1"), "traits of mine_1 cannot be read; TypeError"),
        (FILE.replace("scaling: object", ""), "needs a field for the scaling rule"),
    ],
)
def test_a_method_of_a_file_that_cannot_be_described_says_why(tmp_path, text: str, words: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text.format(number=1))
    with pytest.raises(MethodError) as raised:
        describe_methods(path=str(path))
    assert words in str(raised.value)


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['flexlora', 'methods', '--json']; import flexlora.cli\n"
        "try:\n    flexlora.cli.main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert '"error_compensation"' in done.stdout
