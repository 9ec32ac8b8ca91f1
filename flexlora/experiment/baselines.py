"""Measures what a run is compared with: the base, clients that train alone, and further runs."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexlora.experiment.control_clients import clients_alone
from flexlora.experiment.kept_answers import answer_keeper
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.reference_runs import run_reference, wanted_runs
from flexlora.experiment.scoring import combined_record, own_tests, score, task_records, unseen_tasks
from flexlora.experiment.stages import Notify, Stage, Work
from flexlora.experiment.work_left import ROUNDS, remaining_work, total, trainings_alone
from flexlora.experiment.workload import steps_alone
from flexlora.federation.clients import ClientSpec
from flexlora.federation.kept_factors import with_kept
from flexlora.federation.messages import Broadcast
from flexlora.federation.streams import stream_seed
from flexlora.rounds.loop_parts import Loop, Outcome, RoundEvent
from flexlora.rounds.records import (
    RECORDS_FILE,
    REFERENCES_FILE,
    REFERENCES_FOLDER,
    LocalClientRecord,
    LocalOnlyRecord,
    ScoreRecord,
    read_records,
    read_references,
    write_references,
)
from flexlora.text import count_text
from flexlora.training.evaluation import Score, combine
from flexlora.training.one_client import train_client


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

    def left() -> Work:
        """Return what is left now; the rounds are over, however many there were to be."""
        return total({name: work for name, work in remaining_work(loaded, folder).items() if name != ROUNDS})

    if evaluation.local_only_clients and references.local_only is None:
        references = references.model_copy(update={"local_only": _local_only(loaded, loop, outcome, notify, left())})
        write_references(path, references)
    for reference in wanted_runs(loaded):
        if getattr(references, reference.name) is None:
            place = folder / REFERENCES_FOLDER / reference.name
            keep = answer_keeper(loaded, folder, reference.name)
            record = run_reference(reference, loaded, base, outcome.server_round, place, notify, keep, left())
            references = references.model_copy(update={reference.name: record})
            write_references(path, references)


def _local_only(loaded: LoadedRun, loop: Loop, outcome: Outcome, notify: Notify, left: Work) -> LocalOnlyRecord:
    """Train sampled clients alone and compare with what the federation gives them."""
    clients = clients_alone(loaded)
    title = f"Reference: {count_text(len(clients), 'sampled client')} train alone"
    notify(Stage(title, len(clients), left=left, trainings_per_step=trainings_alone(loaded)))
    rows, tasks, started = [], [], time.perf_counter()
    for client in clients:
        try:
            row, unseen = _alone(loaded, loop, outcome, client)
            rows.append(row)
            tasks.append(unseen)
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
        tasks=task_records(loaded, _mean_by_task(tasks)),
        seconds=time.perf_counter() - started,
    )


def _alone(
    loaded: LoadedRun, loop: Loop, outcome: Outcome, client: ClientSpec
) -> tuple[LocalClientRecord, dict[str, Score]]:
    """Return the record of a client that trained alone, and its scores on each unseen task."""
    config, ranks, own = loaded.config, client.plan.resolve(loaded.shapes), own_tests(loaded, [client])
    start = loop.aggregator.broadcast(loop.aggregator.init(loop.federation.initial_adapter), ranks)
    adapter, _ = (loaded.train_one or train_client)(
        loaded.model,
        start,
        loaded.training_examples(client.client_id),
        steps_alone(config),
        config.training.learning_rate,
        stream_seed(config.seed, "local-only", client.client_id),
    )
    cores = loaded.model.read_cores()
    alone = Broadcast(adapter, train_factors="both" if cores is None else "core", cores=cores)
    together = with_kept(loop.aggregator.broadcast(outcome.state, ranks), outcome.kept.get(client.client_id))
    unseen = score(loaded, alone, unseen_tasks(loaded), f"{client.client_id} alone")
    record = LocalClientRecord(
        client_id=client.client_id,
        plan=client.plan.name,
        own=combined_record(score(loaded, alone, own, client.client_id).values()),
        global_own=combined_record(score(loaded, together, own, client.client_id).values()),
        base_own=combined_record(score(loaded, None, own, client.client_id).values()),
        unseen=combined_record(unseen.values()),
    )
    return record, unseen


def _mean_record(records: Sequence[ScoreRecord | None]) -> ScoreRecord | None:
    scored = [Score(**record.model_dump()) for record in records if record is not None]
    return combined_record(scored, weighted=False) if scored else None


def _mean_by_task(by_client: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """Return the mean score of each task over clients, with the examples of one client."""
    if not by_client:
        return {}
    means = {task: combine([own[task] for own in by_client], weighted=False) for task in by_client[0]}
    return {
        task: dataclasses.replace(mean, num_examples=by_client[0][task].num_examples) for task, mean in means.items()
    }
