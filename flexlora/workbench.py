"""A loaded base model with the participants: what round loops, references and scores are made from."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flexlora import FlexLoraError
from flexlora.aggregators import AGGREGATORS, STATE_TYPES
from flexlora.aggregators.base import Aggregator
from flexlora.clients import (
    Broadcast,
    ClientSpec,
    RankPlan,
    compact_ranks,
    stream,
    stream_seed,
)
from flexlora.clock import clients_per_round
from flexlora.config import Config
from flexlora.data.encoded_clients import EncodedClients, encoding_name
from flexlora.data.examples import Example
from flexlora.data.prompts import EncodedExample, encode_many
from flexlora.engines.base import Engine
from flexlora.engines.ray_cluster import ActorSettings, RayActors, RayEngine
from flexlora.engines.simulation import SimulationEngine
from flexlora.engines.workers import Workers, WorkersEngine, plan_processes
from flexlora.evaluation import Score, answer_loss, combine, evaluate
from flexlora.lora.factors import AdapterState, Scaling
from flexlora.lora.product import Split
from flexlora.model import AdaptedModel, load_base_model, target_modules
from flexlora.participants import Participants, base_name, clock_of
from flexlora.report.records import (
    RECORDS_FILE,
    EvaluationRecord,
    RankGroupRecord,
    ScoreRecord,
    read_records,
)
from flexlora.rounds import (
    Federation,
    Loop,
    RoundEvent,
    RoundSettings,
    adapter_spectra,
)
from flexlora.training import LocalTraining, learning_rate_at


class WorkbenchError(FlexLoraError, ValueError):
    """A device or rank plan that the base model cannot serve."""


@dataclass(frozen=True)
class Stage:
    """One part of a run, for progress displays: how many steps it has and how many are done already."""

    title: str
    num_steps: int | None = None
    completed: int = 0
    notes: tuple[str, ...] = ()


Notify = Callable[[RoundEvent | Stage], None]


@dataclass(frozen=True)
class Workbench:
    """A loaded base model with the participants: what loops, references and evaluations are made from.

    Attributes:
        config: The run.
        participants: Clients and data.
        model: The base, shared by all clients.
        shapes: Module path -> (out_features, in_features) of every module that some client adapts.
        scaling: The scaling rule.
        base_name: What adapters name as their base.
    """

    config: Config
    participants: Participants
    model: AdaptedModel
    shapes: Mapping[str, tuple[int, int]]
    scaling: Scaling
    base_name: str

    @staticmethod
    def load(config: Config, participants: Participants, notify: Notify = lambda event: None) -> "Workbench":
        """Load the base model and find the modules that clients adapt."""
        notify(Stage("Loading the base model"))
        if config.model.num_threads is not None:
            torch.set_num_threads(config.model.num_threads)
        device = resolve_device(config.model.device)
        if device.startswith("cuda"):
            # Resuming to the same bits needs kernels that add in a fixed order.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        name = base_name(config)
        base, tokenizer = load_base_model(
            name,
            dtype=config.model.dtype,
            device=device,
            attn_implementation=config.model.attn_implementation,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
        check_length(base.config, config.data.max_length)
        shapes = adapted_shapes(target_modules(base, config.lora.target_modules), participants.plans.values())
        model = AdaptedModel(base, tokenizer, dropout=config.lora.dropout)
        scaling = scaling_rule(config)
        return Workbench(config, participants, model, shapes, scaling, name)

    def loop(
        self,
        method: Mapping[str, Any],
        clients: Sequence[ClientSpec],
        folder: Path,
        notify: Notify,
        base_learning_rate: float | None = None,
    ) -> Loop:
        """Return a round loop of ``method`` over ``clients`` that keeps its files in ``folder``.

        Args:
            method: As in the configuration, with its ``name``.
            clients: Everybody who can be sampled.
            folder: Where records and checkpoints go.
            notify: Told about each step.
            base_learning_rate: What the schedule starts from; None takes that of the configuration.
        """
        rounds, training = self.config.rounds, self.config.training
        options = {key: value for key, value in method.items() if key != "name"}
        aggregator: Aggregator[Any] = AGGREGATORS[method["name"]](scaling=self.scaling, **options)
        ranks = largest_ranks({client.plan for client in clients}, self.shapes)
        if (server_rank := options.get("server_rank")) is not None:
            ranks = {module: server_rank for module in ranks}
        seed = stream_seed(self.config.seed, "initial-adapter")
        base = training.learning_rate if base_learning_rate is None else base_learning_rate

        def learning_rate(server_round: int) -> float:
            return learning_rate_at(
                server_round,
                base=base,
                schedule=training.schedule,
                num_rounds=rounds.num_rounds,
                warmup_rounds=training.warmup_rounds,
                halve_at=training.halve_at,
            )

        return Loop(
            aggregator=aggregator,
            state_types=STATE_TYPES,
            engine=self._engine(
                SimulationEngine(
                    self.model,
                    self.training_examples,
                    local_training(self.config),
                    learning_rate,
                    self.config.seed,
                    rounds.wire_dtype,
                    clients_per_group=self.config.model.clients_per_group,
                )
            ),
            federation=Federation(
                clients=clients,
                shapes=self.shapes,
                server_ranks=ranks,
                initial_adapter=self.model.initial_adapter(ranks, self.scaling, seed),
                scaling=self.scaling,
                wire_dtype=rounds.wire_dtype,
            ),
            settings=RoundSettings(
                num_rounds=rounds.num_rounds,
                cohort_size=cohort_size(self.config, len(clients)),
                seed=self.config.seed,
                evaluate_every=self.config.evaluation.every,
                patience=rounds.patience,
                max_failed_rounds=rounds.max_failed_rounds,
                keep_checkpoints=rounds.keep_checkpoints,
                checkpoint_every=rounds.checkpoint_every,
            ),
            learning_rate=learning_rate,
            evaluator=Scorer(self),
            folder=folder,
            notify=notify,
            clock=clock_of(self.config, self.participants, method["name"], cohort_size(self.config, len(clients))),
        )

    def _engine(self, engine: SimulationEngine) -> Engine:
        return WorkersEngine(engine, self._workers) if self.config.ray is None else RayEngine(engine, self._actors)

    @cached_property
    def _actors(self) -> RayActors:
        settings = self.config.ray
        assert settings is not None
        return RayActors(
            self.model,
            ActorSettings(settings.address, settings.num_actors, settings.cpus_per_actor, settings.gpus_per_actor),
        )

    @cached_property
    def _workers(self) -> Workers:
        settings = self.config.model
        device, size = resolve_device(settings.device), self.model.num_parameters
        return Workers(self.model, *plan_processes(device, size, settings.num_processes, settings.num_threads))

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
            examples = corpus.clients[client_id].train
            rng = stream(seed, "answers", client_id)
            return encode_many(
                examples,
                tokenizer,
                data.template,
                data.max_length,
                loss_on=data.loss_on,
                answer_indices=[int(rng.integers(len(example.outputs))) for example in examples],
            )

        folder = None
        if corpus.folder is not None:
            name = encoding_name(tokenizer, [data.template, data.max_length, data.loss_on, seed])
            folder = None if name is None else corpus.folder / name
        return EncodedClients(corpus.clients, encode, folder)

    def score(self, adapter: Broadcast | None, tasks: Mapping[str, Sequence[Example]]) -> dict[str, Score]:
        """Return the score of the base with this adapter on each task."""
        data, evaluation = self.config.data, self.config.evaluation
        return evaluate(
            self.model,
            adapter,
            tasks,
            template=data.template,
            max_length=data.max_length,
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
        )

    def validation_loss(self, adapter: Broadcast | None) -> float | None:
        """Return nats per answer token on the fixed validation set, None without one."""
        examples, data = self.participants.validation, self.config.data
        if not examples:
            return None
        batch_size = self.config.evaluation.batch_size
        return answer_loss(self.model, adapter, examples, data.template, data.max_length, batch_size)

    def unseen_tasks(self) -> dict[str, Sequence[Example]]:
        """Return the examples that zero-shot scores are about."""
        limit = self.config.data.test_examples_per_task
        return {task: splits.test[:limit] for task, splits in self.participants.corpus.unseen.items()}

    def own_tests(self, clients: Sequence[ClientSpec]) -> dict[str, Sequence[Example]]:
        """Return the test examples of some clients that have any."""
        limit, corpus = self.config.data.test_examples_per_task, self.participants.corpus
        tests = {client.client_id: corpus.clients[client.client_id].test[:limit] for client in clients}
        return {client_id: examples for client_id, examples in tests.items() if examples}

    def sampled_clients(self, per_plan: int, purpose: str) -> dict[str, list[ClientSpec]]:
        """Return up to ``per_plan`` clients of each plan that have test examples, seeded, sorted by id."""
        sampled: dict[str, list[ClientSpec]] = {}
        for name in self.participants.plans:
            candidates = [
                client
                for client in self.participants.clients
                if client.plan.name == name and self.participants.corpus.clients[client.client_id].test
            ]
            order = stream(self.config.seed, purpose, name).permutation(len(candidates))[:per_plan]
            sampled[name] = [candidates[index] for index in sorted(order)]
        return sampled


@dataclass(frozen=True)
class Scorer:
    """Scores adapters for the round loop: unseen tasks, the validation set, and each rank group at the end."""

    workbench: Workbench

    def scores(self, adapter: Broadcast | None) -> EvaluationRecord:
        """Return the scores of the base with this adapter, or of the base alone for None."""
        corpus = self.workbench.participants.corpus
        by_task = self.workbench.score(adapter, self.workbench.unseen_tasks())
        categories: dict[str, list[Score]] = {}
        for task, score in by_task.items():
            categories.setdefault(corpus.unseen[task].category or "all", []).append(score)
        return EvaluationRecord(
            unseen=combined_record(by_task.values()),
            unseen_unweighted=combined_record(by_task.values(), weighted=False),
            categories={name: combined_record(scores) for name, scores in sorted(categories.items())},
            validation_loss=self.workbench.validation_loss(adapter),
        )

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        """Return, per plan, the adapter cut to its ranks on the unseen tasks and on its clients' own test data."""
        per_plan = self.workbench.config.evaluation.rank_group_clients
        groups = {}
        for name, clients in self.workbench.sampled_clients(per_plan, "rank-groups").items() if per_plan else ():
            plan = self.workbench.participants.plans[name]
            # Without the frozen branch of methods that send one: what a device of these ranks can keep.
            adapter, own = Broadcast(broadcast(plan).trainable), self.workbench.own_tests(clients)
            groups[name] = RankGroupRecord(
                ranks=compact_ranks(plan.resolve(self.workbench.shapes), self.workbench.shapes),
                num_clients=len(own),
                unseen=combined_record(self.workbench.score(adapter, self.workbench.unseen_tasks()).values()),
                own=combined_record(self.workbench.score(adapter, own).values()) if own else None,
                base_own=combined_record(self.workbench.score(None, own).values()) if own else None,
            )
        return groups


