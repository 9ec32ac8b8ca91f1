"""Runs one job of a comparison and returns its row."""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from flexlora.data.prompts import EncodedExample
from flexlora.engines.simulation import SimulationEngine, reason_of
from flexlora.experiment.baselines import at_smallest_ranks
from flexlora.experiment.compare_arms import Arm, by_label
from flexlora.experiment.compare_jobs import Job, Study
from flexlora.experiment.compare_rows import head_of_row, missing_scores
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import load_config
from flexlora.experiment.loaded import LoadedRun, scaling_rule
from flexlora.experiment.manifest import version_of
from flexlora.experiment.method_config import DEFAULT_METHOD, FEDERATED_AVERAGING, read_method
from flexlora.experiment.participants import gather_participants
from flexlora.experiment.round_loop import cohort_size, round_loop
from flexlora.experiment.scoring import Scorer, sampled_clients, unseen_tasks, validation_loss
from flexlora.experiment.workload import local_training
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast
from flexlora.federation.streams import stream_seed
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.loop_parts import Loop, Outcome
from flexlora.rounds.records import RECORDS_FILE, EvaluationRecord, RankGroupRecord, ScoreRecord, read_records
from flexlora.training.evaluation import answer_loss
from flexlora.training.one_client import LocalTraining, train_client

OWN_CLIENTS_PER_PLAN = 2
"""Clients of each type whose own test examples are scored."""

NOTHING = ScoreRecord(rouge_l=0.0, exact_match=0.0, loss=0.0, num_examples=0, num_tasks=0)


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

    def base_scores(self, job: Job, scorer: "LossScorer") -> EvaluationRecord:
        """Return the scores of the base model on a draw, measured once for all its jobs."""
        key = (job.seed, job.phase)
        if key not in self._base:
            self._base = {key: scorer.scores(None)}
        return self._base[key]


def draw_config(study: Study, job: Job, arm: Arm | None = None) -> Config:
    """Return the configuration of a draw, or of an arm on it."""
    method = arm.method if arm and arm.method else {"name": DEFAULT_METHOD}
    overrides = [
        *study.overrides,
        f"seed={job.seed}",
        "model.num_processes=1",
        f"method={yaml.safe_dump(dict(method), default_flow_style=True, width=math.inf).strip()}",
        *(arm.settings if arm else ()),
    ]
    if job.distribution != "configured":
        overrides.append(f"clients.distribution={job.distribution}")
    return load_config(study.config, overrides)


def run_job(study: Study, job: Job, draws: Draws, scratch: Path) -> dict[str, Any]:
    """Return the row of a job; an error becomes part of it, because it must not end the others.

    Args:
        study: The comparison.
        job: The run.
        draws: Loads its draw.
        scratch: Folder for its checkpoints; a job that was killed goes on from them.
    """
    arm = by_label(study.arms)[job.arm]
    started = time.perf_counter()
    row = head_of_row(study, job)
    try:
        loaded = draws.loaded(job, arm)
        row |= {"clients": len(loaded.participants.clients), "device": _device_name(loaded.model.device)}
        row |= _measured(study, job, arm, loaded, scratch, draws)
    except Exception as error:
        row |= missing_scores() | {"diverged": True, "failure": reason_of(error)}
    shutil.rmtree(scratch, ignore_errors=True)
    return row | {"seconds": time.perf_counter() - started, "version": version_of("flexlora")}


def _measured(study: Study, job: Job, arm: Arm, loaded: LoadedRun, scratch: Path, draws: Draws) -> dict[str, Any]:
    if arm.kind == "base":
        scored = _scored(study, job, loaded, None)
        return (
            missing_scores() | scored | {"diverged": False, "failure": None, "own_loss": _own_loss(job, loaded, None)}
        )
    if arm.kind == "alone":
        return missing_scores() | _alone(job, loaded) | {"diverged": False, "failure": None}
    scorer = LossScorer(loaded, job.phase == "test")
    scorer = dataclasses.replace(scorer, base=draws.base_scores(job, scorer))
    loop = _loop(study, job, arm, loaded, scratch, scorer)
    outcome = run_rounds(loop)
    adapter = loop.aggregator.broadcast(outcome.state, loop.federation.server_ranks)
    scored = _scored(study, job, loaded, adapter)
    loss = scored["validation_loss"]
    # A run that ends in failures has no model of its own; its last one says nothing about the method.
    diverged = not outcome.has_progress or (loss is not None and not math.isfinite(loss))
    scored |= {"validation_loss": None} if diverged else {}
    return (
        _costs(loop, outcome, job.phase == "test")
        | scored
        | {"own_loss": _own_loss(job, loaded, _model_of(loop, outcome))}
        | {"diverged": diverged, "failure": outcome.stopped if diverged else None}
    )


