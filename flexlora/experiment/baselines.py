"""Measures what a run is compared with: clients that train alone, and FedIT at the smallest rank."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.method_config import FEDERATED_AVERAGING, read_method
from flexlora.experiment.round_loop import round_loop
from flexlora.experiment.scoring import Scorer, combined_record, own_tests, sampled_clients, score, unseen_tasks
from flexlora.experiment.stages import Notify, Stage, rounds_stage
from flexlora.experiment.workload import local_training
from flexlora.federation.clients import ClientSpec, RankPlan, compact_ranks, smallest_ranks
from flexlora.federation.messages import Broadcast
from flexlora.federation.streams import stream_seed
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.loop_parts import Loop, Outcome, RoundEvent
from flexlora.rounds.records import (
    RECORDS_FILE,
    REFERENCES_FILE,
    EvaluationRecord,
    LocalClientRecord,
    LocalOnlyRecord,
    RankGroupRecord,
    ReferenceRunRecord,
    RoundScoreRecord,
    ScoreRecord,
    read_records,
    read_references,
    write_references,
)
from flexlora.text import describe_ranks
from flexlora.training.evaluation import Score
from flexlora.training.one_client import train_client

FEDIT_FOLDER = Path("references") / "fedit_smallest_rank"


def measure_references(loaded: LoadedRun, loop: Loop, outcome: Outcome, folder: Path, notify: Notify) -> None:
    """Add what the run is compared with, one part after the other, each kept as soon as it is there."""
    path = folder / REFERENCES_FILE
    references = read_references(path)
    base = read_records(folder / RECORDS_FILE)[0].evaluation
    assert base is not None, "round 0 is an evaluation"
    if references.base is None:
        references = references.model_copy(update={"base": base})
        write_references(path, references)
    evaluation = loaded.config.evaluation
    if evaluation.local_only_clients and references.local_only is None:
        references = references.model_copy(update={"local_only": _local_only(loaded, loop, outcome.state, notify)})
        write_references(path, references)
    # FedIT has one rank in any run, so a run of FedIT is its own reference.
    is_fedit = loaded.config.method == read_method({"name": FEDERATED_AVERAGING})
    if evaluation.fedit_reference and not is_fedit and references.fedit_smallest_rank is None:
        references = references.model_copy(
            update={"fedit_smallest_rank": _fedit_reference(loaded, base, outcome.server_round, folder, notify)}
        )
        write_references(path, references)


def _local_only(loaded: LoadedRun, loop: Loop, state: Any, notify: Notify) -> LocalOnlyRecord:
    """Train sampled clients alone and compare with what the federation gives them."""
    number = loaded.config.evaluation.local_only_clients
    sampled = sampled_clients(loaded, number, "local-only").values()
    # One of each type in turn, so that no type is left out before another has a second client.
    in_turn = [client for turn in zip_longest(*sampled) for client in turn if client is not None]
    clients = sorted(in_turn[:number], key=lambda client: (client.plan.name, client.client_id))
    notify(Stage(f"Reference: {len(clients)} sampled clients train alone", len(clients)))
    rows = []
    for client in clients:
        try:
            rows.append(_alone(loaded, loop, state, client))
        except Exception as error:  # As in a round, a client's failure ends nothing.
            reason = f"{type(error).__name__}: {error}"
            rows.append(LocalClientRecord(client_id=client.client_id, plan=client.plan.name, failure=reason))
        notify(RoundEvent("client", 0, len(clients)))
    return LocalOnlyRecord(
        clients=rows,
        own=_mean_record([row.own for row in rows]),
        global_own=_mean_record([row.global_own for row in rows]),
        base_own=_mean_record([row.base_own for row in rows]),
        unseen=_mean_record([row.unseen for row in rows]),
    )


def _alone(loaded: LoadedRun, loop: Loop, state: Any, client: ClientSpec) -> LocalClientRecord:
    config, ranks, own = loaded.config, client.plan.resolve(loaded.shapes), own_tests(loaded, [client])
    epochs = config.evaluation.local_only_epochs
    start = loop.aggregator.broadcast(loop.aggregator.init(loop.federation.initial_adapter), ranks)
    adapter, _ = (loaded.train_one or train_client)(
        loaded.model,
        start,
        loaded.training_examples(client.client_id),
        dataclasses.replace(local_training(config), num_epochs=epochs, max_steps=None),
        config.training.learning_rate,
        stream_seed(config.seed, "local-only", client.client_id),
    )
    cores = loaded.model.read_cores()
    alone = Broadcast(adapter, train_factors="both" if cores is None else "core", cores=cores)
    together = loop.aggregator.broadcast(state, ranks)
    return LocalClientRecord(
        client_id=client.client_id,
        plan=client.plan.name,
        own=combined_record(score(loaded, alone, own).values()),
        global_own=combined_record(score(loaded, together, own).values()),
        base_own=combined_record(score(loaded, None, own).values()),
        unseen=combined_record(score(loaded, alone, unseen_tasks(loaded)).values()),
    )


def _mean_record(records: Sequence[ScoreRecord | None]) -> ScoreRecord | None:
    scored = [Score(**record.model_dump()) for record in records if record is not None]
    return combined_record(scored, weighted=False) if scored else None


def _fedit_reference(
    loaded: LoadedRun, base: EvaluationRecord, num_rounds: int, folder: Path, notify: Notify
) -> ReferenceRunRecord:
    """Run FedIT with every client at the ranks that all can afford: same seed, cohorts, rounds and data."""
    clients = at_smallest_ranks(loaded)
    ranks = clients[0].plan.resolve(loaded.shapes)
    learning_rate = loaded.config.evaluation.fedit_learning_rate
    loop = round_loop(
        loaded, read_method({"name": FEDERATED_AVERAGING}), clients, folder / FEDIT_FOLDER, notify, learning_rate
    )
    rounds = dataclasses.replace(loop.settings, num_rounds=num_rounds, patience=None)
    loop = dataclasses.replace(loop, settings=rounds, evaluator=ReferenceScorer(loaded, base))
    notify(rounds_stage("Reference: FedIT, every client at the smallest rank", loop))
    run_rounds(loop)
    records = read_records(loop.folder / RECORDS_FILE)
    scored = [(record, record.evaluation) for record in records if record.evaluation]
    compact = compact_ranks(ranks, loaded.shapes)
    return ReferenceRunRecord(
        rank=describe_ranks(compact),
        ranks=compact,
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
    )


def at_smallest_ranks(loaded: LoadedRun) -> list[ClientSpec]:
    """Return the same clients, each at the ranks that all of them can afford: the bucket effect."""
    ranks = smallest_ranks(list(loaded.participants.plans.values()), loaded.shapes)
    plan = RankPlan("smallest", tuple((f"^{re.escape(module)}$", rank) for module, rank in ranks.items()))
    return [dataclasses.replace(client, plan=plan) for client in loaded.participants.clients]


@dataclass(frozen=True)
class ReferenceScorer:
    """Scores a reference run: as the run itself, without rank groups, and knowing the base model's scores already."""

    loaded: LoadedRun
    base: EvaluationRecord

    def scores(self, adapter: Broadcast | None) -> EvaluationRecord:
        """Return the scores of the base with this adapter, or of the base alone for None."""
        return self.base if adapter is None else Scorer(self.loaded).scores(adapter)

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        """Return none: every client of a reference run has one rank."""
        return {}
