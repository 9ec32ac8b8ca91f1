"""Loads the draws of a comparison, and keeps the last one for the jobs that follow on it."""

import dataclasses
import math
from typing import Any

import yaml

from flexlora.experiment.compare_arms import RUNS_TO_ITS_END, Arm, controls
from flexlora.experiment.compare_jobs import Job, Study
from flexlora.experiment.compare_scores import LossScorer
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import override_config
from flexlora.experiment.loaded import LoadedRun, scaling_rule
from flexlora.experiment.method_config import DEFAULT_METHOD
from flexlora.experiment.participants import gather_participants
from flexlora.foreign import read_yaml
from flexlora.rounds.records import EvaluationRecord


class Draws:
    """Loads draws, and keeps the last one: jobs of one draw follow one another."""

    def __init__(self, study: Study) -> None:
        """Load nothing yet."""
        self._study = study
        self._key: tuple[int, str] | None = None
        self._loaded: LoadedRun | None = None
        self._base: dict[Any, EvaluationRecord] = {}

    def loaded(self, job: Job, arm: Arm) -> LoadedRun:
        """Return the draw of a job under the settings of its arm."""
        key = (job.seed, job.distribution)
        if self._loaded is None or self._key != key:
            config = draw_config(self._study, job)
            self._loaded, self._key = LoadedRun.load(config, gather_participants(config)), key
        if not arm.settings and not arm.method:
            return self._loaded
        config = draw_config(self._study, job, arm)
        own = dataclasses.replace(self._loaded, config=config, scaling=scaling_rule(config))
        # The tokens depend on data and seed alone, which no arm may change.
        own.__dict__["_encoded"] = self._loaded._encoded  # pyright: ignore[reportPrivateUsage]
        return own

    def base_scores(self, job: Job, scorer: LossScorer) -> EvaluationRecord:
        """Return the scores of the base model on a draw, measured once for all its jobs."""
        key = (job.seed, job.phase)
        if key not in self._base:
            self._base = {key: scorer.scores(None)}
        return self._base[key]


def draw_config(study: Study, job: Job, arm: Arm | None = None) -> Config:
    """Return the configuration of a draw, or of an arm on it.

    Controls run under any ``clock.policy``: where their method cannot, they wait for the cohort, as references do.
    """
    method = {"name": DEFAULT_METHOD} if arm is None or not arm.method or arm in controls() else arm.method
    overrides = [
        f"seed={job.seed}",
        "model.num_processes=1",
        RUNS_TO_ITS_END,
        f"method={yaml.safe_dump(dict(method), default_flow_style=True, width=math.inf).strip()}",
        *(arm.settings if arm else ()),
    ]
    if job.distribution != "configured":
        overrides.append(f"clients.distribution={job.distribution}")
    return override_config(read_yaml(study.settings, study.config), study.config, overrides)
