"""Chooses what each figure of the page shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.report.bar_chart import stacked_bars
from flexlora.report.drawing import Chart
from flexlora.report.line_chart import Axis, Series, line_chart
from flexlora.report.participation import times_sampled
from flexlora.report.reference_names import LARGE_ALONE, LARGEST, SHORT_NAMES, SMALLEST, reference_runs
from flexlora.report.run_folder import RunFolder
from flexlora.report.scales import NumberText
from flexlora.report.scores import base_evaluation
from flexlora.report.virtual_time import TimedRun
from flexlora.report.wall_time import time_table
from flexlora.text import bytes_text, count_text, number_text, seconds_text

FEDERATED, FEDIT, LOCAL, FEDIT_LARGEST, LARGE_CLIENTS, BASE = "c1", "c2", "c3", "c4", "c5", "c6"
REFERENCE_STYLES = {SMALLEST: FEDIT, LARGE_ALONE: LARGE_CLIENTS, LARGEST: FEDIT_LARGEST}
MODEL_STYLES = {"federated": FEDERATED, "fedit": FEDIT, "local": LOCAL, "base": BASE}
"""Model -> CSS class."""


@dataclass(frozen=True)
class Figure:
    """A chart with its title, unit and caption; ``chart`` is None when nothing has been measured."""

    key: str
    title: str
    unit: str
    caption: str
    chart: Chart | None


def curves(run: RunFolder) -> list[Figure]:
    """Return the scores and losses over rounds, with the references as levels and lines."""
    what = [
        ("rouge_l", "ROUGE-L on unseen tasks", "0 to 100, higher is better", True, 1),
        ("exact_match", "Exact match on unseen tasks", "% of answers, higher is better", True, 1),
        ("loss", "Loss on unseen tasks", "nats per answer token, lower is better", False, 3),
    ]
    shown = [
        Figure(
            key=f"curve-{measure.replace('_', '-')}",
            title=title,
            unit=unit,
            caption="Weighted by examples.",
            chart=line_chart(_unseen_series(run, measure), what=title, from_zero=from_zero, write=_writer(digits)),
        )
        for measure, title, unit, from_zero, digits in what
    ]
    training = [
        Series("Training, surviving clients", FEDERATED, [(r.server_round, r.train_loss) for r in run.records]),
        Series(
            "Validation set",
            "c5",
            [(r.server_round, (r.evaluation.validation_loss if r.evaluation else None)) for r in run.records],
        ),
    ]
    chart = line_chart(training, what="Loss while training", from_zero=False, write=_writer(3))
    caption = "Training loss is the mean over the steps of each client; early stopping watches the validation set."
    return [*shown, Figure("curve-training", "Loss while training", "nats per answer token", caption, chart)]


def energy(run: RunFolder) -> list[Figure]:
    """Return how much of the global change lies above the smallest ranks and inside each plan's, over rounds."""
    above = [(r.server_round, _percent(r.energy_above_smallest)) for r in run.records]
    kept = [
        Series(run.called(plan), style, [(r.server_round, _percent(r.energy_kept.get(plan))) for r in run.records])
        for plan, style in run.plan_styles.items()
    ]
    return [
        Figure(
            "energy-above",
            "Energy above the smallest rank",
            "% of the squared singular values, all modules together",
            "A line that sinks to zero is rank collapse: what only larger clients can hold is lost.",
            line_chart(
                [Series("above the smallest ranks", FEDERATED, above)],
                what="Share of the squared singular values",
                from_zero=True,
                write=_in_percent,
            ),
        ),
        Figure(
            "energy-kept",
            "Energy inside the ranks of each device",
            "% of the squared singular values, all modules together",
            "100 % means that clients with the device receive the whole change.",
            line_chart(kept, what="Share of the squared singular values inside", from_zero=False, write=_in_percent),
        ),
    ]


def participation(run: RunFolder) -> list[Figure]:
    """Return who took part in each round, and how often clients were sampled."""
    rounds = [record for record in run.records if record.clients]
    cohorts = [(r.server_round, _sum_by_plan([(run.called(c.plan), 1) for c in r.clients])) for r in rounds]
    histograms = times_sampled(run.records, run.manifest)
    most = max((times for histogram in histograms.values() for times in histogram), default=-1) if rounds else -1
    columns = [
        (times, {run.called(plan): float(histogram[times]) for plan, histogram in histograms.items()})
        for times in range(most + 1)
    ]
    write = _counter("client")
    styles = _styles_by_name(run)
    return [
        Figure(
            "cohort-chart",
            "Clients per round",
            "clients sampled, by device",
            "Clients that failed are included.",
            stacked_bars(cohorts, styles, what="Sampled clients", heading="Round {}", write=write, with_sums=False),
        ),
        Figure(
            "sampled-chart",
            "How often clients were sampled",
            "clients, over the number of rounds they took part in",
            "Sampling is a function of the seed and the round alone.",
            stacked_bars(columns, styles, what="Clients", heading="Sampled {} ×", write=write),
        ),
    ]