def combined_record(scores: Iterable[Score], *, weighted: bool = True) -> ScoreRecord:
    """Return the mean over tasks, weighted by their examples or not, as it is recorded."""
    return ScoreRecord(**dataclasses.asdict(combine(list(scores), weighted=weighted)))


def adapter_at_rank(adapter: Broadcast, rank: int, scaling: Scaling, split: Split = "b") -> AdapterState:
    """Return the best approximation of an adapter whose modules have at most this rank (Eckart and Young).

    Whatever the method, the change is cut and not its factors, whose rows mean nothing in an order of their own.
    """
    factors = {}
    for module, spectrum in adapter_spectra(adapter).items():
        own = min(rank, adapter.trainable[module].rank)
        factors[module] = spectrum.factors(own, scaling(own), split, adapter.trainable[module].A).to(torch.float32)
    return factors


def rounds_stage(title: str, loop: Loop) -> Stage:
    """Return the stage of a round loop, part of which may be done already."""
    # The bar counts clients, so that it moves within a round.
    done = max((record.server_round for record in read_records(loop.folder / RECORDS_FILE)), default=0)
    size = min(loop.settings.cohort_size, len(loop.federation.clients))
    size = size if loop.clock is None else clients_per_round(loop.clock.policy, size)
    return Stage(title, loop.settings.num_rounds * size, done * size)


