"""The configuration that each arm of a comparison runs under."""

import pytest

from flexlora.experiment.compare_arms import controls, read_arms
from flexlora.experiment.compare_draws import draw_config
from flexlora.experiment.compare_jobs import Job
from flexlora.experiment.compare_study import make_study
from flexlora.experiment.config import ConfigError
from flexlora.experiment.method_config import read_method
from flexlora.experiment.participants import policy_of

LATE = ("devices.profiles=built_in", "clock.policy=async")


def test_controls_wait_where_the_methods_that_are_compared_need_not() -> None:
    study = make_study("configs/demo.yaml", LATE, read_arms("flexlora"), draws=1)
    assert len(study.arms) > len(controls())
    for arm in study.arms:
        config = draw_config(study, Job("test", 0, 1000, "configured", arm.label, 0.1), arm)
        assert config.clock.policy == "async"
        own = read_method(arm.method or {"name": "flexlora"})
        assert policy_of(config, own.traits(), 4).name == ("async" if own.name == "flexlora" else "wait")
    with pytest.raises(ConfigError, match=r"clock\.policy=async adds up late changes, which method\.name=fedit cannot"):
        make_study("configs/demo.yaml", LATE, read_arms("flexlora,fedit"), draws=1)


def test_every_arm_runs_to_its_end_whatever_the_patience_of_the_configuration() -> None:
    study = make_study("configs/demo.yaml", ["rounds.patience=3"], read_arms("fedsa_lora,flexlora"), draws=1)
    for arm in study.arms:
        config = draw_config(study, Job("test", 0, 1000, "configured", arm.label, 0.1), arm)
        assert config.rounds.patience is None
