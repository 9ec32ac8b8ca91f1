"""Opens a run whose clients exchange files with it: what its folder says, its round loop, and its broadcasts.

The server loads no weights of the base model: it needs shapes and the digest of the weights, by which clients know
whether theirs are the same.
"""

import hashlib
import logging
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.aggregators.base import Aggregator, checked_broadcast, state_types
from flexlora.aggregators.settings import traits_of
from flexlora.data.examples import FederatedCorpus
from flexlora.engines.base import Parcel
from flexlora.engines.exchange_folder import ExchangeFolderEngine, write_broadcast
from flexlora.engines.exchange_manifest import BroadcastManifest, ExchangeError, read_regular
from flexlora.experiment.base import check_length, check_tokenizer, load_empty
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import dump_config
from flexlora.experiment.exchange_limits import offered_plans
from flexlora.experiment.loaded import adapted_shapes, scaling_rule
from flexlora.experiment.participants import Participants
from flexlora.experiment.round_loop import aggregator_of, learning_rates, round_settings
from flexlora.experiment.run_folder import BROADCASTS_FOLDER, EXCHANGE_FILE, read_run_config
from flexlora.experiment.settings_for_clients import settings_for_clients
from flexlora.experiment.stages import Notify, Stage, ignore
from flexlora.experiment.target_patterns import check_patterns
from flexlora.federation.clients import ClientSpec, RankPlan, largest_ranks
from flexlora.federation.messages import Broadcast
from flexlora.federation.streams import stream_seed
from flexlora.files import appearing_whole, write_whole
from flexlora.locks import locked
from flexlora.rounds.loop_parts import Federation, Loop
from flexlora.seal import sealed, unsealed
from flexlora.training.adapted_model import initial_adapter
from flexlora.training.base_digest import base_digest
from flexlora.training.targets import find_targets

log = logging.getLogger(__name__)

_KEPT_ROUNDS = 2
"""Rounds whose broadcasts stay in the folder of a run."""

_MOST_RECORD_BYTES = 100_000