def _scored(study: Study, job: Job, loaded: LoadedRun, adapter: Broadcast | None) -> dict[str, Any]:
    """Return the scores of a finished run: on unseen tasks only for draws that count."""
    if job.phase == "tuning":
        return {"validation_loss": validation_loss(loaded, adapter), "unseen": None, "categories": None}
    if not study.text:
        unseen = dict(NOTHING.model_dump(), loss=_unseen_loss(loaded, adapter), rouge_l=None, exact_match=None)
        return {"validation_loss": validation_loss(loaded, adapter), "unseen": unseen, "categories": None}
    scores = Scorer(loaded).scores(adapter)
    return {
        "validation_loss": scores.validation_loss,
        "unseen": scores.unseen.model_dump(),
        "categories": {name: own.model_dump() for name, own in scores.categories.items()},
    }


def _costs(loop: Loop, outcome: Outcome, has_unseen: bool) -> dict[str, Any]:
    """Return curve and costs of a finished loop."""
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
        "up_bytes": sum(record.up_bytes for record in records),
        "down_bytes": sum(record.down_bytes for record in records),
        "server_seconds": sum(
            record.seconds.get(stage, 0.0) for record in records for stage in ("broadcast", "aggregate")
        ),
        "client_seconds": sum(record.seconds.get("train", 0.0) for record in records),
    }


