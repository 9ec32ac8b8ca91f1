"""Computes the tables of a comparison behind the main one: all measures, learning rates, costs, categories."""

from collections import defaultdict
from dataclasses import dataclass

from flexlora.report.chosen_rates import ChosenRate, TriedRate
from flexlora.report.measures import went_wrong
from flexlora.report.paired import Cell, Summary
from flexlora.report.run_costs import Costs
from flexlora.report.study_rows import number


@dataclass(frozen=True)
class MeasuresRow:
    """One arm under every measure of the summary; None where it was not measured."""

    arm: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class RatesRow:
    """One arm's tuning on a distribution; ``tried`` is under the rates of the table, None where it was not tried."""

    arm: str
    choice: ChosenRate
    tried: tuple[TriedRate | None, ...]


@dataclass(frozen=True)
class CostRow:
    """What a run of an arm costs; the ratio is of bytes in both directions to those of the reference."""

    arm: str
    costs: Costs
    bytes_ratio: float | None


@dataclass(frozen=True)
class CategoryTable:
    """Loss by category of unseen tasks, mean over draws: arms are rows, categories columns.

    Attributes:
        best: For each category, the lowest loss of a trained arm.
    """

    distribution: str
    categories: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    best: tuple[float | None, ...]


def measure_rows(summary: Summary, distribution: str) -> list[MeasuresRow]:
    """Return every measure of every arm, in the order of the main table."""
    if summary.headline is None:
        return []
    order = [cell.arm for cell in summary.ranked(summary.headline.key, distribution)]
    order += [arm for arm in summary.arms if arm not in order]
    rows = [
        MeasuresRow(arm, tuple(summary.cells.get((m.key, distribution, arm)) for m in summary.measures))
        for arm in order
    ]
    return [row for row in rows if any(row.cells)]


def rates_table(summary: Summary, distribution: str) -> tuple[list[float], list[RatesRow]]:
    """Return the rates that any arm tried, ascending, and one row an arm that was tuned."""
    choices = [choice for (_, where), choice in summary.rates.items() if where == distribution]
    rates = sorted({one.learning_rate for choice in choices for one in choice.tried})
    rows = []
    for choice in sorted(choices, key=lambda choice: _place(summary, choice.arm)):
        by_rate = {one.learning_rate: one for one in choice.tried}
        rows.append(RatesRow(choice.arm, choice, tuple(by_rate.get(rate) for rate in rates)))
    return rates, rows


def cost_rows(summary: Summary, distribution: str) -> list[CostRow]:
    """Return what a run of every arm costs, the fewest bytes first."""
    reference = _moved(summary.costs.get((distribution, summary.reference)))
    rows = []
    for (where, arm), costs in summary.costs.items():
        if where == distribution:
            moved = _moved(costs)
            rows.append(CostRow(arm, costs, moved / reference if moved is not None and reference else None))
    return sorted(rows, key=lambda row: (_moved(row.costs) or 0.0, row.arm))


def category_tables(summary: Summary) -> list[CategoryTable]:
    """Return the loss by category for each distribution where it was scored; runs that went wrong are left out."""
    tables = []
    for where in summary.distributions:
        losses: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for run in summary.runs:
            if run["distribution"] != where or went_wrong(run) or not isinstance(run.get("categories"), dict):
                continue
            for category, score in run["categories"].items():
                loss = number(score.get("loss")) if isinstance(score, dict) else None
                if loss is not None:
                    losses[run["arm"]][category].append(loss)
        if losses:
            tables.append(_category_table(summary, where, losses))
    return tables


def _category_table(summary: Summary, where: str, losses: dict[str, defaultdict[str, list[float]]]) -> CategoryTable:
    categories = tuple(sorted({category for by_category in losses.values() for category in by_category}))
    rows = [
        (arm, tuple(_mean(losses[arm].get(category, [])) for category in categories))
        for arm in sorted(losses, key=lambda arm: _place(summary, arm, where))
    ]
    columns = [
        [value for value in column if value is not None] for column in zip(*(row for _, row in rows), strict=True)
    ]
    return CategoryTable(where, categories, tuple(rows), tuple(min(column, default=None) for column in columns))


def _place(summary: Summary, arm: str, where: str | None = None) -> float:
    """Return where an arm stands by the headline on one distribution, or the first that has it; the rest come last."""
    if summary.headline is None:
        return float("inf")
    for distribution in [where] if where else summary.distributions:
        cell = summary.cells.get((summary.headline.key, distribution, arm))
        if cell is not None:
            return cell.mean
    return float("inf")


def _moved(costs: Costs | None) -> float | None:
    if costs is None or (costs.up_bytes is None and costs.down_bytes is None):
        return None
    return (costs.up_bytes or 0.0) + (costs.down_bytes or 0.0)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
