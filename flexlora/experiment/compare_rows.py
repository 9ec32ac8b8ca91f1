"""Makes the parts of a comparison's rows that need no measurement."""

import dataclasses
from typing import Any

from flexlora.experiment.compare_arms import by_label
from flexlora.experiment.compare_jobs import Job, Study
from flexlora.experiment.manifest import version_of


def missing_scores() -> dict[str, Any]:
    """Return what a row holds before anything has been measured."""
    names = ("validation_loss", "unseen", "categories", "own_loss")
    numbers = ("rounds", "up_bytes", "down_bytes", "server_seconds", "client_seconds")
    return {**dict.fromkeys(names), **dict.fromkeys(numbers, 0), "curve": []}


def head_of_row(study: Study, job: Job) -> dict[str, Any]:
    """Return what a row says about its job."""
    arm = by_label(study.arms)[job.arm]
    return {
        "kind": "run",
        **dataclasses.asdict(job),
        "method": arm.method.get("name", job.arm),
        "options": {key: value for key, value in arm.method.items() if key != "name"},
        "settings": list(arm.settings),
    }


def row_of_dead(study: Study, job: Job) -> dict[str, Any]:
    """Return the row of a job whose process was ended from outside, usually for want of memory."""
    return {
        **head_of_row(study, job),
        **missing_scores(),
        "clients": 0,
        "device": "",
        "diverged": True,
        "failure": "the process that ran it died, usually because memory ran out",
        "seconds": 0.0,
        "version": version_of("flexlora"),
    }