def scaling_rule(config: Config) -> Scaling:
    """Return the rule every client's scaling follows."""
    return Scaling(config.lora.scaling, config.lora.lora_alpha)


def resolve_device(name: str) -> str:
    """Return the device that ``auto`` stands for, or the one named.

    Raises:
        WorkbenchError: If CUDA is asked for where there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise WorkbenchError(f"model.device={name} needs a CUDA device and there is none; use model.device=cpu or auto")
    return name


def check_length(config: Any, max_length: int) -> None:
    """Raise if sequences can be longer than the base model's context.

    Raises:
        WorkbenchError: Naming both lengths.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise WorkbenchError(
            f"data.max_length must be at most {context}, the context of the base model; got {max_length}"
        )


def adapted_shapes(shapes: Mapping[str, tuple[int, int]], plans: Iterable[RankPlan]) -> dict[str, tuple[int, int]]:
    """Return the shapes of the modules that at least one plan adapts.

    Raises:
        WorkbenchError: If a plan adapts none of them.
    """
    adapted: set[str] = set()
    for plan in plans:
        ranks = plan.resolve(shapes)
        if not ranks:
            raise WorkbenchError(
                f"clients.types.{plan.name} adapts none of the {len(shapes)} target modules, such as "
                f"{next(iter(shapes))}; its patterns are {', '.join(pattern for pattern, _ in plan.patterns)}"
            )
        adapted |= ranks.keys()
    return {module: shapes[module] for module in sorted(adapted)}


def largest_ranks(plans: Iterable[RankPlan], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return, per module, the largest rank of any plan."""
    ranks: dict[str, int] = {}
    for plan in plans:
        for module, rank in plan.resolve(shapes).items():
            ranks[module] = max(rank, ranks.get(module, 0))
    return dict(sorted(ranks.items()))


def smallest_ranks(plans: Sequence[RankPlan], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return, per module that every plan adapts, the smallest rank: what all clients can afford.

    Where no module is adapted by all, the plan with the fewest parameters decides.
    """
    resolved = [plan.resolve(shapes) for plan in plans]
    shared = set.intersection(*(set(ranks) for ranks in resolved))
    if shared:
        return {module: min(ranks[module] for ranks in resolved) for module in sorted(shared)}
    return min(resolved, key=lambda ranks: sum(rank * sum(shapes[module]) for module, rank in ranks.items()))


def local_training(config: Config) -> LocalTraining:
    """Return the settings of one client's training."""
    training = config.training
    return LocalTraining(
        optimizer=training.optimizer,
        batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_epochs=training.num_epochs,
        max_steps=training.max_steps,
        max_grad_norm=training.max_grad_norm,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
    )


def cohort_size(config: Config, num_clients: int) -> int:
    """Return how many clients take part in each round."""
    rounds = config.rounds
    return min(num_clients, rounds.cohort_size or max(1, round(rounds.cohort_fraction * num_clients)))
