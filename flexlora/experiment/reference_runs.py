"""Runs FedIT as what a run is compared with: everybody at the smallest or the largest rank, or large clients alone."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.experiment.config import EvaluationConfig
from flexlora.experiment.control_clients import at_largest_ranks, at_smallest_ranks, only_largest
from flexlora.experiment.gathered import GatheredRun
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.method_config import FEDERATED_AVERAGING, read_method
from flexlora.experiment.round_loop import round_loop, rounds_stage
from flexlora.experiment.scoring import OnAnswers, Scorer
from flexlora.experiment.stages import Notify, Work
from flexlora.federation.clients import ClientSpec, RankPlan, compact_ranks
from flexlora.federation.messages import Broadcast
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.records import (
    RECORDS_FILE,
    EvaluationRecord,
    RankGroupRecord,
    ReferenceRunRecord,
    RoundScoreRecord,
    read_records,
)
from flexlora.text import describe_ranks


@dataclass(frozen=True)
class ReferenceRun:
    """A further run that a run is compared with: FedIT on the same seed, rounds and data.

    Attributes:
        name: Its field of `ReferencesRecord`, and its folder.
        in_words: What a progress display calls it.
        clients: Who takes part, at which ranks.
        wanted: Whether the settings ask for it.
        learning_rate: Where its schedule starts; None is the run's own.
    """

    name: str
    in_words: str
    clients: Callable[[GatheredRun], list[ClientSpec]]
    wanted: Callable[[EvaluationConfig], bool]
    learning_rate: Callable[[EvaluationConfig], float | None]


REFERENCE_RUNS = (
    ReferenceRun(
        "fedit_smallest_rank",
        "FedIT, every client at the smallest rank",
        at_smallest_ranks,
        lambda evaluation: evaluation.fedit_reference,
        lambda evaluation: evaluation.fedit_learning_rate,
    ),
    ReferenceRun(
        "large_clients_alone",
        "FedIT, large clients alone",
        only_largest,
        lambda evaluation: evaluation.large_alone_reference,
        lambda evaluation: evaluation.large_alone_learning_rate,
    ),
    ReferenceRun(
        "fedit_largest_rank",
        "FedIT, every client at the largest rank",
        at_largest_ranks,
        lambda evaluation: evaluation.fedit_largest_reference,
        lambda evaluation: evaluation.fedit_largest_learning_rate,
    ),
)


def wanted_runs(loaded: GatheredRun) -> Sequence[ReferenceRun]:
    """Return the reference runs that the settings ask for and that differ from the run and from each other."""
    # FedIT has one rank in any run, so a run of FedIT is its own reference.
    if loaded.config.method == read_method({"name": FEDERATED_AVERAGING}):
        return ()
    wanted = [run for run in REFERENCE_RUNS if run.wanted(loaded.config.evaluation)]
    # Where all clients have the same ranks, so do all references.
    ranks = {tuple(plan.resolve(loaded.shapes).items()) for plan in loaded.participants.plans.values()}
    return wanted if len(ranks) > 1 else wanted[:1]


def run_reference(
    run: ReferenceRun,
    loaded: LoadedRun,
    base: EvaluationRecord,
    num_rounds: int,
    folder: Path,
    notify: Notify,
    on_answers: OnAnswers = lambda adapter, answers: None,
    left: Work | None = None,
) -> ReferenceRunRecord:
    """Run FedIT among the clients of a reference, going on with what is in its folder, and return what is recorded.

    Args:
        run: Which reference.
        loaded: The run that is compared.
        base: How the base model does, measured already.
        num_rounds: Of the run that is compared.
        folder: Where records and checkpoints of the reference go.
        notify: Told about each step.
        on_answers: Told the answers behind each of its scores.
        left: What the whole run has left, this reference included.
    """
    clients, learning_rate = run.clients(loaded), run.learning_rate(loaded.config.evaluation)
    loop = round_loop(loaded, read_method({"name": FEDERATED_AVERAGING}), clients, folder, notify, learning_rate)
    rounds = dataclasses.replace(loop.settings, num_rounds=num_rounds, patience=None)
    loop = dataclasses.replace(loop, settings=rounds, evaluator=ReferenceScorer(loaded, base, on_answers))
    notify(rounds_stage(f"Reference: {run.in_words}", loop, left))
    run_rounds(loop)
    records = read_records(folder / RECORDS_FILE)
    scored = [(record, record.evaluation) for record in records if record.evaluation]
    ranks = compact_ranks(clients[0].plan.resolve(loaded.shapes), loaded.shapes)
    return ReferenceRunRecord(
        rank=describe_ranks(ranks),
        ranks=ranks,
        num_clients=len(clients) if len(clients) < len(loaded.participants.clients) else None,
        learning_rate=learning_rate,
        evaluations=[
            RoundScoreRecord(
                server_round=record.server_round,
                unseen=scores.unseen,
                virtual_clock_seconds=record.virtual_clock_seconds,
            )
            for record, scores in scored
        ],
        final=scored[-1][1],
        up_bytes=sum(record.up_bytes for record in records),
        down_bytes=sum(record.down_bytes for record in records),
        seconds=sum(record.seconds.get("total", 0.0) for record in records),
    )


@dataclass(frozen=True)
class ReferenceScorer:
    """Scores a reference run: as the run itself, without rank groups, and knowing the base model's scores already."""

    loaded: LoadedRun
    base: EvaluationRecord
    on_answers: OnAnswers = lambda adapter, answers: None

    def scores(self, adapter: Broadcast | None) -> EvaluationRecord:
        """Return the scores of the base with this adapter, or of the base alone for None."""
        return self.base if adapter is None else Scorer(self.loaded, self.on_answers).scores(adapter)

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        """Return none: every client of a reference run has one rank."""
        return {}
