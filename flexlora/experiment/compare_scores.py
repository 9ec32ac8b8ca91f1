"""Scores a run of a comparison: losses along the way, and losses of sampled clients on their own examples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexlora.data.examples import Example
from flexlora.experiment.compare_jobs import Job
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.scoring import sampled_clients, unseen_tasks, validation_loss
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.kept_factors import with_kept
from flexlora.federation.messages import Broadcast
from flexlora.rounds.loop_parts import Loop, Outcome
from flexlora.rounds.records import EvaluationRecord, RankGroupRecord, ScoreRecord
from flexlora.training.evaluation import answer_loss, task_loss

OWN_CLIENTS_PER_PLAN = 2
"""Clients of each type whose own test examples are scored."""

NOTHING = ScoreRecord(rouge_l=0.0, exact_match=0.0, loss=0.0, num_examples=0, num_tasks=0)


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
            unseen = NOTHING.model_copy(update={"loss": unseen_loss(self.loaded, adapter)})
        return EvaluationRecord(
            unseen=unseen,
            unseen_unweighted=unseen,
            categories={},
            validation_loss=validation_loss(self.loaded, adapter),
        )

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        """Return none: they are not compared."""
        return {}


def model_of(loop: Loop, outcome: Outcome) -> Callable[[ClientSpec], Broadcast]:
    """Return client -> the model it would start from now, at its own ranks where the arm lets it have them.

    A factor that a client keeps is part of its model; one that has kept none yet starts from the broadcast's.
    """
    plans = {client.client_id: client.plan for client in loop.federation.clients}
    shapes, made = loop.federation.shapes, {}

    def model(client: ClientSpec) -> Broadcast:
        """Return the broadcast of a client's plan, made once, with the factor that the client keeps in place."""
        plan = plans.get(client.client_id)
        if plan not in made:
            ranks = loop.federation.server_ranks if plan is None else plan.resolve(shapes)
            made[plan] = loop.aggregator.broadcast(outcome.state, ranks)
        return with_kept(made[plan], outcome.kept.get(client.client_id))

    return model


def own_loss(job: Job, loaded: LoadedRun, model: Callable[[ClientSpec], Broadcast] | None) -> float | None:
    """Return the mean loss of sampled clients on their own test examples; None for tuning draws."""
    if job.phase == "tuning":
        return None
    losses = [loss_on_own(loaded, client, model and model(client)) for client in own_clients(loaded)]
    return math.fsum(losses) / len(losses) if losses else None


def own_validation_loss(loaded: LoadedRun, model: Callable[[ClientSpec], Broadcast]) -> float | None:
    """Return the mean loss of sampled clients on their own validation examples; None if none of them has any.

    It stands for the validation loss of methods without a global model, which no learning rate could change.
    """
    clients = [client for client in own_clients(loaded) if _own_examples(loaded, client, "validation")]
    return mean_of([loss_on_own(loaded, client, model(client), "validation") for client in clients])


def own_clients(loaded: LoadedRun) -> list[ClientSpec]:
    """Return the sampled clients of each type whose own test examples are scored."""
    sampled = sampled_clients(loaded, OWN_CLIENTS_PER_PLAN, "compare-own")
    return [client for clients in sampled.values() for client in clients]


def loss_on_own(loaded: LoadedRun, client: ClientSpec, adapter: Broadcast | None, part: str = "test") -> float:
    """Return the loss of a model on a client's own examples, ``test`` or ``validation``."""
    data, examples = loaded.config.data, _own_examples(loaded, client, part)
    return answer_loss(loaded.model, adapter, examples, data.template, data.max_length)


def _own_examples(loaded: LoadedRun, client: ClientSpec, part: str) -> Sequence[Example]:
    return getattr(loaded.participants.corpus.clients[client.client_id], part)


def mean_of(values: Sequence[float]) -> float | None:
    """Return the mean, None of nothing."""
    return math.fsum(values) / len(values) if values else None


def unseen_loss(loaded: LoadedRun, adapter: Broadcast | None) -> float:
    """Return nats per answer token on the unseen tasks, as scores with text have it."""
    data, batch_size = loaded.config.data, loaded.config.evaluation.batch_size
    return task_loss(loaded.model, adapter, unseen_tasks(loaded), data.template, data.max_length, batch_size)
