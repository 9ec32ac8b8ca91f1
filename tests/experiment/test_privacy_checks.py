"""Secure sums are checked against everything else before anything is loaded."""

import pytest

from flexlora.aggregators.registry import AGGREGATORS, package_methods
from flexlora.aggregators.settings import traits_of
from flexlora.experiment import privacy_checks
from flexlora.experiment.config import ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.lora.factors import Scaling
from flexlora.uplink.masking_server import FEWEST_CLIENTS


def parsed(secure_sum=None, **sections):
    return parse_config({"privacy": {"secure_sum": secure_sum or {}}, **sections}, "test")


def problem(secure_sum=None, **sections):
    with pytest.raises(ConfigError) as caught:
        parsed(secure_sum, **sections)
    return str(caught.value)


@pytest.mark.parametrize("name", package_methods())
def test_a_method_that_needs_single_updates_is_refused_by_name(name):
    # For one-rank methods, with one rank.
    types = {"types": {"one": {"attention": 2, "ffn": 2}}, "distribution": {"one": 1}}
    if traits_of(AGGREGATORS[name](scaling=Scaling("rslora", 1.0))).secure_sums is not None:
        assert parsed(method={"name": name}, clients=types).privacy.secure_sum is not None
        return
    message = problem(method={"name": name}, clients=types)
    assert f"method.name={name} does not say that it can do" in message
    assert "choose one of aligned, fedavg, fedit, flexlora" in message


@pytest.mark.parametrize(
    ("secure_sum", "sections", "message"),
    [
        ({}, {"method": {"name": "aligned"}, "rounds": {"upload_bits": 4}}, "rounds.upload_bits=4 rounds each update"),
        (
            {"sketch_columns": 8},
            {"method": {"name": "aligned"}},
            "method.name=aligned adds up factors, without a sketch",
        ),
        ({"max_bytes": 8}, {"method": {"name": "aligned"}}, "leave them out"),
        ({}, {"rounds": {"cohort_size": 2}}, "rounds.cohort_size must be at least 3"),
        ({"word_bits": 16}, {"rounds": {"cohort_size": 40_000}}, "word_bits=16 cannot hold the sum of 40000 clients"),
        ({"num_neighbours": 5}, {}, "num_neighbours"),
        ({"threshold": 0.5}, {}, "threshold"),
        ({"sketch_columns": 4}, {}, "sketch_columns"),
        (
            {},
            {"training": {"optimizer": "sgd", "max_grad_norm": None}},
            "set either that or privacy.secure_sum.largest_change",
        ),
        (
            {},
            {"devices": {"profiles": "built_in"}, "clock": {"policy": "async"}},
            "clock.policy=async takes updates as they come",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(secure_sum, sections, message):
    assert message in problem(secure_sum, **sections)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(privacy_checks, "find_spec", lambda name: None)
    assert "pip install 'flexlora[privacy]'" in problem()


def test_the_smallest_cohort_is_that_of_the_protocol():
    assert privacy_checks.FEWEST_CLIENTS == FEWEST_CLIENTS
