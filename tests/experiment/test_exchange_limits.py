"""What cannot be run over files is refused before anything is loaded, with every reason."""

import subprocess
import sys

import pytest

from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.exchange_limits import offered_plans, refuse_exchange


def config_of(**sections: object) -> Config:
    return parse_config(dict(sections), "the test")


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"method": {"name": "fedsa_lora"}}, "method.name=fedsa_lora lets clients keep a factor"),
        ({"method": {"name": "fed_sb"}}, "method.name=fed_sb train cores or chosen entries"),
        ({"method": {"name": "slora"}, "rounds": {"num_rounds": 9}}, "method.name=slora train cores or chosen entries"),
        ({"method": {"name": "fs_lora"}}, "method.name=fs_lora sends every client something of its own"),
        ({"devices": {"profiles": "built_in"}}, "simulated devices"),
        ({"rounds": {"patience": 2}}, "the server has no data"),
        ({"rounds": {"upload_bits": 8}}, "set rounds.upload_bits=null"),
        ({"rounds": {"cohort_size": 3}}, "everybody who replies takes part"),
        ({"privacy": {"secure_sum": {}}, "method": {"name": "aligned"}}, "the server sees every update"),
        ({"deployment": {"min_clients": 3}}, "say --min-clients"),
        ({"ray": {}}, "set ray=null"),
        (
            {"clients": {"types": {"a/b": {"attention": 1, "ffn": 1}}, "distribution": {"a/b": 1}}},
            "the name of a folder",
        ),
        ({"method": {"name": "fedit"}}, "needs one rank for all clients"),
    ],
)
def test_each_reason_names_its_setting(sections: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        refuse_exchange(config_of(**sections))


def test_all_reasons_are_told_at_once_and_what_fits_is_not_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_exchange(config_of(rounds={"patience": 2, "cohort_size": 3}))
    assert len(caught.value.problems) == 2
    for method in ("flexlora", "aligned", "zero_pad", "flora"):
        refuse_exchange(config_of(method={"name": method}))
    refuse_exchange(config_of(method={"name": "fedit"}, clients={"distribution": {"type2": 1}}))


def test_plans_that_nobody_can_have_are_not_offered() -> None:
    def names(**clients: object) -> list[str]:
        return list(offered_plans(config_of(clients=clients)))

    assert names(distribution="extreme_heavy_tail") == ["type1", "type2", "type4"]
    assert names(distribution={"type2": 1, "type3": 0}) == ["type2"]
    assert names(distribution={"type2": 1}, assigned={"north": "type4"}) == ["type2", "type4"]
    assert names(counts={"type1": 0, "type3": 2}, assigned={"north": "type4"}) == ["type3", "type4"]


def test_nothing_heavy_is_loaded_to_refuse() -> None:
    code = "import sys, flexlora.experiment.exchange_limits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
