"""Scores a loaded model: unseen tasks, the validation set, and each rank group."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flexlora.data.examples import Example
from flexlora.experiment.gathered import GatheredRun
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.stages import Scoring
from flexlora.federation.clients import ClientSpec, RankPlan, compact_ranks
from flexlora.federation.messages import Broadcast
from flexlora.federation.streams import stream
from flexlora.rounds.records import (
    EvaluationRecord,
    GroupClientRecord,
    RankGroupRecord,
    ScoreRecord,
    TaskScoreRecord,
    rounded,
)
from flexlora.training.evaluation import Answer, Score, answer_loss, answer_tasks, combine, score_of

OnAnswers = Callable[[Broadcast | None, Mapping[str, Sequence[Answer]]], None]
"""Told the adapter that was scored, None for the base, and its answers to the examples of each unseen task."""


def answers_to(
    loaded: LoadedRun,
    adapter: Broadcast | None,
    tasks: Mapping[str, Sequence[Example]],
    subject: str = "unseen tasks",
) -> dict[str, list[Answer]]:
    """Return what the base with this adapter answers to the examples of each task, and how good that is.

    Progress displays call the tasks ``subject``.
    """
    data, evaluation = loaded.config.data, loaded.config.evaluation
    num_answers = sum(len(examples) for examples in tasks.values())
    if num_answers:
        loaded.notify(Scoring(0, num_answers, subject))
    return answer_tasks(
        loaded.model,
        adapter,
        tasks,
        template=data.template,
        max_length=data.max_length,
        max_new_tokens=evaluation.max_new_tokens,
        batch_size=evaluation.batch_size,
        notify=lambda done: loaded.notify(Scoring(done, num_answers, subject)),
    )


def score(
    loaded: LoadedRun,
    adapter: Broadcast | None,
    tasks: Mapping[str, Sequence[Example]],
    subject: str = "unseen tasks",
) -> dict[str, Score]:
    """Return the score of the base with this adapter on each task; progress displays call the tasks ``subject``."""
    return {task: score_of(answers) for task, answers in answers_to(loaded, adapter, tasks, subject).items()}


def validation_loss(loaded: LoadedRun, adapter: Broadcast | None) -> float | None:
    """Return nats per answer token on the fixed validation set, None without one."""
    examples, data = loaded.participants.validation, loaded.config.data
    if not examples:
        return None
    batch_size = loaded.config.evaluation.batch_size
    return answer_loss(loaded.model, adapter, examples, data.template, data.max_length, batch_size)


def unseen_tasks(loaded: GatheredRun) -> dict[str, Sequence[Example]]:
    """Return the examples that zero-shot scores are about."""
    limit = loaded.config.data.test_examples_per_task
    return {task: splits.test[:limit] for task, splits in loaded.participants.corpus.unseen.items()}


def own_tests(loaded: GatheredRun, clients: Sequence[ClientSpec]) -> dict[str, Sequence[Example]]:
    """Return the test examples of some clients that have any."""
    limit, corpus = loaded.config.data.test_examples_per_task, loaded.participants.corpus
    tests = {client.client_id: corpus.clients[client.client_id].test[:limit] for client in clients}
    return {client_id: examples for client_id, examples in tests.items() if examples}


def sampled_clients(loaded: GatheredRun, per_plan: int, purpose: str) -> dict[str, list[ClientSpec]]:
    """Return up to ``per_plan`` clients of each plan that have test examples, seeded, sorted by id."""
    sampled: dict[str, list[ClientSpec]] = {}
    for name in loaded.participants.plans:
        candidates = [
            client
            for client in loaded.participants.clients
            if client.plan.name == name and loaded.participants.corpus.clients[client.client_id].test
        ]
        order = stream(loaded.config.seed, purpose, name).permutation(len(candidates))[:per_plan]
        sampled[name] = [candidates[index] for index in sorted(order)]
    return sampled


@dataclass(frozen=True)
class Scorer:
    """Scores adapters for the round loop: unseen tasks, the validation set, and each rank group at the end.

    Attributes:
        on_answers: Told the answers behind each score of the unseen tasks, rank groups left out.
    """

    loaded: LoadedRun
    on_answers: OnAnswers = lambda adapter, answers: None

    def scores(self, adapter: Broadcast | None) -> EvaluationRecord:
        """Return the scores of the base with this adapter, or of the base alone for None."""
        corpus = self.loaded.participants.corpus
        answers = answers_to(self.loaded, adapter, unseen_tasks(self.loaded))
        self.on_answers(adapter, answers)
        by_task = {task: score_of(own) for task, own in answers.items()}
        categories: dict[str, list[Score]] = {}
        for task, own in by_task.items():
            categories.setdefault(corpus.unseen[task].category or "all", []).append(own)
        return EvaluationRecord(
            unseen=combined_record(by_task.values()),
            unseen_unweighted=combined_record(by_task.values(), weighted=False),
            categories={name: combined_record(scores) for name, scores in sorted(categories.items())},
            tasks=task_records(self.loaded, by_task),
            validation_loss=validation_loss(self.loaded, adapter),
        )

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        """Return, per plan, the adapter cut to its ranks on the unseen tasks and on its clients' own test data.

        Own test data are left out where clients keep a part of their models: without it they would score as strangers.
        """
        per_plan = self.loaded.config.evaluation.rank_group_clients
        traits = self.loaded.config.method.traits()
        groups = {}
        for name, clients in sampled_clients(self.loaded, per_plan, "rank-groups").items() if per_plan else ():
            plan = self.loaded.participants.plans[name]
            adapter, own = broadcast(plan), own_tests(self.loaded, [] if traits.personal else clients)
            if not traits.folds_into_base:
                # Without the tail that some methods send along: what a device of these ranks can keep.
                adapter = Broadcast(adapter.adapter)
            unseen = score(self.loaded, adapter, unseen_tasks(self.loaded), f"ranks of {name}")
            scores = score(self.loaded, adapter, own, f"clients of {name}") if own else {}
            base = score(self.loaded, None, own, f"clients of {name}") if own else {}
            groups[name] = RankGroupRecord(
                ranks=compact_ranks(plan.resolve(self.loaded.shapes), self.loaded.shapes),
                num_clients=len(own),
                unseen=combined_record(unseen.values()),
                own=combined_record(scores.values()) if own else None,
                base_own=combined_record(base.values()) if own else None,
                tasks=task_records(self.loaded, unseen),
                clients=[
                    GroupClientRecord(
                        client_id=client_id,
                        rouge_l=rounded(together.rouge_l),
                        base_rouge_l=rounded(base[client_id].rouge_l),
                        num_examples=together.num_examples,
                    )
                    for client_id, together in scores.items()
                ],
            )
        return groups


def task_records(loaded: LoadedRun, by_task: Mapping[str, Score]) -> dict[str, TaskScoreRecord]:
    """Return the score of each unseen task as it is recorded."""
    unseen = loaded.participants.corpus.unseen
    return {
        task: TaskScoreRecord(
            rouge_l=rounded(own.rouge_l), num_examples=own.num_examples, category=unseen[task].category
        )
        for task, own in by_task.items()
    }


def combined_record(scores: Iterable[Score], *, weighted: bool = True) -> ScoreRecord:
    """Return the mean over tasks, weighted by their examples or not, as it is recorded."""
    return ScoreRecord(**dataclasses.asdict(combine(list(scores), weighted=weighted)))
