"""Adds up what a whole run will do and cost: its rounds, its references and all scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flexlora.experiment.config import Config
from flexlora.experiment.gathered import GatheredRun
from flexlora.experiment.reference_runs import wanted_runs
from flexlora.experiment.round_loop import cohort_size
from flexlora.experiment.work_left import ALONE, ROUNDS, planned_work, sampled_in_a_round
from flexlora.experiment.workload import Workload
from flexlora.federation.clients import ClientSpec
from flexlora.rounds.costs import STEP_EFFICIENCY
from flexlora.text import bytes_text, count_text, seconds_text

FLOPS_PER_PARAMETER = 2
"""Of one token through the base model: a product and a sum."""


@dataclass(frozen=True)
class PartTotals:
    """What one part of a run takes: its rounds, clients that train alone, or a reference run.

    Attributes:
        trainings: Times that a client trains; of clients alone in units of a round's training.
        answers: Answers generated and scored.
        training_seconds: Of this machine, all its processes at work.
        scoring_seconds: Of this machine.
        traffic_bytes: Up and down together, as if it went over a network.
    """

    trainings: float
    answers: int
    training_seconds: float
    scoring_seconds: float
    traffic_bytes: int


@dataclass(frozen=True)
class RunTotals:
    """What a whole run will do and cost.

    Attributes:
        num_sampled: Clients that a round samples.
        num_counted: Of how many of them it waits for the update.
        num_processes: That train side by side on this machine; None on a cluster.
        parts: ``rounds``, ``local_only`` and reference runs -> what each takes.
    """

    base_model: str
    num_parameters: int
    dtype: str
    method: str
    num_clients: int
    num_examples: int
    num_rounds: int
    num_sampled: int
    num_counted: int
    num_unseen_tasks: int
    num_processes: int | None
    parts: Mapping[str, PartTotals]

    @property
    def seconds(self) -> float:
        """About how long it takes on this machine, server work apart."""
        return sum(part.training_seconds + part.scoring_seconds for part in self.parts.values())

    def facts(self) -> list[tuple[str, str]]:
        """Return pairs of a name and a value for a person."""
        rounds = self.parts[ROUNDS]
        where = "on this machine"
        if self.num_processes is None:
            where = "divided by the actors of the cluster"
        elif self.num_processes > 1:
            where += f", by {self.num_processes} processes"
        clients = f"{self.num_clients:,} with {self.num_examples:,} training examples; {self.num_counted} in each of "
        clients += count_text(self.num_rounds, "round")
        clients += f", {self.num_sampled} sampled" if self.num_sampled > self.num_counted else ""
        references = {name: part for name, part in self.parts.items() if name != ROUNDS}
        seconds = sum(part.training_seconds for part in references.values())
        named = ", ".join(name.replace("_", " ") for name in references)
        answers = sum(part.answers for part in self.parts.values())
        scoring = sum(part.scoring_seconds for part in self.parts.values())
        return [
            ("Base model", f"{self.base_model}, {self.num_parameters:,} parameters, {self.dtype}"),
            ("Method", self.method),
            ("Clients", clients),
            ("Unseen tasks", f"{self.num_unseen_tasks}"),
            ("Traffic of the run", bytes_text(rounds.traffic_bytes)),
            ("Local training of the run", f"about {seconds_text(rounds.training_seconds)} {where}"),
            ("Training of references", f"about {seconds_text(seconds)} more: {named}" if references else "none"),
            ("Scoring", f"about {seconds_text(scoring)}, {count_text(answers, 'answer')} in all"),
            ("In all", f"about {seconds_text(self.seconds)}"),
        ]


def run_totals(run: GatheredRun, workload: Workload, cost_of: "CostOf", num_processes: int, rate: float) -> RunTotals:
    """Return what a run will do and cost.

    Args:
        run: Its configuration, clients and shapes.
        workload: What a round takes.
        cost_of: Clients that share a plan -> seconds that one of them trains in a round, and its bytes up and down.
        num_processes: That train side by side here.
        rate: Floating point operations a second that matrix products reach while answers are scored.
    """
    config, participants = run.config, run.participants
    clients = participants.clients
    sampled, counted = per_round(config, run)
    divisor = 1 if config.ray is not None else num_processes
    references = {reference.name: reference.clients(run) for reference in wanted_runs(run)}
    seconds_per_answer = _seconds_per_answer(config, workload, rate)
    parts = {}
    for name, work in planned_work(run).items():
        seconds, up, down = _mean_cost(references.get(name, clients), cost_of)
        # A round of the run may sample more clients than it waits for.
        uploads = work.trainings * counted / sampled if name == ROUNDS else work.trainings
        parts[name] = PartTotals(
            trainings=work.trainings,
            answers=work.answers,
            training_seconds=work.trainings * seconds / (1 if name == ALONE else divisor),
            scoring_seconds=work.answers * seconds_per_answer,
            traffic_bytes=0 if name == ALONE else round(work.trainings * down + uploads * up),
        )
    return RunTotals(
        base_model=config.model.name_or_path,
        num_parameters=workload.base.num_parameters,
        dtype=config.model.dtype,
        method=config.method.name,
        num_clients=len(clients),
        num_examples=sum(client.num_examples for client in clients),
        num_rounds=config.rounds.num_rounds,
        num_sampled=sampled,
        num_counted=counted,
        num_unseen_tasks=len(participants.corpus.unseen),
        num_processes=None if config.ray is not None else num_processes,
        parts=parts,
    )


CostOf = Callable[[Sequence[ClientSpec]], tuple[float, float, float]]


def _mean_cost(clients: Sequence[ClientSpec], cost_of: CostOf) -> tuple[float, float, float]:
    """Return the mean over clients of seconds, bytes up and bytes down."""
    by_plan: dict[object, list[ClientSpec]] = {}
    for client in clients:
        by_plan.setdefault(client.plan, []).append(client)
    costs = [(len(own), cost_of(own)) for own in by_plan.values()]
    seconds, up, down = (sum(number * cost[place] for number, cost in costs) / len(clients) for place in range(3))
    return seconds, up, down


def _seconds_per_answer(config: Config, workload: Workload, rate: float) -> float:
    """Return how long it takes to generate one answer and to measure its loss; both read the whole text."""
    length = workload.batch_tokens / workload.training.batch_size
    num_tokens = 2 * length + config.evaluation.max_new_tokens
    return num_tokens * FLOPS_PER_PARAMETER * workload.base.num_parameters / (rate * STEP_EFFICIENCY)


def per_round(config: Config, run: GatheredRun) -> tuple[int, int]:
    """Return how many clients a round samples, and of how many it waits for the update."""
    num_clients = len(run.participants.clients)
    sampled = sampled_in_a_round(run, num_clients)
    waits_for_all = config.clock.policy == "async" or not run.participants.devices
    return sampled, sampled if waits_for_all else min(sampled, cohort_size(config, num_clients))
