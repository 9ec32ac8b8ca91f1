"""Answers the four questions of the first screen: is the difference real, who loses, which rank, how long and where."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flexlora.report.group_tables import fairness_table
from flexlora.report.rank_choice import choice_in_words, chosen_rank, rank_rows
from flexlora.report.reference_names import inside_a_sentence, reference_runs
from flexlora.report.run_folder import RunFolder
from flexlora.report.scores import base_evaluation, difference, federated_evaluation, last_evaluated, rouge_l_of
from flexlora.report.task_differences import (
    LEAST_CLIENTS,
    LEAST_TASKS,
    Difference,
    difference_text,
    interval_text,
    tally,
    task_difference,
)
from flexlora.rounds.records import ScoreRecord, TaskScoreRecord
from flexlora.text import bytes_text, count_text, number_text, seconds_text, signed_text


@dataclass(frozen=True)
class Card:
    """One question of the first screen with its answer; ``style`` is ``up``, ``down`` or empty."""

    question: str
    answer: str
    details: Sequence[str]
    style: str = ""


@dataclass(frozen=True)
class Compared:
    """The run minus one of the models that it is compared with, on the unseen tasks."""

    name: str
    value: float | None
    interval: Difference | None

    @property
    def in_words(self) -> str:
        """The difference with its interval."""
        if self.interval is None:
            return f"{signed_text(self.value)} over {inside_a_sentence(self.name)} (no interval)"
        return f"{difference_text(self.interval)} over {inside_a_sentence(self.name)}"


def cards(run: RunFolder) -> list[Card]:
    """Return the questions that the run can answer so far, in order."""
    compared = comparisons(run)
    found = [_difference_card(compared), _losers_card(run, compared), _rank_card(run), _time_card(run)]
    return [card for card in found if card is not None]


def comparisons(run: RunFolder) -> list[Compared]:
    """Return the run minus each model that it is compared with, the most telling first; none before it is scored.

    Clients that train alone are one of them only if `LEAST_CLIENTS` did: each is a model of its own.
    """
    own = federated_evaluation(run.records)
    if own is None:
        return []
    return [
        Compared(name, difference(rouge_l_of(own.unseen), rouge_l_of(score)), task_difference(own.tasks, tasks))
        for name, score, tasks in _others(run)
    ]


def _others(run: RunFolder) -> Iterator[tuple[str, ScoreRecord, dict[str, TaskScoreRecord]]]:
    for name, reference in reference_runs(run.references).items():
        if reference.final:
            yield name, reference.final.unseen, reference.final.tasks
    local = run.references.local_only
    if local and local.unseen and len(local.clients) >= LEAST_CLIENTS:
        yield "Training alone", local.unseen, local.tasks
    base = base_evaluation(run.records, run.references)
    if base:
        yield "The base model", base.unseen, base.tasks


def _difference_card(compared: Sequence[Compared]) -> Card | None:
    if not compared:
        return None
    first = compared[0]
    details = [one.in_words for one in compared]
    if first.interval is None:
        details.append(f"An interval needs {LEAST_TASKS} unseen tasks with recorded scores.")
        return Card("Is the difference real?", "Cannot be told", details)
    details.append(
        f"95 % intervals in points of ROUGE-L, by paired bootstrap over {count_text(first.interval.num_units, 'task')} "
        "of this one run; another seed moves it too, which flexlora compare measures."
    )
    if not first.interval.is_told:
        return Card("Is the difference real?", "Not told apart", details)
    gains = first.interval.low > 0
    answer = f"{'Yes' if gains else 'Yes, a loss'}: {signed_text(first.interval.value)}"
    return Card("Is the difference real?", answer, details, "up" if gains else "down")


def _losers_card(run: RunFolder, compared: Sequence[Compared]) -> Card | None:
    own, other = federated_evaluation(run.records), next(iter(_others(run)), None)
    if own is None or other is None or not compared:
        return None
    name, _, tasks = other
    details, answer, style = [], "Nobody is known to", ""
    counted = tally(own.tasks, tasks)
    if counted is not None:
        whole = counted.num_gained + counted.num_lost + counted.num_equal
        answer = f"{counted.num_lost} of {count_text(whole, 'task')}"
        under = "the base model" if name == "The base model" else inside_a_sentence(name)
        details.append(
            f"score lower than under {under}, {counted.num_gained} higher, {counted.num_equal} the same."
            + (f" Most: {_named(counted.worst)}." if counted.worst else "")
        )
        style = "down" if counted.num_lost > counted.num_gained else ""
    details.append(_types_in_words(run))
    return Card("Who loses?", answer, details, style)


def _types_in_words(run: RunFolder) -> str:
    rows = fairness_table(run.records, run.references, run.manifest)
    told = [(row, row.over_base) for row in rows if row.over_base is not None]
    if not told:
        last = last_evaluated(run.records)
        groups = last.evaluation.rank_groups.values() if last and last.evaluation else ()
        most = max((group.num_clients for group in groups), default=0)
        scored = f"at most {most} of each were scored" if most else "none were scored"
        return (
            f"Kinds of device: no claim. It takes {LEAST_CLIENTS} clients of each on their own test data, and {scored} "
            "(evaluation.rank_group_clients)."
        )
    losing = [f"{run.plan_names[row.plan]} {difference_text(gain)}" for row, gain in told if gain.high < 0]
    if losing:
        return f"On their own test data, against the base model: {', '.join(losing)}."
    return f"No kind of device is shown to lose on its own test data ({count_text(len(told), 'kind')} with a claim)."


def _named(worst: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{task} {signed_text(gain)}" for task, gain in worst)


def _rank_card(run: RunFolder) -> Card | None:
    rows = rank_rows(run)
    chosen = chosen_rank(rows)
    if chosen is None:
        return None
    details = [choice_in_words(rows)]
    if chosen.difference is not None:
        details.append(f"{difference_text(chosen.difference)} against rank {rows[-1].rank}.")
    smaller = [f"rank {row.rank}: {interval_text(row.difference)}" for row in rows if row.difference and row != chosen]
    details += [f"Others against rank {rows[-1].rank}: {'; '.join(smaller)}."] if smaller else []
    size = f", {bytes_text(chosen.num_bytes)}" if chosen.num_bytes else ""
    return Card("Which rank to export?", f"Rank {chosen.rank}{size}", details)


def _time_card(run: RunFolder) -> Card | None:
    seconds = sum(record.seconds.get("total", 0.0) for record in run.records)
    if not seconds:
        return None
    scoring = sum(record.seconds.get("evaluate", 0.0) for record in run.records)
    parts = [one.seconds for one in reference_runs(run.references).values()]
    local = run.references.local_only
    extra = sum(value for value in [*parts, local.seconds if local else None] if value is not None)
    manifest = run.manifest
    machine = (manifest.machine if manifest else None) or (manifest.platform if manifest else "an unknown machine")
    threads = f", {count_text(manifest.num_threads, 'thread')}" if manifest and manifest.num_threads else ""
    moved = sum(record.up_bytes + record.down_bytes for record in run.records)
    up = sum(record.up_bytes for record in run.records)
    share = number_text(100 * scoring / seconds, 0)
    details = [f"on {machine}{threads}.", f"{share} % of it was scoring."]
    details += [f"References took {seconds_text(extra)} more."] if extra else []
    details += (
        [f"Clients moved {bytes_text(moved)}: {bytes_text(up)} up, {bytes_text(moved - up)} down."] if moved else []
    )
    return Card("How long, on which machine?", seconds_text(seconds), details)