def _loop(study: Study, job: Job, arm: Arm, loaded: LoadedRun, scratch: Path, scorer: "LossScorer") -> Loop:
    """Return the round loop of a job, scored by losses alone along its way."""
    clients = _clients(arm, loaded)
    method = read_method(arm.method or {"name": FEDERATED_AVERAGING})
    loop = round_loop(loaded, method, clients, scratch, lambda event: None, job.learning_rate)
    every = max(1, loop.settings.num_rounds // study.evaluations)
    settings = dataclasses.replace(
        loop.settings, patience=None, evaluate_every=every, checkpoint_every=every, keep_checkpoints=1
    )
    if arm.clients == "only_largest":
        share = len(clients) / len(loaded.participants.clients)
        settings = dataclasses.replace(settings, cohort_size=max(1, round(settings.cohort_size * share)))
    loop = dataclasses.replace(loop, settings=settings, evaluator=scorer)
    return _pooled(loop, loaded) if arm.kind == "centralised" else loop


def _clients(arm: Arm, loaded: LoadedRun) -> Sequence[ClientSpec]:
    """Return who takes part, at which ranks."""
    clients = loaded.participants.clients
    if arm.clients == "smallest":
        return at_smallest_ranks(loaded)
    if arm.clients == "own" and arm.kind == "method":
        return clients
    largest = largest_plan(loaded)
    if arm.kind == "centralised":
        num_examples = sum(client.num_examples for client in clients)
        return [ClientSpec("pooled", largest, num_examples)]
    if arm.clients == "only_largest":
        return [client for client in clients if client.plan == largest]
    return [dataclasses.replace(client, plan=largest) for client in clients]


def largest_plan(loaded: LoadedRun) -> RankPlan:
    """Return the rank plan with the most parameters."""
    plans = sorted(loaded.participants.plans.values(), key=lambda plan: plan.name)
    return max(plans, key=lambda plan: sum(r * sum(loaded.shapes[m]) for m, r in plan.resolve(loaded.shapes).items()))


def _pooled(loop: Loop, loaded: LoadedRun) -> Loop:
    """Return a loop whose only client has everybody's examples and makes as many steps as a cohort does."""
    training, clients = local_training(loaded.config), loaded.participants.clients
    steps = [training.num_steps(client.num_examples) for client in clients]
    num_steps = max(1, round(cohort_size(loaded.config, len(clients)) * sum(steps) / len(steps)))
    pooled = PooledExamples(loaded)
    settings: LocalTraining = dataclasses.replace(training, max_steps=num_steps, num_epochs=1e9)
    engine = SimulationEngine(loaded.model, lambda client_id: pooled, settings, loaded.train_one)
    return dataclasses.replace(loop, engine=engine)


class PooledExamples(Sequence[EncodedExample]):
    """The training examples of all clients one after the other, tokenised when they are first looked at."""

    def __init__(self, loaded: LoadedRun) -> None:
        """Look at no example yet."""
        self._loaded = loaded
        self._owners = [
            (client.client_id, index) for client in loaded.participants.clients for index in range(client.num_examples)
        ]

    def __len__(self) -> int:
        """Return the number of examples of all clients."""
        return len(self._owners)

    def __getitem__(self, index: Any) -> Any:
        """Return one example."""
        client_id, own = self._owners[index]
        return self._loaded.training_examples(client_id)[own]


def _model_of(loop: Loop, outcome: Outcome) -> Callable[[ClientSpec], Broadcast]:
    """Return client -> the model it would start from now, at its own ranks where the arm lets it have them."""
    plans = {client.client_id: client.plan for client in loop.federation.clients}
    shapes, made = loop.federation.shapes, {}

    def model(client: ClientSpec) -> Broadcast:
        """Return the broadcast of a client's plan, made once."""
        plan = plans.get(client.client_id)
        if plan not in made:
            ranks = loop.federation.server_ranks if plan is None else plan.resolve(shapes)
            made[plan] = loop.aggregator.broadcast(outcome.state, ranks)
        return made[plan]

    return model


def _own_loss(job: Job, loaded: LoadedRun, model: Callable[[ClientSpec], Broadcast] | None) -> float | None:
    """Return the mean loss of sampled clients on their own test examples; None for tuning draws."""
    if job.phase == "tuning":
        return None
    losses = [_loss_on_own(loaded, client, model and model(client)) for client in _own_clients(loaded)]
    return math.fsum(losses) / len(losses) if losses else None


def _own_clients(loaded: LoadedRun) -> list[ClientSpec]:
    sampled = sampled_clients(loaded, OWN_CLIENTS_PER_PLAN, "compare-own")
    return [client for clients in sampled.values() for client in clients]


def _loss_on_own(loaded: LoadedRun, client: ClientSpec, adapter: Broadcast | None, part: str = "test") -> float:
    data = loaded.config.data
    examples = getattr(loaded.participants.corpus.clients[client.client_id], part)
    return answer_loss(loaded.model, adapter, examples, data.template, data.max_length)


def _alone(job: Job, loaded: LoadedRun) -> dict[str, Any]:
    """Return the mean scores of sampled clients that train alone, each for as many steps as its epochs have."""
    training = dataclasses.replace(
        local_training(loaded.config), num_epochs=loaded.config.evaluation.local_only_epochs, max_steps=None
    )
    own, unseen, validation = [], [], []
    for client in _own_clients(loaded):
        ranks = client.plan.resolve(loaded.shapes)
        start = loaded.model.initial_adapter(ranks, loaded.scaling, stream_seed(job.seed, "initial-adapter"))
        trained, _ = (loaded.train_one or train_client)(
            loaded.model,
            Broadcast(start),
            loaded.training_examples(client.client_id),
            training,
            job.learning_rate,
            stream_seed(job.seed, "alone", client.client_id),
        )
        adapter = Broadcast(trained)
        if loaded.participants.corpus.clients[client.client_id].validation:
            validation.append(_loss_on_own(loaded, client, adapter, "validation"))
        if job.phase == "test":
            own.append(_loss_on_own(loaded, client, adapter))
            unseen.append(_unseen_loss(loaded, adapter))
    score = {"loss": _mean(unseen), "rouge_l": None, "exact_match": None, "num_examples": 0, "num_tasks": 0}
    return {
        "validation_loss": _mean(validation),
        "own_loss": _mean(own),
        "unseen": score if unseen else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _unseen_loss(loaded: LoadedRun, adapter: Broadcast | None) -> float:
    data = loaded.config.data
    examples = [example for own in unseen_tasks(loaded).values() for example in own]
    batch_size = loaded.config.evaluation.batch_size
    return answer_loss(loaded.model, adapter, examples, data.template, data.max_length, batch_size)


@dataclass(frozen=True)
class LossScorer:
    """Scores a run along its way by losses alone; text is generated at the end, if at all.

    Attributes:
        loaded: The draw.
        unseen: Whether unseen tasks are looked at.
        base: Scores of the base model, where they are known already.
    """

    loaded: LoadedRun
    unseen: bool
    base: EvaluationRecord | None = None

    def scores(self, adapter: Broadcast | None) -> EvaluationRecord:
        """Return validation loss and, for draws that count, the loss on unseen tasks."""
        if adapter is None and self.base is not None:
            return self.base
        unseen = NOTHING
        if self.unseen:
            unseen = NOTHING.model_copy(update={"loss": _unseen_loss(self.loaded, adapter)})
        return EvaluationRecord(
            unseen=unseen,
            unseen_unweighted=unseen,
            categories={},
            validation_loss=validation_loss(self.loaded, adapter),
        )

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        """Return none: they are not compared."""
        return {}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
