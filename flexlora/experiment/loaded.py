"""Loads the base model beside the participants: what round loops, baselines and scores are made from."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from flexlora.data.encoded_clients import EncodedClients, encode_client, encoding_name
from flexlora.data.prompts import EncodedExample
from flexlora.engines.base import Engine
from flexlora.engines.process_layout import choose_processes
from flexlora.engines.processes import ChildProcesses, ProcessEngine
from flexlora.engines.ray_cluster import ActorSettings, RayActors, RayEngine
from flexlora.engines.simulation import SimulationEngine
from flexlora.experiment.base import (
    BaseModelError,
    base_name,
    check_length,
    check_tokenizer,
    load_base,
    num_processes,
    resolve_device,
)
from flexlora.experiment.config import Config
from flexlora.experiment.participants import Participants
from flexlora.experiment.stages import Notify, Stage, ignore
from flexlora.experiment.target_patterns import check_patterns
from flexlora.federation.clients import RankPlan
from flexlora.lora.factors import Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.one_client import TrainClient
from flexlora.training.targets import find_targets


@dataclass(frozen=True)
class LoadedRun:
    """A loaded base model with the participants: what loops, references and evaluations are made from.

    Attributes:
        config: The run.
        participants: Clients and data.
        model: The base, shared by all clients.
        shapes: Module path -> (out_features, in_features) of every module that some client adapts.
        scaling: The scaling rule.
        base_name: What adapters name as their base.
        train_one: A training loop of the user's own; None takes that of the package.
        notify: Told how far scoring is.
    """

    config: Config
    participants: Participants
    model: AdaptedModel
    shapes: Mapping[str, tuple[int, int]]
    scaling: Scaling
    base_name: str
    train_one: TrainClient | None = None
    notify: Notify = ignore

    @staticmethod
    def load(
        config: Config,
        participants: Participants,
        notify: Notify = ignore,
        train_one: TrainClient | None = None,
    ) -> "LoadedRun":
        """Load the base model and find the modules that clients adapt."""
        notify(Stage("Loading the base model"))
        if config.model.num_threads is not None:
            torch.set_num_threads(config.model.num_threads)
        device = resolve_device(config.model.device)
        if device.startswith("cuda"):
            # Resuming to the same bits needs kernels that add in a fixed order.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        base, tokenizer = load_base(config, device)
        check_length(base.config, config.data.max_length)
        check_tokenizer(base, tokenizer, config.data.template)
        targets = find_targets(base, config.lora.target_modules)
        check_patterns(config, targets)
        shapes = adapted_shapes(targets.shapes, participants.plans.values())
        if targets.notes:
            notify(Stage(f"{len(shapes)} modules to adapt", notes=targets.notes))
            participants = replace(participants, warnings=(*participants.warnings, *targets.notes))
        model = AdaptedModel(
            base, tokenizer, dropout=config.lora.dropout, gradient_checkpointing=config.model.gradient_checkpointing
        )
        scaling = scaling_rule(config)
        return LoadedRun(config, participants, model, shapes, scaling, base_name(config), train_one, notify)

    def engine(self, engine: SimulationEngine) -> Engine:
        """Return an engine that trains as this one does, in the processes or on the cluster of the configuration."""
        return ProcessEngine(engine, self._children) if self.config.ray is None else RayEngine(engine, self._actors)

    @cached_property
    def _actors(self) -> RayActors:
        settings = self.config.ray
        assert settings is not None
        return RayActors(
            self.model,
            ActorSettings(settings.address, settings.num_actors, settings.cpus_per_actor, settings.gpus_per_actor),
        )

    @cached_property
    def _children(self) -> ChildProcesses:
        settings = self.config.model
        device, size = resolve_device(settings.device), self.model.num_parameters
        return ChildProcesses(
            self.model, *choose_processes(device, size, num_processes(self.config), settings.num_threads)
        )

    def training_examples(self, client_id: str) -> Sequence[EncodedExample]:
        """Return the tokenised training examples of a client."""
        return self._encoded(client_id)

    @cached_property
    def _encoded(self) -> EncodedClients:
        data, seed, corpus, tokenizer = (
            self.config.data,
            self.config.seed,
            self.participants.corpus,
            self.model.tokenizer,
        )

        def encode(client_id: str) -> Sequence[EncodedExample]:
            """Return the training examples of a client as tokens."""
            return encode_client(
                client_id,
                corpus.clients[client_id].train,
                tokenizer,
                seed,
                template=data.template,
                max_length=data.max_length,
                loss_on=data.loss_on,
            )

        folder = None
        if corpus.folder is not None:
            name = encoding_name(tokenizer, [data.template, data.max_length, data.loss_on, seed])
            folder = None if name is None else corpus.folder / name
        return EncodedClients(corpus.clients, encode, folder)


def scaling_rule(config: Config) -> Scaling:
    """Return the rule every client's scaling follows."""
    return Scaling(config.lora.scaling, config.lora.lora_alpha)


def adapted_shapes(shapes: Mapping[str, tuple[int, int]], plans: Iterable[RankPlan]) -> dict[str, tuple[int, int]]:
    """Return the shapes of the modules that at least one plan adapts.

    Raises:
        BaseModelError: If a plan adapts none of them.
    """
    adapted: set[str] = set()
    for plan in plans:
        ranks = plan.resolve(shapes)
        if not ranks:
            raise BaseModelError(
                f"clients.types.{plan.name} adapts none of the {len(shapes)} target modules, such as "
                f"{next(iter(shapes))}; its patterns are {', '.join(pattern for pattern, _ in plan.patterns)}"
            )
        adapted |= ranks.keys()
    return {module: shapes[module] for module in sorted(adapted)}
