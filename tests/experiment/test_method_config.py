"""The section of a method is made from its options, and mistakes in a method's code are told as those of settings."""

from pathlib import Path

import pytest

from flexlora.aggregators.registry import MethodError
from flexlora.experiment.config import ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.round_loop import aggregator_of
from flexlora.lora.factors import Scaling

HEAD = """
from dataclasses import dataclass
import torch
from flexlora import *
from flexlora.aggregators.fedit import FedIt

@aggregation_method("own")
@dataclass(frozen=True)
class Own:
    "A method."
"""
FUNCTIONS = """
    init, aggregate, broadcast, spectra = FedIt.init, FedIt.aggregate, FedIt.broadcast, FedIt.spectra
"""
SCALING = Scaling("rslora", 4.0)


def read(folder: Path, body: str, *, head: str = HEAD, functions: str = FUNCTIONS, **options: object):
    path = folder / "own.py"
    path.write_text(head + "".join(f"    {line}\n" for line in body.split("\n")) + functions)
    return parse_config({"method": {"path": str(path), **options}}, "test").method


def test_options_traits_and_checks_of_a_method_in_a_file_are_taken(tmp_path: Path) -> None:
    body = (
        "scaling: Scaling\nx: int = option(1, 'Number.', ge=1)\n"
        "def __post_init__(self): self.scaling(4)\n"
        "@property\ndef traits(self): return Traits(server_rank=self.x)"
    )
    section = read(tmp_path, body, x=3)
    assert section.options() == {"x": 3} and section.traits().server_rank == 3
    assert aggregator_of(section, SCALING).x == 3


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("x: int = option(1, 'X.')", "Own needs a field for the scaling rule: write scaling: Scaling"),
        ("scaling: Scaling\ntraits: Traits = Traits()", "write traits = Traits(...) alone"),
        ("scaling: Scaling\n_x: int = 1", "Own._x must not begin with an underscore"),
        ("scaling: Scaling\ncopy: int = 1", "must give its option copy another name"),
        ("scaling: Scaling\nx: 'torch.nope' = 1", "options of own cannot be read: module 'torch' has no attribute"),
        ("scaling: Scaling\nx: torch.dtype = option(torch.float32, 'X.')", "must have a plain type, such as bool"),
        ("scaling: Scaling\nx: int = option('a', 'X.')", "has a default that it refuses: Input should be a valid int"),
        ("scaling: Scaling\nx: float = option(-1.0, 'X.', ge=0)", "has a default that it refuses: Input should be gre"),
        ("scaling: Scaling\nx: str = option('a', 'X.', ge=0)", "has rules that do not suit its type"),
        ("scaling: Scaling\ntraits = {'needs_one_rank': True}", "traits of own cannot be read; TypeError: traits of"),
        ("scaling: Scaling\n@property\ndef traits(self): return 1 / 0", "traits of own cannot be read; ZeroDivision"),
        ("scaling: Scaling\ndef __post_init__(self): raise ValueError('no')", "from its options; ValueError: no"),
        ("scaling: Scaling\ndef __init__(self, scaling, y): pass", "from its options; TypeError: Own.__init__()"),
    ],
)
def test_what_is_wrong_with_the_code_of_a_method_is_told_as_a_problem(tmp_path: Path, body: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, body)
    assert words in str(raised.value) and str(raised.value).count("  - ") == 1


def test_functions_that_a_method_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="own needs init, aggregate, broadcast, spectra"):
        aggregator_of(read(tmp_path, "scaling: Scaling", functions=""), SCALING)
    with pytest.raises(MethodError, match="own needs add_changes"):
        aggregator_of(read(tmp_path, "scaling: Scaling\ntraits = Traits(adds_changes=True)"), SCALING)
