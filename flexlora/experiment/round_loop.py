"""Builds a round loop from a loaded run: method, engine, clients, schedule and scorer."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flexlora.aggregators.base import Aggregator, state_types
from flexlora.aggregators.registry import MethodError, method_class
from flexlora.aggregators.settings import Traits, traits_of
from flexlora.engines.simulation import SimulationEngine
from flexlora.experiment.config import Config
from flexlora.experiment.gathered import GatheredRun
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.method_config import MethodConfig
from flexlora.experiment.participants import clock_of
from flexlora.experiment.private_rounds import cohort_seed_of, privacy_of
from flexlora.experiment.scoring import Scorer
from flexlora.experiment.stages import Notify, Stage, Work
from flexlora.experiment.workload import local_training
from flexlora.federation.clients import ClientSpec, largest_ranks
from flexlora.federation.streams import stream_seed
from flexlora.lora.factors import Scaling
from flexlora.rounds.clock import clients_per_round
from flexlora.rounds.loop_parts import Federation, Loop, RoundSettings
from flexlora.rounds.records import RECORDS_FILE, last_round
from flexlora.training.schedule import learning_rate_at
from flexlora.uplink.compression import Compression
from flexlora.uplink.robust_settings import RobustSettings
from flexlora.uplink.secure_total import SecureSumSettings, sketch_size


def round_loop(
    loaded: LoadedRun,
    method: MethodConfig,
    clients: Sequence[ClientSpec],
    folder: Path,
    notify: Notify,
    base_learning_rate: float | None = None,
) -> Loop:
    """Return a round loop of ``method`` over ``clients`` that keeps its files in ``folder``.

    Args:
        method: The method, not always that of the configuration.
        clients: Everybody who can be sampled; where that is a part of the participants, cohorts are smaller by it.
        folder: Where records and checkpoints go.
        notify: Told about each step.
        base_learning_rate: What the schedule starts from; None takes that of the configuration.
    """
    rounds = loaded.config.rounds
    aggregator = aggregator_of(method, loaded.scaling)
    traits = traits_of(aggregator)
    ranks = largest_ranks({client.plan for client in clients}, loaded.shapes)
    if traits.server_rank is not None:
        ranks = dict.fromkeys(ranks, traits.server_rank)
    seed = stream_seed(loaded.config.seed, "initial-adapter")
    size = cohort_of(loaded, len(clients))
    return Loop(
        aggregator=aggregator,
        state_types=state_types(aggregator),
        engine=loaded.engine(
            SimulationEngine(
                loaded.model,
                loaded.training_examples,
                local_training(loaded.config, traits),
                loaded.train_one,
                clients_per_group=loaded.config.model.clients_per_group,
            )
        ),
        federation=Federation(
            clients=clients,
            shapes=loaded.shapes,
            server_ranks=ranks,
            initial_adapter=loaded.model.initial_adapter(ranks, loaded.scaling, seed),
            scaling=loaded.scaling,
            wire_dtype=rounds.wire_dtype,
            compression=compression_of(loaded.config),
        ),
        settings=round_settings(loaded.config, size),
        learning_rate=learning_rates(loaded.config, base_learning_rate),
        evaluator=Scorer(loaded),
        folder=folder,
        notify=notify,
        clock=clock_of(loaded.config, loaded.participants, traits, size),
        secure_sum=_secure_sum(loaded, traits, clients) if method == loaded.config.method else None,
        robust=None if rounds.robust is None else RobustSettings(**rounds.robust.model_dump()),
        privacy=privacy_of(loaded.config, traits, len(clients), size, ranks, method.name),
    )


def compression_of(config: Config) -> Compression | None:
    """Return how updates are made smaller than the type in which factors travel."""
    rounds = config.rounds
    return None if rounds.upload_bits is None else Compression(rounds.upload_bits, rounds.error_feedback)


def _secure_sum(loaded: LoadedRun, traits: Traits, clients: Sequence[ClientSpec]) -> SecureSumSettings | None:
    """Return how updates are added up without being seen, None if they need not be.

    AdamW moves an entry by at most ``(1 - beta1) / sqrt(1 - beta2)`` times the learning rate in a step
    (arXiv:1412.6980, sec. 2.1), SGD by the clipped norm of the gradient over ``1 - momentum``.
    """
    config = loaded.config.privacy.secure_sum
    if config is None or traits.secure_sums is None:
        return None
    training = local_training(loaded.config, traits)
    if config.largest_change is not None:
        largest = config.largest_change / loaded.config.training.learning_rate
    else:
        beta1, beta2 = training.betas
        step = (1 - beta1) / (1 - beta2) ** 0.5
        if training.optimizer == "sgd":
            step = (training.max_grad_norm or 1.0) / (1 - training.momentum)
        largest = step * max(training.num_steps(client.num_examples) for client in clients)
    settings = SecureSumSettings(
        summed=traits.secure_sums,
        largest_change=largest,
        threshold=config.threshold,
        num_neighbours=config.num_neighbours,
        word_bits=config.word_bits,
        columns=config.sketch_columns,
        most_bytes=config.max_bytes,
    )
    if settings.summed == "products":
        # A budget that leaves no sketch is told before any client trains.
        sketch_size(settings, loaded.shapes, 1)
    return settings


def rounds_stage(title: str, loop: Loop, left: Work | None = None) -> Stage:
    """Return the stage of a round loop, part of which may be done already.

    ``left`` is what the run has left to do, this loop included.
    """
    # The bar counts clients, so that it moves within a round.
    done = rounds_done(loop.folder)
    size = min(loop.settings.cohort_size, len(loop.federation.clients))
    size = size if loop.clock is None else clients_per_round(loop.clock.policy, size)
    return Stage(title, loop.settings.num_rounds * size, done * size, left=left)


def rounds_done(folder: Path) -> int:
    """Return how many rounds of a loop are recorded in its folder; what is damaged there is left to the loop."""
    return last_round(folder / RECORDS_FILE)


def aggregator_of(method: MethodConfig, scaling: Scaling) -> Aggregator[Any]:
    """Return the method that a configuration describes.

    Raises:
        MethodError: If its code cannot be loaded, or lacks a function that every method has.
    """
    made = method.make(method_class(method.name, method.path), scaling)
    traits = traits_of(made)
    required = ["init", "aggregate", "broadcast", "spectra"]
    required += ["add_changes"] * traits.adds_changes + ["broadcast_to"] * traits.per_client
    required += ["aggregate_sum"] * (traits.secure_sums is not None)
    required += ["add_noisy_changes"] * (traits.private_changes is not None)
    if missing := [name for name in required if not callable(getattr(made, name, None))]:
        raise MethodError(f"method.name: {method.name} needs {', '.join(missing)}; see docs/own-method.md")
    return made


def round_settings(config: Config, size: int) -> RoundSettings:
    """Return how long the loop runs, with cohorts of ``size`` clients, and what it keeps."""
    rounds = config.rounds
    return RoundSettings(
        num_rounds=rounds.num_rounds,
        cohort_size=size,
        seed=config.seed,
        cohort_seed=cohort_seed_of(config),
        evaluate_every=config.evaluation.every,
        patience=rounds.patience,
        min_updates=rounds.min_updates,
        sampling=rounds.sampling,
        max_failed_rounds=rounds.max_failed_rounds,
        keep_checkpoints=rounds.keep_checkpoints,
        checkpoint_every=rounds.checkpoint_every,
    )


def learning_rates(config: Config, base: float | None = None) -> Callable[[int], float]:
    """Return round -> learning rate, starting from ``base`` or the configuration's."""
    training = config.training
    return partial(
        learning_rate_at,
        base=training.learning_rate if base is None else base,
        schedule=training.schedule,
        num_rounds=config.rounds.num_rounds,
        warmup_rounds=training.warmup_rounds,
        halve_at=training.halve_at,
        final=training.final_learning_rate,
    )


def cohort_of(loaded: GatheredRun, num_clients: int) -> int:
    """Return the size of a cohort where only ``num_clients`` of the participants can be sampled: their share of it."""
    everybody = len(loaded.participants.clients)
    return max(1, round(cohort_size(loaded.config, everybody) * num_clients / everybody))


def cohort_size(config: Config, num_clients: int) -> int:
    """Return how many clients take part in each round."""
    rounds = config.rounds
    return min(num_clients, rounds.cohort_size or max(1, round(rounds.cohort_fraction * num_clients)))
