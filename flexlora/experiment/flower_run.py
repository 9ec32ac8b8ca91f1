"""Runs what a configuration describes with real clients: the rounds of a simulation, over a Grid of Flower."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from flwr.serverapp import Grid

from flexlora.aggregators.base import state_types
from flexlora.engines.flower.engine import FlowerEngine, Patience
from flexlora.engines.flower.nodes import ClientNodes
from flexlora.engines.flower.prompt_grid import PromptGrid
from flexlora.experiment.base import resolve_device
from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.export import write_run_adapters
from flexlora.experiment.federation_file import (
    KnownFederation,
    known_federation,
    new_run_id,
    read_federation,
    write_federation,
)
from flexlora.experiment.kept_answers import answer_keeper
from flexlora.experiment.loaded import LoadedRun, adapted_shapes, scaling_rule
from flexlora.experiment.manifest import manifest_of
from flexlora.experiment.method_failures import naming_failures
from flexlora.experiment.one_rank_methods import refuse_ranks
from flexlora.experiment.result import RunResult
from flexlora.experiment.round_loop import aggregator_of, round_loop, rounds_stage
from flexlora.experiment.run_folder import ExperimentError, held_folder, open_folder
from flexlora.experiment.scoring import Scorer
from flexlora.experiment.server_data import with_clients, without_clients
from flexlora.experiment.settings_for_clients import settings_for_clients
from flexlora.experiment.stages import Notify, Stage, ignore
from flexlora.report.answer_file import FEDERATED
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.loop_parts import Loop
from flexlora.rounds.records import RECORDS_FILE, ReferencesRecord, read_records
from flexlora.training.base_digest import base_digest

_SMALLEST_SECRET = 2**32
"""Smaller seeds can all be tried."""

Watch = Callable[[ClientNodes, str], None]
"""Told who is connected and refused, and a line about what has changed, whenever it does."""


def refuse_for_flower(config: Config) -> None:
    """Raise if a configuration asks for what only a simulation can do.

    Raises:
        ConfigError: Naming the settings.
    """
    problems = []
    if config.devices.profiles:
        problems.append("devices.profiles simulates devices, but real clients have their own; leave devices out")
    if config.ray is not None:
        problems.append("ray trains on a cluster, but real clients train on their own machines; leave ray out")
    if config.method.traits().personal:
        problems.append(
            f"clients of method.name={config.method.name} keep a part of their models, which only simulations keep for "
            "them so far; choose another method"
        )
    differential = config.privacy.differential
    if differential is not None and (differential.noise_seed or 0) < _SMALLEST_SECRET:
        problems.append(
            "privacy.differential.noise_seed must be a secret where clients are real: they are told seed, from which "
            f"noise and cohorts come without it; draw it at random, from {_SMALLEST_SECRET} to {2**64 - 1}"
        )
    if differential is not None and config.rounds.checkpoint_every > 1:
        problems.append(
            f"rounds.checkpoint_every={config.rounds.checkpoint_every} would repeat rounds after a crash whose models "
            "clients have seen, with the same noise and perhaps others taking part, and the difference has no noise; "
            "set rounds.checkpoint_every=1"
        )
    if problems:
        raise ConfigError(problems, "the configuration of a run with real clients")


def run_on_flower(
    config: Config,
    folder: Path | str,
    open_grid: Callable[[], AbstractContextManager[Grid]],
    *,
    resume: bool = False,
    overwrite: bool = False,
    notify: Notify = ignore,
    watch: Watch = lambda nodes, line: None,
) -> RunResult:
    """Run everything a configuration describes with the clients that connect, and leave a complete run folder behind.

    Args:
        config: The run. Of ``data``, what concerns the texts of clients is told to them; their data are their own.
        folder: Where to write; must not hold another run.
        open_grid: Gives the Grid once the base model is loaded and the folder is this run's own.
        resume: Go on with the run in ``folder``, with the clients that it had.
        overwrite: Delete the run in ``folder`` first.
        notify: Told about every stage and round.
        watch: Told who is connected.

    Raises:
        ConfigError: If the configuration is one for simulations only.
        ExperimentError: If ``folder`` does not suit, or too few clients connect.
        FlexLoraError: If the server's data or the base model cannot be read.
    """
    folder = Path(folder)
    refuse_for_flower(config)
    state_types(aggregator_of(config.method, scaling_rule(config)))
    with held_folder(config, folder, resume, overwrite):
        resolve_device(config.model.device)
        notify(Stage("Reading data"))
        loaded = LoadedRun.load(config, without_clients(config), notify)
        before = read_federation(folder) if resume else None
        run = settings_for_clients(
            config,
            run_id=new_run_id() if before is None else before.run_id,
            base_sha256=base_digest(config.model.name_or_path, config.model.dtype, config.model.revision),
            plans=loaded.participants.plans,
            shapes=loaded.shapes,
        )
        with open_grid() as grid:
            name_of_key = grid.name_of_key if isinstance(grid, PromptGrid) else None
            nodes = ClientNodes(grid, run, lambda line: watch(nodes, line), name_of_key)
            federation = before or _gathered(config, nodes, run.run_id, notify)
            if before is not None:
                notify(Stage(f"Waiting for the {len(before.clients)} clients of this run"))
                _wait_for_old(config, nodes, before)
            return _run_with(loaded, federation, nodes, grid, folder, overwrite and not resume, notify)


def _run_with(
    loaded: LoadedRun,
    federation: KnownFederation,
    nodes: ClientNodes,
    grid: Grid,
    folder: Path,
    anew: bool,
    notify: Notify,
) -> RunResult:
    """Run all rounds with clients that are known."""
    config, run = loaded.config, nodes.run
    refuse_ranks(config, {client.plan.name: client.plan for client in federation.clients})
    participants = with_clients(loaded.participants, federation.clients)
    shapes = adapted_shapes(loaded.shapes, participants.plans.values())
    loaded = dataclasses.replace(loaded, participants=participants, shapes=shapes)
    open_folder(config, manifest_of(loaded), folder, anew)
    write_federation(folder, federation)
    loop = _flower_loop(loaded, folder, notify)
    wanted = loop.settings.cohort_size
    asked = min(len(federation.clients), math.ceil(wanted * config.deployment.over_selection))
    patience = Patience(
        deadline_seconds=config.deployment.deadline_seconds,
        num_wanted=wanted if asked > wanted else None,
        rejoin_seconds=config.deployment.rejoin_seconds,
    )
    loop = dataclasses.replace(
        loop,
        engine=FlowerEngine(grid, run, nodes, patience),
        settings=dataclasses.replace(loop.settings, cohort_size=asked),
    )
    notify(rounds_stage(f"Federated rounds ({config.method.name})", loop))
    with naming_failures(loop.aggregator, config.method.name):
        outcome = run_rounds(loop)
        if outcome.has_progress:
            write_run_adapters(loaded, loop, outcome, folder)
    notify(Stage("Writing the report"))
    return RunResult.of(folder, config.method.name, outcome, read_records(folder / RECORDS_FILE), ReferencesRecord())


def _flower_loop(loaded: LoadedRun, folder: Path, notify: Notify) -> Loop:
    """Return the loop of a simulation, with a scorer only where there is something to score."""
    loop = round_loop(loaded, loaded.config.method, loaded.participants.clients, folder, notify)
    scorer = Scorer(loaded, answer_keeper(loaded, folder, FEDERATED)) if loaded.participants.corpus.unseen else None
    return dataclasses.replace(loop, evaluator=scorer)


def _gathered(config: Config, nodes: ClientNodes, run_id: str, notify: Notify) -> KnownFederation:
    """Return the federation of the clients that connect in time, at least ``deployment.min_clients`` of them."""
    least, seconds = config.deployment.min_clients, config.deployment.wait_seconds
    notify(Stage(f"Waiting for clients, {least} at least"))
    if not nodes.wait_for(lambda names: len(names) >= least and not nodes.num_pending, seconds):
        connected, refused = nodes.connected(), list(nodes.refused.values())
        if len(connected) < least:
            why = f"; refused were {len(refused)}, the first because {refused[0]}" if refused else ""
            raise ExperimentError(
                f"the run needs {least} clients (deployment.min_clients), and {len(connected)} connected in "
                f"{seconds:g} s (deployment.wait_seconds){why}"
            )
    return known_federation(run_id, [found.spec for found in nodes.connected().values()])


def _wait_for_old(config: Config, nodes: ClientNodes, before: KnownFederation) -> None:
    """Wait for the clients of a run that goes on; those that stay away fail in the rounds that sample them."""
    names = {client.client_id for client in before.clients}
    if not nodes.wait_for(names.issubset, config.deployment.rejoin_seconds):
        least = min(config.deployment.min_clients, len(names))
        if not nodes.wait_for(lambda found: len(names.intersection(found)) >= least, config.deployment.wait_seconds):
            raise ExperimentError(
                f"the run needs {least} of its {len(names)} clients to go on (deployment.min_clients), and "
                f"{len(names.intersection(nodes.connected()))} connected: start them again"
            )
