"""Makes a comparison from a configuration and arms, and describes it for its folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexlora.experiment.client_plans import config_plans
from flexlora.experiment.compare_arms import RANKS_OF, RUNS_TO_ITS_END, Arm, CompareError, controls
from flexlora.experiment.compare_jobs import Study
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import dump_config, override_config, read_settings
from flexlora.federation.client_types import DISTRIBUTIONS
from flexlora.report.study_rows import DEFAULT_REFERENCE

CONFIGURED = "configured"
"""Name of the distribution that the configuration itself describes."""

NO_METHOD = "method={name: flexlora}"
"""Takes the place of the configuration's method: a comparison has methods of its own."""

MOST = 10_000
"""Draws, trials or evaluations; even a hundredth of that takes weeks."""


def make_study(
    config_path: Path | str,
    overrides: Sequence[str],
    arms: Sequence[Arm],
    *,
    distributions: Sequence[str] = (),
    draws: int,
    tuning_draws: int = 2,
    trials: int = 5,
    learning_rate: float | None = None,
    evaluations: int = 8,
    text: bool = True,
    tune_on: str | None = None,
    with_controls: bool = True,
) -> Study:
    """Return the comparison of arms, and of the controls, on the draws of a configuration.

    Raises:
        CompareError: If a number is out of range or a distribution has no such name.
        ConfigError: If the configuration is wrong, or does not suit an arm.
    """
    for name, value, least in (
        ("draws", draws, 1),
        ("tuning_draws", tuning_draws, 0),
        ("trials", trials, 1),
        ("evaluations", evaluations, 1),
    ):
        if not least <= value <= MOST:
            raise CompareError(f"--{name.replace('_', '-')} must be in {least}..{MOST}; got {value}")
    if own := [override for override in overrides if override.startswith(("method=", "method."))]:
        raise CompareError(
            f"what is compared belongs to --methods, as --methods fedit,flexlora:fold_tail=true; got {own[0]}"
        )
    tree, source = read_settings(config_path), str(config_path)
    config = override_config(tree, source, [*overrides, NO_METHOD], check_paths=True)
    if config.data.validation_examples == 0 and tuning_draws:
        raise CompareError("learning rates are chosen by validation loss; set data.validation_examples above 0")
    names = tuple(dict.fromkeys(distributions)) or (CONFIGURED,)
    if unknown := [name for name in names if name not in (*DISTRIBUTIONS, CONFIGURED)]:
        raise CompareError(
            f"--distributions must be among {', '.join((*DISTRIBUTIONS, CONFIGURED))}; got {', '.join(unknown)}"
        )
    if tune_on is not None and tune_on not in names:
        raise CompareError(f"--tune-on must be one of the distributions, {', '.join(names)}; got {tune_on}")
    for arm in arms:
        _check_clients(config, arm)
        own = [RUNS_TO_ITS_END, f"method={json.dumps(dict(arm.method))}", *arm.settings]
        override_config(tree, source, [*overrides, *own])
    for name in names:
        if name != CONFIGURED:
            _check_distribution(config, name)
            override_config(tree, source, [*overrides, NO_METHOD, f"clients.distribution={name}"])
    return Study(
        config=str(config_path),
        overrides=tuple(overrides),
        arms=(*(controls() if with_controls else ()), *arms),
        distributions=names,
        supports={name: _support(config, name) for name in names},
        draws=draws,
        tuning_draws=tuning_draws,
        trials=trials,
        learning_rate=learning_rate or config.training.learning_rate,
        seed=config.seed,
        settings=dump_config(config),
        evaluations=evaluations,
        text=text,
        tune_on=tune_on,
    )


def _support(config: Config, distribution: str) -> tuple[str, ...]:
    """Return the client types that a distribution hands out; none where something else says who has which."""
    if _who_gets_what(config):
        return ()
    weights = config.clients.distribution if distribution == CONFIGURED else distribution
    plans = list(config_plans(config))
    if isinstance(weights, str):
        weights = dict(zip(plans, DISTRIBUTIONS[weights], strict=True))
    return tuple(name for name in plans if weights.get(name, 0.0) > 0)


def reference_of(study: Study, label: str | None) -> str:
    """Return the label of the arm that differences are taken to.

    Args:
        study: The comparison.
        label: What was asked for; None takes FedIT at the smallest rank, or the first method where there are no
            controls.

    Raises:
        CompareError: If no arm has this label.
    """
    labels = [arm.label for arm in study.arms]
    if label is None:
        return DEFAULT_REFERENCE if DEFAULT_REFERENCE in labels else labels[0]
    if label not in labels:
        raise CompareError(f"--reference must be the label of an arm, one of {', '.join(labels)}; got {label}")
    return label


def _check_clients(config: Config, arm: Arm) -> None:
    """Raise where the ranks of an arm are those of a client type that does not exist."""
    types = config_plans(config)
    if arm.client_type is not None and arm.client_type not in types:
        raise CompareError(
            f"--methods: clients of {arm.label} must be {', '.join(RANKS_OF)} or a client type, one of "
            f"{', '.join(types)}; got {arm.clients!r}"
        )


def _check_distribution(config: Config, name: str) -> None:
    """Raise where a distribution would change nothing, or not all."""
    if key := _who_gets_what(config):
        raise CompareError(
            f"--distributions {name} cannot spread client types, because {key} says who has which; take {key} out of "
            "the configuration, or leave --distributions out"
        )


def _who_gets_what(config: Config) -> str | None:
    """Return the setting besides ``clients.distribution`` that gives clients their ranks."""
    if config.clients.ranks_from == "devices":
        return "clients.ranks_from=devices"
    given = {
        "clients.counts": config.clients.counts,
        "clients.assigned": config.clients.assigned,
        "devices.types": config.devices.types,
    }
    return next((key for key, value in given.items() if value), None)


def described(study: Study) -> dict[str, Any]:
    """Return a comparison as plain values: what a folder of rows belongs to."""
    return {
        "config": study.settings,
        "path": study.config,
        "overrides": list(study.overrides),
        "arms": [arm.described() for arm in study.arms],
        "distributions": list(study.distributions),
        "draws": study.draws,
        "tuning_draws": study.tuning_draws,
        "trials": study.trials,
        "learning_rate": study.learning_rate,
        "evaluations": study.evaluations,
        "text": study.text,
        "tune_on": study.tune_on,
    }
