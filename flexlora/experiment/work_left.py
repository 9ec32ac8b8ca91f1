"""Counts the work of a run: clients that train and answers that are scored, references and final scores included."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flexlora.data.examples import Example
from flexlora.experiment.control_clients import clients_alone
from flexlora.experiment.gathered import GatheredRun
from flexlora.experiment.participants import policy_of
from flexlora.experiment.reference_runs import wanted_runs
from flexlora.experiment.round_loop import cohort_of, rounds_done
from flexlora.experiment.scoring import own_tests, sampled_clients, unseen_tasks
from flexlora.experiment.stages import Work
from flexlora.experiment.workload import local_training, steps_alone
from flexlora.rounds.clock import clients_per_round
from flexlora.rounds.records import REFERENCES_FILE, REFERENCES_FOLDER, read_references

ROUNDS, ALONE = "rounds", "local_only"
"""Names of parts of the work; the other parts have the names of reference runs."""


def planned_work(run: GatheredRun) -> dict[str, Work]:
    """Return part -> its work, in the order in which a run does them."""
    evaluation, num_rounds = run.config.evaluation, run.config.rounds.num_rounds
    everybody, unseen = len(run.participants.clients), _count(unseen_tasks(run))
    evaluations = num_rounds // evaluation.every + (num_rounds % evaluation.every > 0)
    parts = {
        ROUNDS: Work(num_rounds * sampled_in_a_round(run, everybody), (1 + evaluations) * unseen)
        + _rank_groups(run, unseen)
    }
    if evaluation.local_only_clients:
        alone = clients_alone(run)
        parts[ALONE] = Work(
            round(trainings_alone(run) * len(alone)), 3 * _count(own_tests(run, alone)) + len(alone) * unseen
        )
    for reference in wanted_runs(run):
        size = sampled_in_a_round(run, len(reference.clients(run)))
        # The base has been scored already.
        parts[reference.name] = Work(num_rounds * size, evaluations * unseen)
    return parts


def remaining_work(run: GatheredRun, folder: Path) -> dict[str, Work]:
    """Return part -> what is left of it, as far as the folder of the run shows."""
    left, num_rounds = planned_work(run), run.config.rounds.num_rounds
    references = read_references(folder / REFERENCES_FILE)
    for name, work in left.items():
        place = folder if name == ROUNDS else folder / REFERENCES_FOLDER / name
        done = 0.0 if name == ALONE else min(1.0, rounds_done(place) / num_rounds)
        if name != ROUNDS and getattr(references, name) is not None:
            done = 1.0
        left[name] = Work(round((1 - done) * work.trainings), round((1 - done) * work.answers))
    return left


def total(parts: Mapping[str, Work]) -> Work:
    """Return the work of all parts."""
    return sum(parts.values(), Work())


def trainings_alone(run: GatheredRun) -> float:
    """Return how many trainings of a round it takes, on average, to train a client alone."""
    clients = clients_alone(run)
    training = local_training(run.config)
    rounds = sum(training.num_steps(client.num_examples) for client in clients)
    alone = sum(steps_alone(run.config).num_steps(client.num_examples) for client in clients)
    return alone / rounds if rounds else 1.0


def sampled_in_a_round(run: GatheredRun, num_clients: int) -> int:
    """Return how many clients train in a round, of those that can be sampled."""
    size = cohort_of(run, num_clients)
    if not run.participants.devices:
        return size
    return min(num_clients, clients_per_round(policy_of(run.config, run.config.method.traits(), size), size))


def _rank_groups(run: GatheredRun, unseen: int) -> Work:
    """Return the work of scoring each kind of client at the end."""
    per_plan = run.config.evaluation.rank_group_clients
    if not per_plan:
        return Work()
    groups = sampled_clients(run, per_plan, "rank-groups").values()
    own = 0 if run.config.method.traits().personal else sum(_count(own_tests(run, clients)) for clients in groups)
    return Work(answers=len(run.participants.plans) * unseen + 2 * own)


def _count(tasks: Mapping[str, Sequence[Example]]) -> int:
    return sum(len(examples) for examples in tasks.values())