def traffic(run: RunFolder) -> Figure:
    """Return the bytes moved in each round by rank plan."""
    rounds = [
        (r.server_round, _sum_by_plan([(run.called(c.plan), c.up_bytes + c.down_bytes) for c in r.clients]))
        for r in run.records
        if r.clients
    ]
    most = max((sum(parts.values()) for _, parts in rounds), default=0.0)
    unit, name = next(
        (size, name) for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")) if most >= size or size == 1
    )
    chart = stacked_bars(
        rounds, _styles_by_name(run), what="Bytes moved", heading="Round {}", write=bytes_text, unit=unit
    )
    caption = "Serialised factors as they travel, both directions."
    return Figure(
        "traffic-chart", "Traffic per round", f"{name if chart else 'bytes'} up and down, by device", caption, chart
    )


def stage_times(run: RunFolder) -> Figure:
    """Return the wall time of each round by stage."""
    stages = [row.stage for row in time_table(run.records)]
    rounds = [(r.server_round, {k: v for k, v in r.seconds.items() if k != "total"}) for r in run.records if r.seconds]
    chart = stacked_bars(
        rounds,
        {stage: f"c{1 + place % 6}" for place, stage in enumerate(stages)},
        what="Wall time",
        heading="Round {}",
        write=seconds_text,
    )
    return Figure("time-chart", "Time per round", "seconds, by stage", "Wall time on the machine of the run.", chart)


def timed_curves(runs: Sequence[TimedRun], target: float | None) -> list[Figure]:
    """Return score and validation loss over virtual time, one line a run."""
    longest = max((run.seconds for run in runs), default=0.0)
    unit, words = next(
        (size, words)
        for size, words in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        if longest >= 2 * size or size == 1.0
    )
    axis = Axis(f"virtual {words}", lambda x: seconds_text(x * unit), _writer(1), is_whole=False)
    styles = {place: f"c{1 + place % 6}" for place in range(len(runs))}
    what = [("rouge_l", "ROUGE-L on unseen tasks", True, 1), ("validation_loss", "Validation loss", False, 3)]
    shown = []
    for measure, title, from_zero, digits in what:
        series = [
            Series(
                f"{run.name} ({run.policy})",
                styles[place],
                [(p.seconds / unit, getattr(p, measure)) for p in run.points],
            )
            for place, run in enumerate(runs)
        ]
        if measure == "rouge_l" and target is not None:
            series.append(Series("Target", BASE, [(0, target)], is_level=True))
        chart = line_chart(series, what=title, from_zero=from_zero, write=_writer(digits), axis=axis)
        key = f"virtual-{measure.replace('_', '-')}"
        caption = "Each point is an evaluation; the server's own work takes no virtual time."
        shown.append(Figure(key, f"{title} over virtual time", f"over virtual {words}", caption, chart))
    return shown


def _unseen_series(run: RunFolder, measure: str) -> list[Series]:
    name = f"Federated, {run.manifest.method}" if run.manifest else "Federated"
    scores = [(r.server_round, getattr(r.evaluation.unseen, measure) if r.evaluation else None) for r in run.records]
    series = [Series(name, FEDERATED, scores)]
    for called, reference in reference_runs(run.references).items():
        points = [(e.server_round, getattr(e.unseen, measure)) for e in reference.evaluations]
        if not points and reference.final:
            points = [(0, getattr(reference.final.unseen, measure))]
        style = REFERENCE_STYLES[called]
        series.append(Series(SHORT_NAMES[called], style, points, is_level=not reference.evaluations))
    local = run.references.local_only
    if local and local.unseen:
        series.append(Series("Training alone", LOCAL, [(0, getattr(local.unseen, measure))], is_level=True))
    base = base_evaluation(run.records, run.references)
    if base:
        series.append(Series("Base model", BASE, [(0, getattr(base.unseen, measure))], is_level=True))
    return series


def _styles_by_name(run: RunFolder) -> dict[str, str]:
    return {run.called(plan): style for plan, style in run.plan_styles.items()}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _sum_by_plan(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for plan, value in pairs:
        sums[plan] = sums.get(plan, 0.0) + value
    return sums


def _writer(digits: int) -> NumberText:
    return lambda value: number_text(value, digits)


def _in_percent(value: float) -> str:
    return number_text(value, 1, " %")


def _counter(noun: str) -> NumberText:
    return lambda value: count_text(round(value), noun)
