"""Runs one job of a comparison and returns its row."""

import dataclasses
import errno
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from flexlora.aggregators.settings import traits_of
from flexlora.engines.simulation import reason_of
from flexlora.experiment.compare_arms import Arm, by_label
from flexlora.experiment.compare_controls import alone_scores, clients_of, pooled
from flexlora.experiment.compare_draws import Draws
from flexlora.experiment.compare_jobs import Job, Study
from flexlora.experiment.compare_rows import head_of_row, missing_scores
from flexlora.experiment.compare_scores import (
    NOTHING,
    LossScorer,
    model_of,
    own_loss,
    own_validation_loss,
    unseen_loss,
)
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.manifest import version_of
from flexlora.experiment.method_config import FEDERATED_AVERAGING, read_method
from flexlora.experiment.round_loop import round_loop
from flexlora.experiment.scoring import Scorer, validation_loss
from flexlora.federation.messages import Broadcast
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.loop_parts import Loop, Outcome
from flexlora.rounds.records import RECORDS_FILE, read_records

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def run_job(study: Study, job: Job, draws: Draws, scratch: Path) -> dict[str, Any]:
    """Return the row of a job; an error of its method becomes part of it, because it must not end the others.

    An error of the machine does not, because it says nothing about the method.

    Args:
        study: The comparison.
        job: The run.
        draws: Loads its draw.
        scratch: Folder for its checkpoints; a job that was killed goes on from them.

    Raises:
        OSError: The disk is full or failed.
        MemoryError: Memory ran out, that of a device included.
    """
    arm = by_label(study.arms)[job.arm]
    started = time.perf_counter()
    row = head_of_row(study, job)
    try:
        loaded = draws.loaded(job, arm)
        row |= {"clients": len(loaded.participants.clients), "device": _device_name(loaded.model.device)}
        row |= _measured(study, job, arm, loaded, scratch, draws)
    except Exception as error:
        if _is_the_machines(error):
            raise
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise MemoryError(reason_of(error)) from None
        row |= missing_scores() | {"diverged": True, "failure": reason_of(error)}
    shutil.rmtree(scratch, ignore_errors=True)
    return row | {"seconds": time.perf_counter() - started, "version": version_of("flexlora")}


def _is_the_machines(error: Exception) -> bool:
    # Libraries that write files lose the number of the error.
    return isinstance(error, OSError) and error.errno in (*DISK_ERRORS, None)


def _measured(study: Study, job: Job, arm: Arm, loaded: LoadedRun, scratch: Path, draws: Draws) -> dict[str, Any]:
    if arm.kind == "base":
        scored = _scored(study, job, loaded, None)
        return missing_scores() | scored | {"diverged": False, "failure": None, "own_loss": own_loss(job, loaded, None)}
    if arm.kind == "alone":
        # Sampled clients do not say what all of them would take.
        costs = {"client_seconds": None}
        return missing_scores() | costs | alone_scores(job, loaded) | {"diverged": False, "failure": None}
    scorer = LossScorer(loaded, job.phase == "test")
    scorer = dataclasses.replace(scorer, base=draws.base_scores(job, scorer))
    loop = _loop(study, job, arm, loaded, scratch, scorer)
    outcome = run_rounds(loop)
    adapter = loop.aggregator.broadcast(outcome.state, loop.federation.server_ranks)
    scored, model = _scored(study, job, loaded, adapter), model_of(loop, outcome)
    if traits_of(loop.aggregator).personal:
        scored |= {"validation_loss": own_validation_loss(loaded, model), "personal": True}
    loss = scored["validation_loss"]
    # A run that ends in failures has no model of its own; its last one says nothing about the method.
    diverged = not outcome.has_progress or (loss is not None and not math.isfinite(loss))
    scored |= {"validation_loss": None} if diverged else {}
    return (
        _costs(loop, outcome, job.phase == "test", travels=arm.kind == "method")
        | scored
        | {"own_loss": own_loss(job, loaded, model)}
        | {"diverged": diverged, "failure": outcome.stopped if diverged else None}
    )


def _scored(study: Study, job: Job, loaded: LoadedRun, adapter: Broadcast | None) -> dict[str, Any]:
    """Return the scores of a finished run: on unseen tasks only for draws that count."""
    if job.phase == "tuning":
        return {"validation_loss": validation_loss(loaded, adapter), "unseen": None, "categories": None}
    if not study.text:
        unseen = dict(NOTHING.model_dump(), loss=unseen_loss(loaded, adapter), rouge_l=None, exact_match=None)
        return {"validation_loss": validation_loss(loaded, adapter), "unseen": unseen, "categories": None}
    scores = Scorer(loaded).scores(adapter)
    return {
        "validation_loss": scores.validation_loss,
        "unseen": scores.unseen.model_dump(),
        "categories": {name: own.model_dump() for name, own in scores.categories.items()},
    }


def _costs(loop: Loop, outcome: Outcome, has_unseen: bool, travels: bool) -> dict[str, Any]:
    """Return curve and costs of a finished loop; where no factors travel, as in pooled training, no bytes count."""
    records = read_records(loop.folder / RECORDS_FILE)
    scored = [(record.server_round, record.evaluation) for record in records if record.evaluation]
    return {
        "rounds": outcome.server_round,
        "curve": [
            {
                "round": number,
                "validation_loss": scores.validation_loss,
                "unseen_loss": scores.unseen.loss if has_unseen else None,
            }
            for number, scores in scored
        ],
        "up_bytes": sum(record.up_bytes for record in records if travels),
        "down_bytes": sum(record.down_bytes for record in records if travels),
        "server_seconds": sum(
            record.seconds.get(stage, 0.0) for record in records for stage in ("broadcast", "aggregate")
        ),
        "client_seconds": sum(record.seconds.get("train", 0.0) for record in records),
    }


def _loop(study: Study, job: Job, arm: Arm, loaded: LoadedRun, scratch: Path, scorer: LossScorer) -> Loop:
    """Return the round loop of a job, scored by losses alone along its way."""
    clients = clients_of(arm, loaded, study.supports[job.distribution])
    method = read_method(arm.method or {"name": FEDERATED_AVERAGING})
    loop = round_loop(loaded, method, clients, scratch, lambda event: None, job.learning_rate)
    every = max(1, loop.settings.num_rounds // study.evaluations)
    settings = dataclasses.replace(
        loop.settings, patience=None, evaluate_every=every, checkpoint_every=every, keep_checkpoints=1
    )
    loop = dataclasses.replace(loop, settings=settings, evaluator=scorer)
    return pooled(loop, loaded) if arm.kind == "centralised" else loop


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
