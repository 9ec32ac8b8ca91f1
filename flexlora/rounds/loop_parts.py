"""Defines the parts of a round loop and what it remembers."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from flexlora.aggregators.base import Aggregator
from flexlora.engines.base import Engine
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast, KeptFactors
from flexlora.lora.factors import AdapterState, Scaling
from flexlora.rounds.clock import Breakdown, Clock, ClockState, Trip
from flexlora.rounds.records import ClientRecord, EvaluationRecord, RankGroupRecord, RoundRecord
from flexlora.text import count_text
from flexlora.uplink.base import CohortStep, UplinkStep
from flexlora.uplink.clip_and_noise import ClipAndNoise
from flexlora.uplink.compression import Compression
from flexlora.uplink.privacy_budget import PrivacyBudget, Spending
from flexlora.uplink.robust_settings import RobustSettings
from flexlora.uplink.wire import WireDtype


@dataclass(frozen=True)
class RoundSettings:
    """How long the loop runs and what it keeps; most fields are those of ``rounds`` in the configuration.

    Attributes:
        seed: Of the run; clients of a deployment know it.
        cohort_seed: Decides who takes part, where nobody else may know; None derives it from ``seed``.
    """

    num_rounds: int
    cohort_size: int
    seed: int
    cohort_seed: int | None = None
    evaluate_every: int = 1
    patience: int | None = None
    min_updates: int = 1
    sampling: Literal["fixed", "poisson"] = "fixed"
    max_failed_rounds: int = 3
    keep_checkpoints: int = 2
    checkpoint_every: int = 1


@dataclass(frozen=True)
class Federation:
    """Who takes part, and everything else that stays the same over the rounds.

    Attributes:
        clients: All clients that can be sampled.
        shapes: Module path -> (out_features, in_features) of every adapted module.
        server_ranks: Module path -> rank of the global adapter that is evaluated and exported.
        initial_adapter: PEFT's initial factors at the server ranks.
        scaling: The rule every client's scaling follows.
        wire_dtype: Dtype of the factors on their way.
        compression: How updates are made smaller than that; None sends them in ``wire_dtype``.
    """

    clients: Sequence[ClientSpec]
    shapes: Mapping[str, tuple[int, int]]
    server_ranks: Mapping[str, int]
    initial_adapter: AdapterState
    scaling: Scaling
    wire_dtype: WireDtype = "float32"
    compression: Compression | None = None


@dataclass(frozen=True)
class Privacy:
    """How updates are made private, and what that may cost.

    Attributes:
        mechanism: Clips and noises each round.
        budget: Accounts for it.
    """

    mechanism: ClipAndNoise
    budget: PrivacyBudget


@dataclass(frozen=True)
class PrivacySpent:
    """Where the private releases of a run stand.

    Attributes:
        clip: Of the next round.
        spending: Noise multipliers of the rounds so far.
        epsilon: What they cost.
    """

    clip: float
    spending: Spending = ()
    epsilon: float = 0.0

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "PrivacySpent":
        """Return what ``dataclasses.asdict`` made plain values of."""
        spending = tuple((float(noise), int(count)) for noise, count in values["spending"])
        return PrivacySpent(float(values["clip"]), spending, float(values["epsilon"]))


@dataclass(frozen=True)
class Progress:
    """What the loop remembers besides the aggregator's state.

    Attributes:
        best_round: The round with the lowest validation loss, 0 for the base model; its checkpoint is kept.
        clock: Virtual time, if it is simulated.
        sent: Round and plan name -> what clients still at work were sent; checkpointed as tensors.
        kept: Client id -> the factor that it keeps between rounds; checkpointed as tensors.
        privacy: What private releases have cost; None without them, and before the first.
        history: Digests of the lines of the record file, by round.
    """

    best_validation_loss: float | None = None
    best_round: int | None = None
    evaluations_without_gain: int = 0
    failed_rounds_in_a_row: int = 0
    num_updates: int = 0
    stopped: str | None = None
    clock: ClockState = field(default_factory=ClockState)
    sent: Mapping[str, Broadcast] = field(default_factory=dict)
    kept: Mapping[str, KeptFactors] = field(default_factory=dict)
    privacy: PrivacySpent | None = None
    history: tuple[str, ...] = ()

    def keeping(self, kept: Mapping[str, KeptFactors]) -> "Progress":
        """Return the progress after clients have trained the factors that they keep."""
        return dataclasses.replace(self, kept={**self.kept, **kept}) if kept else self

    def after_updates(self, num_updates: int, max_failed_rounds: int) -> "Progress":
        """Return the progress after a round that aggregated so many updates; stopped after too many without any."""
        failed_in_a_row = 0 if num_updates else self.failed_rounds_in_a_row + 1
        stopped = self.stopped
        if failed_in_a_row >= max_failed_rounds:
            stopped = (
                f"no update could be used in {count_text(failed_in_a_row, 'round')} in a row (rounds.max_failed_rounds)"
            )
        return dataclasses.replace(
            self, failed_rounds_in_a_row=failed_in_a_row, num_updates=self.num_updates + num_updates, stopped=stopped
        )

    def after_release(self, spent: PrivacySpent, stopped: str | None) -> "Progress":
        """Return the progress after a private release; ``stopped`` says why there may be no other."""
        return dataclasses.replace(self, privacy=spent, stopped=self.stopped or stopped)

    def after_evaluation(self, server_round: int, validation_loss: float | None, patience: int | None) -> "Progress":
        """Return the progress after an evaluation; stopped after ``patience`` of them without a lower loss."""
        best = self.best_validation_loss
        if validation_loss is None:
            return self
        if best is None or validation_loss < best:
            return dataclasses.replace(
                self, best_validation_loss=validation_loss, best_round=server_round, evaluations_without_gain=0
            )
        without_gain = self.evaluations_without_gain + 1
        stopped = self.stopped
        if patience is not None and without_gain >= patience and stopped is None:
            stopped = f"validation loss did not fall below {best:.4f} in {without_gain} evaluations (rounds.patience)"
        return dataclasses.replace(self, evaluations_without_gain=without_gain, stopped=stopped)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the tensors as plain values."""
        values = dataclasses.asdict(dataclasses.replace(self, sent={}, kept={}))
        del values["kept"]
        return values

    @staticmethod
    def from_json(
        values: Mapping[str, Any], sent: Mapping[str, Broadcast], kept: Mapping[str, KeptFactors]
    ) -> "Progress":
        """Return the progress whose plain values these are; values that earlier versions lack have their defaults."""
        clock = dict(values.get("clock", {}))
        trips = []
        for trip in clock.pop("trips", ()):
            breakdown = trip["breakdown"] and Breakdown(**trip["breakdown"])
            trips.append(Trip(**{**trip, "breakdown": breakdown}))
        state = ClockState(**clock, trips=tuple(trips))
        history = tuple(values.get("history", ()))
        privacy = values.get("privacy") and PrivacySpent.from_json(values["privacy"])
        own = {"clock": state, "sent": sent, "kept": kept, "privacy": privacy, "history": history}
        return Progress(**{**values, **own})


