"""Makes the controls of a comparison: everybody at one rank, the largest alone, pooled data, and each client alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flexlora.data.prompts import EncodedExample
from flexlora.engines.simulation import SimulationEngine
from flexlora.experiment.client_plans import config_plans
from flexlora.experiment.compare_arms import Arm
from flexlora.experiment.compare_jobs import Job
from flexlora.experiment.compare_scores import loss_on_own, mean_of, own_clients, unseen_loss
from flexlora.experiment.control_clients import (
    at_largest_ranks,
    at_ranks_of,
    at_smallest_ranks,
    largest_plan,
    only_largest,
)
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.round_loop import cohort_size
from flexlora.experiment.workload import local_training
from flexlora.federation.clients import ClientSpec
from flexlora.federation.messages import Broadcast
from flexlora.federation.streams import stream_seed
from flexlora.rounds.loop_parts import Loop
from flexlora.training.one_client import LocalTraining, train_client


def clients_of(arm: Arm, loaded: LoadedRun, types: Sequence[str]) -> Sequence[ClientSpec]:
    """Return who takes part, at which ranks.

    Args:
        arm: Whose clients are meant.
        loaded: The draw.
        types: Client types of the distribution, whose smallest and largest ranks count although few clients may lack
            one of them; empty for those that occur in the draw.
    """
    clients = loaded.participants.clients
    if arm.clients == "own" and arm.kind == "method":
        return clients
    named = config_plans(loaded.config)
    if arm.client_type is not None:
        return at_ranks_of(named[arm.client_type], clients)
    plans = [named[name] for name in types if name in named]
    if arm.clients == "smallest":
        return at_smallest_ranks(loaded, plans)
    if arm.kind == "centralised":
        return [ClientSpec("pooled", largest_plan(loaded, plans), sum(client.num_examples for client in clients))]
    # Of those that are there: a small draw may lack the largest type, and somebody has to train.
    return only_largest(loaded) if arm.clients == "only_largest" else at_largest_ranks(loaded, plans)


def pooled(loop: Loop, loaded: LoadedRun) -> Loop:
    """Return a loop whose only client has everybody's examples and makes as many steps as a cohort does."""
    training, clients = local_training(loaded.config), loaded.participants.clients
    steps = [training.num_steps(client.num_examples) for client in clients]
    num_steps = max(1, round(cohort_size(loaded.config, len(clients)) * sum(steps) / len(steps)))
    pooled = PooledExamples(loaded)
    settings: LocalTraining = dataclasses.replace(training, max_steps=num_steps, num_epochs=1e9)
    engine = SimulationEngine(loaded.model, lambda client_id: pooled, settings, loaded.train_one)
    # One machine is none of the simulated devices, and nobody waits for it.
    federation = dataclasses.replace(loop.federation, compression=None)
    return dataclasses.replace(loop, engine=engine, clock=None, federation=federation)


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


def alone_scores(job: Job, loaded: LoadedRun) -> dict[str, Any]:
    """Return the mean scores of sampled clients that train alone, each for as many steps as its epochs have."""
    training = dataclasses.replace(
        local_training(loaded.config), num_epochs=loaded.config.evaluation.local_only_epochs, max_steps=None
    )
    own, unseen, validation = [], [], []
    for client in own_clients(loaded):
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
            validation.append(loss_on_own(loaded, client, adapter, "validation"))
        if job.phase == "test":
            own.append(loss_on_own(loaded, client, adapter))
            unseen.append(unseen_loss(loaded, adapter))
    score = {"loss": mean_of(unseen), "rouge_l": None, "exact_match": None, "num_examples": 0, "num_tasks": 0}
    return {
        "validation_loss": mean_of(validation),
        "own_loss": mean_of(own),
        "unseen": score if unseen else None,
    }