class ExchangeRecord(BaseModel):
    """What tells the folders of one run from those of any other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = Field(default=1, ge=1, le=1)
    run_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    base_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    config_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class ExchangeRun:
    """A run whose clients exchange files with it.

    Attributes:
        folder: Of the run.
        config: The run.
        record: What its folders say.
        shapes: Module path -> (out_features, in_features) of every module that some client adapts.
        plans: Name -> rank plan that clients may choose.
        num_parameters: Of the base model.
        notes: Sentences about what of the base gets no adapter.
    """

    folder: Path
    config: Config
    record: ExchangeRecord
    shapes: Mapping[str, tuple[int, int]]
    plans: Mapping[str, RankPlan]
    num_parameters: int
    notes: tuple[str, ...] = ()

    @cached_property
    def aggregator(self) -> Aggregator[Any]:
        """The method of the run."""
        return aggregator_of(self.config.method, scaling_rule(self.config))

    @cached_property
    def server_ranks(self) -> dict[str, int]:
        """Module path -> rank of the global adapter."""
        ranks = largest_ranks(self.plans.values(), self.shapes)
        own = traits_of(self.aggregator).server_rank
        return ranks if own is None else dict.fromkeys(ranks, own)

    @property
    def participants(self) -> Participants:
        """Nobody yet, with the rank plans that are offered and without any data."""
        return Participants(FederatedCorpus({}, {}), (), (), self.plans, self.notes)

    def loop(
        self, num_rounds: int, clients: Sequence[ClientSpec] = (), engine: ExchangeFolderEngine | None = None
    ) -> Loop:
        """Return the loop of the run that ends after ``num_rounds`` and scores nothing.

        Args:
            num_rounds: The last round to be run now.
            clients: Who has replied in that round; all of them are its cohort.
            engine: Has their replies.
        """
        config, scaling = self.config, scaling_rule(self.config)
        settings = round_settings(config, max(1, len(clients)))
        return Loop(
            aggregator=self.aggregator,
            state_types=state_types(self.aggregator),
            engine=engine or ExchangeFolderEngine({}, {}, self.shapes),
            federation=Federation(
                clients=clients,
                shapes=self.shapes,
                server_ranks=self.server_ranks,
                initial_adapter=initial_adapter(
                    self.shapes, self.server_ranks, scaling, stream_seed(config.seed, "initial-adapter")
                ),
                scaling=scaling,
                wire_dtype=config.rounds.wire_dtype,
            ),
            settings=replace(settings, num_rounds=num_rounds, checkpoint_every=1),
            learning_rate=learning_rates(config),
            evaluator=None,
            folder=self.folder,
        )

    def arrived(self, state: Any, plan: RankPlan) -> Broadcast:
        """Return what clients of a plan are sent after a round, as it arrives."""
        broadcast = checked_broadcast(self.aggregator, state, plan.resolve(self.shapes))
        return Parcel(broadcast, self.config.rounds.wire_dtype).arrived

    def broadcasts(self, server_round: int) -> Path:
        """Return the folder with the broadcasts of a round, by plan."""
        return self.folder / BROADCASTS_FOLDER / f"round-{server_round:04d}"

    def write_broadcasts(self, state: Any, server_round: int, key: Path | None) -> Path:
        """Write what clients train from in a round, for all plans or none, unless it is there; return its folder."""
        target = self.broadcasts(server_round)
        if target.exists():
            return target
        with appearing_whole(target, replace=False) as partial:
            for name, plan in self.plans.items():
                write_broadcast(partial / name, self.arrived(state, plan), self._manifest(plan, server_round), key)
        for old in sorted(target.parent.glob("round-*"))[:-_KEPT_ROUNDS]:
            shutil.rmtree(old)
        return target

    def _manifest(self, plan: RankPlan, server_round: int) -> BroadcastManifest:
        """Return what a broadcast says of itself, without scalings and files."""
        return BroadcastManifest(
            run_id=self.record.run_id,
            server_round=server_round,
            base_sha256=self.record.base_sha256,
            config_sha256=self.record.config_sha256,
            plan=plan.name,
            rank=max(plan.resolve(self.shapes).values()),
            scalings={},
            files={},
            learning_rate=learning_rates(self.config)(server_round),
            run=settings_for_clients(
                self.config,
                run_id=self.record.run_id,
                base_sha256=self.record.base_sha256,
                plans=self.plans,
                shapes=self.shapes,
            ),
        )


def new_exchange(config: Config, folder: Path, notify: Notify = ignore) -> ExchangeRun:
    """Return a run that begins, with an id of its own; its folder is not touched.

    Raises:
        FlexLoraError: If the base model cannot be read, or clients could not adapt it as asked.
    """
    notify(Stage("Hashing the weights of the base model"))
    model = config.model
    record = ExchangeRecord(
        run_id=secrets.token_hex(16),
        base_sha256=base_digest(model.name_or_path, model.dtype, model.revision),
        config_sha256=hashlib.sha256(dump_config(config).encode()).hexdigest(),
    )
    return _with_shapes(folder, config, record, notify)


def open_exchange(folder: Path, notify: Notify = ignore) -> ExchangeRun:
    """Return the run in a folder.

    Raises:
        ExchangeError: If it is no run whose clients exchange files, or its configuration has been changed.
    """
    path = folder / EXCHANGE_FILE
    if not path.is_file():
        raise ExchangeError(f"{folder} must be a run that flexlora round init has made; it holds no {EXCHANGE_FILE}")
    try:
        record = ExchangeRecord.model_validate_json(unsealed(read_regular(path, _MOST_RECORD_BYTES))[0])
    except ValidationError as error:
        raise ExchangeError(f"{path} is damaged: {error.errors()[0]['msg']}; put a copy of it back") from error
    config = read_run_config(folder)
    if hashlib.sha256(dump_config(config).encode()).hexdigest() != record.config_sha256:
        raise ExchangeError(
            f"the configuration of {folder} must be the one that its clients train with; it has been changed: put a "
            "copy of config.yaml back, or start another run"
        )
    return _with_shapes(folder, config, record, notify)


def write_record(run: ExchangeRun) -> None:
    """Write what tells this run from others into its folder."""
    write_whole(run.folder / EXCHANGE_FILE, sealed(run.record.model_dump_json(indent=1)) + "\n")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes that would write out of the folder of a run.

    Raises:
        ExchangeError: If one is at work there.
    """

    def refusal(holder: str) -> ExchangeError:
        return ExchangeError(f"one process at a time writes to a run; {holder} is at work in {folder}: wait for it")

    with locked(folder, refusal):
        yield


def _with_shapes(folder: Path, config: Config, record: ExchangeRecord, notify: Notify) -> ExchangeRun:
    notify(Stage("Reading the shapes of the base model"))
    base, tokenizer = load_empty(config)
    check_length(base.config, config.data.max_length)
    check_tokenizer(base, tokenizer, config.data.template)
    targets = find_targets(base, config.lora.target_modules)
    check_patterns(config, targets)
    plans = offered_plans(config)
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    shapes = adapted_shapes(targets.shapes, plans.values())
    return ExchangeRun(folder, config, record, shapes, plans, num_parameters, targets.notes)