@dataclass(frozen=True)
class Outcome:
    """How the loop ended.

    Attributes:
        state: The aggregator's state after the last round.
        server_round: That round.
        stopped: Why it ended before ``num_rounds``, or None.
        has_progress: Whether any update was ever aggregated and the run did not end in failures.
        kept: Client id -> the factor that it keeps (``Broadcast.kept``).
    """

    state: Any
    server_round: int
    stopped: str | None
    has_progress: bool
    kept: Mapping[str, KeptFactors] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundEvent:
    """Something a display may show while a round is running.

    Attributes:
        kind: ``cohort`` (sampled), ``client`` (one outcome arrived), ``evaluating`` or ``done``.
        server_round: The round it belongs to.
        num_clients: Size of the cohort.
        client: The outcome, for ``client``.
        record: The record, for ``done``.
    """

    kind: Literal["cohort", "client", "evaluating", "done"]
    server_round: int
    num_clients: int = 0
    client: ClientRecord | None = None
    record: RoundRecord | None = None


@runtime_checkable
class Evaluator(Protocol):
    """Scores models while the loop runs."""

    def scores(self, adapter: Broadcast | None) -> EvaluationRecord:
        """Return the scores of the base with this adapter, or of the base alone for None."""
        ...

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        """Return how each kind of client is served, once, after the last round."""
        ...


@dataclass(frozen=True)
class Loop:
    """Everything a loop is made of.

    Attributes:
        aggregator: The method.
        state_types: The dataclasses its states are made of, for reading checkpoints.
        engine: What trains a cohort.
        federation: Who takes part.
        settings: How long it runs and what it keeps.
        learning_rate: Round -> learning rate.
        evaluator: Scores the global adapter; None where the server has nothing to score it on.
        folder: Where ``records.jsonl`` and ``checkpoints/`` are.
        notify: Called at each step, for progress displays.
        uplink: The steps between clients and server; the engine runs the client ends, the loop the server ends.
        secure_sum: How updates are added up without being seen; None sends them one by one.
        privacy: How updates are clipped and noised; None takes them as they are.
        robust: How far each client of a cohort is believed; None believes all. Not with ``privacy``.
        clock: Decides in virtual time who is available, who is late and how long a round takes; without one, every
            client is available and in time.
    """

    aggregator: Aggregator[Any]
    state_types: tuple[type, ...]
    engine: Engine
    federation: Federation
    settings: RoundSettings
    learning_rate: Callable[[int], float]
    evaluator: Evaluator | None
    folder: Path
    notify: Callable[[RoundEvent], None] = lambda event: None
    uplink: Sequence[UplinkStep] = ()
    clock: Clock | None = None
    secure_sum: CohortStep | None = None
    privacy: Privacy | None = None
    robust: RobustSettings | None = None


@dataclass
class Stopwatch:
    """Wall seconds per stage of one round."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to that of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
