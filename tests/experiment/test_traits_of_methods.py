"""What the traits of a method mean for a configuration."""

from pathlib import Path

import pytest

from flexlora.aggregators.registry import MethodError
from flexlora.aggregators.settings import Traits
from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.participants import policy_of
from flexlora.experiment.round_loop import aggregator_of
from flexlora.experiment.workload import local_training
from flexlora.lora.factors import Scaling

FILE = """
from dataclasses import dataclass
from flexlora import Scaling, Traits, aggregation_method

@aggregation_method("own")
@dataclass(frozen=True)
class Own:
    "Own."
    scaling: Scaling
    traits = Traits({traits})
    def init(self, adapter): ...
    def aggregate(self, state, updates): ...
    def broadcast(self, state, ranks): ...
    def spectra(self, state): ...
    def add_changes(self, state, changes): ...
"""


def config(folder: Path, traits: str, **tree: object) -> Config:
    path = folder / "own.py"
    path.write_text(FILE.format(traits=traits))
    return parse_config({"method": {"path": str(path)}, **tree}, "here")


@pytest.mark.parametrize(
    ("traits", "words"),
    [
        ("adds_changes=True, per_client=True", "clock.policy=async remembers one broadcast per rank plan"),
        ("adds_changes=True, personal=True", "clients of method.name=own start from a factor that they keep"),
    ],
)
def test_late_changes_are_refused_where_clients_differ_in_more_than_ranks(
    tmp_path: Path, traits: str, words: str
) -> None:
    late = {"devices": {"profiles": "built_in"}, "clock": {"policy": "async"}}
    with pytest.raises(ConfigError) as raised:
        config(tmp_path, traits, **late)
    assert words in str(raised.value) and "set another clock.policy or another method.name" in str(raised.value)
    assert config(tmp_path, "adds_changes=True", **late).clock.policy == "async"
    assert policy_of(
        config(tmp_path, "adds_changes=True", **late), Traits(adds_changes=True, personal=True), 2
    ).name == ("wait")


def test_a_run_whose_model_for_all_never_moves_cannot_wait_for_it(tmp_path: Path) -> None:
    patient = {"rounds": {"patience": 3}, "data": {"name": "generated", "validation_examples": 4}}
    with pytest.raises(
        ConfigError, match=r"rounds\.patience waits .* clients of method\.name=own keep a part of theirs"
    ):
        config(tmp_path, "personal=True", **patient)
    assert config(tmp_path, "", **patient).rounds.patience == 3


def test_the_optimiser_that_a_method_prescribes_has_its_way(tmp_path: Path) -> None:
    prescribed = config(tmp_path, "local_optimizer='sgd'", training={"momentum": 0.9, "proximal": 0.1})
    assert (local_training(prescribed).optimizer, local_training(prescribed).momentum) == ("sgd", 0.9)
    assert local_training(prescribed).proximal == 0.1
    # A reference run of another method, which prescribes nothing.
    assert local_training(prescribed, Traits()).optimizer == "adamw"
    assert local_training(config(tmp_path, "")).optimizer == "adamw"
    with pytest.raises(ConfigError, match=r"only training\.optimizer=sgd has momentum"):
        config(tmp_path, "", training={"momentum": 0.9})
    with pytest.raises(ConfigError, match=r"training\.proximal"):
        config(tmp_path, "", training={"proximal": -0.1})


def test_a_method_that_sends_to_each_client_needs_the_function_for_it(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="own needs broadcast_to"):
        aggregator_of(config(tmp_path, "per_client=True").method, Scaling("constant_alpha", 1.0))


@pytest.mark.parametrize(
    ("method", "least"),
    [
        ({"name": "slora", "stage_two": "flexlora"}, 6),
        ({"name": "slora", "sparse_rounds": 2, "stage_two": "flexlora"}, 3),
        ({"name": "fed_sb"}, 2),
        ({"name": "fed_sb", "warmup_rounds": 4}, 5),
    ],
)
def test_a_method_that_would_only_prepare_itself_is_refused(method: dict[str, object], least: int) -> None:
    def read(num_rounds: int) -> Config:
        return parse_config({"method": method, "rounds": {"num_rounds": num_rounds}}, "here")

    assert read(least).rounds.num_rounds == least
    with pytest.raises(ConfigError, match=f"to at least {least}"):
        read(least - 1)
