"""A run folder -> `report.html`: one file that needs nothing else, for a screen, a phone or paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flexlora.files import write_whole
from flexlora.report import figures, tables, virtual_time
from flexlora.report.comparison import comparison_notes, timed_runs
from flexlora.report.figures import Axis, Chart, Series
from flexlora.report.run_folder import RunFolder, read_run
from flexlora.report.virtual_time import TimedRun
from flexlora.rounds.records import RoundRecord, SpectrumRecord
from flexlora.text import (
    NONE,
    bytes_text,
    count_text,
    describe_ranks,
    layer_order,
    number_text,
    percent_text,
    seconds_text,
    short_names,
    signed_text,
)

REPORT_FILE = "report.html"
MAX_SPECTRA = 2400
"""Spectra in one page; with more, rounds are left out evenly."""
MAX_FAILURES = 200

FEDERATED, FEDIT, LOCAL, BASE = "c1", "c2", "c3", "c6"


@dataclass(frozen=True)
class Tile:
    """One large number at the top of the page."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Figure:
    """A chart with its title, unit and caption; ``chart`` is None when nothing has been measured."""

    key: str
    title: str
    unit: str
    caption: str
    chart: Chart | None


@dataclass(frozen=True)
class SpectraView:
    """The singular values of every module and round, made small enough for a page."""

    modules: Sequence[str]
    rounds: Sequence[int]
    num_rounds_left_out: int
    curve: Chart
    heat: Chart
    heat_top: float
    plans: Sequence[str]
    error_rows: Sequence[tuple[str, Sequence[tuple[int, float | None]]]]
    data: dict[str, object]


def write_report(run_folder: Path, others: Sequence[Path] = (), target: float | None = None) -> Path:
    """Write `report.html` into a run folder, atomically, and return its path.

    Works on finished, interrupted and running runs alike: what has not been measured is said to be missing.

    Args:
        run_folder: What the report is about.
        others: Folders of runs to show beside it on the virtual clock.
        target: Unseen ROUGE-L whose virtual time is given, 0 to 100; None takes the run's own, or the best of
            the weakest run that scored above its base model.

    Raises:
        ReportError: A folder holds nothing that a run writes, or ``target`` is out of its range.
        RecordsError: A file of a run is damaged.
    """
    page = render(read_run(run_folder), [read_run(other) for other in others], target)
    path = run_folder / REPORT_FILE
    # The name of a folder may hold bytes that are no text.
    write_whole(path, page.encode(errors="replace"))
    return path


def render(run: RunFolder, others: Sequence[RunFolder] = (), target: float | None = None) -> str:
    """Return the page of a run; see `write_report`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number_text,
        rate=lambda value: NONE if tables.finite(value) is None else f"{value:.3g}",
        signed=signed_text,
        percent=percent_text,
        bytes=bytes_text,
        duration=seconds_text,
        count=count_text,
        ranks=describe_ranks,
        readings=_readings,
    )
    timed, chosen = timed_runs(run, others, target)
    spectra = spectra_view(run)
    failures = tables.failure_table(run.records)
    fairness = tables.fairness_table(run.records, run.references, run.manifest)
    categories = tables.category_table(run.records, run.references)
    totals = tables.total_rows(run.records, run.references)
    return environment.get_template("page.html.j2").render(
        run=run,
        headline=headline(run),
        status=status(run),
        notices=notices(run),
        tiles=tiles(run),
        summary=tables.summary_table(run.records, run.references, run.manifest.method if run.manifest else None),
        curves=curves(run),
        categories=categories,
        totals=totals,
        category_top=_top([value for row in [*categories, *totals] for value in (row.base, row.federated, row.fedit)]),
        plans=tables.plan_table(run.records, run.manifest),
        participation=participation(run),
        spectra=spectra,
        energy=energy(run),
        traffic=traffic(run),
        fairness=fairness,
        fairness_top=_top([value for row in fairness for value in (row.base, row.local_only, row.federated)]),
        times=tables.time_table(run.records),
        time_figure=stage_times(run),
        timed=timed,
        target=chosen,
        timed_notes=comparison_notes(run, others, target),
        timed_figures=timed_curves(timed, chosen),
        devices=virtual_time.device_table(run.records, run.manifest),
        failures=failures[:MAX_FAILURES],
        num_failures=len(failures),
        example_rank=max((rank for ranks in run.plan_ranks.values() for rank in ranks.values()), default=8),
        dot_row=figures.dot_row,
        heat_class=figures.heat_class,
        styles={"federated": FEDERATED, "fedit": FEDIT, "local": LOCAL, "base": BASE},
    )


def headline(run: RunFolder) -> str:
    """Return what was run and what came of it, in two or three sentences with numbers."""
    rows = {row.name.split(" (")[0]: row for row in tables.summary_table(run.records, run.references)}
    base, federated = rows.get("Base model"), rows.get("Federated")
    if not federated or federated.rouge_l is None:
        what = _what_was_run(run, _num_rounds(run))
        if base and base.rouge_l is not None:
            return f"{what} Base model alone: ROUGE-L {number_text(base.rouge_l)} of 100 on unseen tasks."
        return f"{what} No result on unseen tasks yet."
    parts = [_what_was_run(run, _num_rounds(run))]
    score = number_text(federated.rouge_l)
    if base and base.rouge_l is not None and federated.difference is not None:
        verb = "rose" if federated.difference > 0 else "fell" if federated.difference < 0 else "stayed"
        before = number_text(base.rouge_l)
        change = signed_text(federated.difference)
        parts.append(f"ROUGE-L on unseen tasks {verb} from {before} (base model alone) to {score}: {change} points.")
    else:
        parts.append(f"ROUGE-L on unseen tasks reached {score} of 100.")
    others = [
        ("FedIT at the smallest rank", "FedIT at the smallest rank"),
        ("Training alone", "training alone"),
    ]
    compared = [
        f"{words} reached {number_text(rows[name].rouge_l)} "
        f"({_ahead(tables.difference(federated.rouge_l, rows[name].rouge_l))})"
        for name, words in others
        if name in rows and rows[name].rouge_l is not None
    ]
    comparison = "; ".join(compared)
    return " ".join([*parts, *([comparison[0].upper() + comparison[1:] + "."] if compared else [])])


def status(run: RunFolder) -> str | None:
    """Return one sentence if the run is not finished or ended early, else None."""
    if not run.records:
        return "No round is finished yet."
    # Only the last word counts: a run that gave up may have been resumed.
    stopped = run.records[-1]
    if stopped.stopped:
        return f"Ended early after round {stopped.server_round}: {str(stopped.stopped).rstrip('.')}."
    wanted = run.manifest.num_rounds if run.manifest else None
    if wanted is not None and _num_rounds(run) < wanted:
        return f"Not finished: {_num_rounds(run)} of {count_text(wanted, 'round')}. The page shows what there is."
    return None


def notices(run: RunFolder) -> list[str]:
    """Return the warnings of the run and the notes of its rounds."""
    warnings = list(run.manifest.warnings) if run.manifest else []
    return warnings + [f"Round {record.server_round}: {record.note}" for record in run.records if record.note]


def tiles(run: RunFolder) -> list[Tile]:
    """Return the large numbers at the top."""
    rows = {row.name.split(" (")[0]: row for row in tables.summary_table(run.records, run.references)}
    found = []
    federated = rows.get("Federated")
    if federated:
        detail = f"{signed_text(federated.difference)} points over base"
        if federated.difference is None:
            detail = "of 100, on unseen tasks"
        found.append(Tile("Unseen ROUGE-L", number_text(federated.rouge_l), detail))
    others = [
        ("FedIT at the smallest rank", "Versus FedIT, smallest rank"),
        ("Training alone", "Versus training alone"),
    ]
    for name, label in others:
        if federated and name in rows:
            gain = tables.difference(federated.rouge_l, rows[name].rouge_l)
            detail = f"points; it reached {number_text(rows[name].rouge_l)}"
            found.append(Tile(label, signed_text(gain), detail))
    if any(record.clients for record in run.records):
        moved = sum(record.up_bytes + record.down_bytes for record in run.records)
        up = bytes_text(sum(record.up_bytes for record in run.records))
        down = bytes_text(sum(record.down_bytes for record in run.records))
        found.append(Tile("Traffic", bytes_text(moved), f"{up} up, {down} down"))
    return found


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
            chart=figures.line_chart(
                _unseen_series(run, measure), what=title, from_zero=from_zero, write=_writer(digits)
            ),
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
    chart = figures.line_chart(training, what="Loss while training", from_zero=False, write=_writer(3))
    caption = "Training loss is the mean over the steps of each client; early stopping watches the validation set."
    return [*shown, Figure("curve-training", "Loss while training", "nats per answer token", caption, chart)]


def energy(run: RunFolder) -> list[Figure]:
    """Return how much of the global change lies above the smallest ranks and inside each plan's, over rounds."""
    above = [(r.server_round, _percent(r.energy_above_smallest)) for r in run.records]
    kept = [
        Series(plan, style, [(r.server_round, _percent(r.energy_kept.get(plan))) for r in run.records])
        for plan, style in run.plan_styles.items()
    ]
    return [
        Figure(
            "energy-above",
            "Energy above the smallest rank",
            "% of the squared singular values, all modules together",
            "A line that sinks to zero is rank collapse: what only larger clients can hold is lost.",
            figures.line_chart(
                [Series("above the smallest ranks", FEDERATED, above)],
                what="Share of the squared singular values",
                from_zero=True,
                write=_in_percent,
            ),
        ),
        Figure(
            "energy-kept",
            "Energy inside the ranks of each plan",
            "% of the squared singular values, all modules together",
            "100 % means that clients of the plan receive the whole change.",
            figures.line_chart(
                kept, what="Share of the squared singular values inside", from_zero=False, write=_in_percent
            ),
        ),
    ]


def participation(run: RunFolder) -> list[Figure]:
    """Return who took part in each round, and how often clients were sampled."""
    rounds = [record for record in run.records if record.clients]
    cohorts = [(r.server_round, _sum_by_plan([(c.plan, 1) for c in r.clients])) for r in rounds]
    histograms = tables.times_sampled(run.records, run.manifest)
    most = max((times for histogram in histograms.values() for times in histogram), default=-1) if rounds else -1
    columns = [
        (times, {plan: float(histogram[times]) for plan, histogram in histograms.items()}) for times in range(most + 1)
    ]
    write = _counter("client")
    styles = run.plan_styles
    return [
        Figure(
            "cohort-chart",
            "Clients per round",
            "clients sampled, by rank plan",
            "Clients that failed are included.",
            figures.stacked_bars(
                cohorts, styles, what="Sampled clients", heading="Round {}", write=write, with_sums=False
            ),
        ),
        Figure(
            "sampled-chart",
            "How often clients were sampled",
            "clients, over the number of rounds they took part in",
            "Sampling is a function of the seed and the round alone.",
            figures.stacked_bars(columns, styles, what="Clients", heading="Sampled {} ×", write=write),
        ),
    ]


def traffic(run: RunFolder) -> Figure:
    """Return the bytes moved in each round by rank plan."""
    rounds = [
        (r.server_round, _sum_by_plan([(c.plan, c.up_bytes + c.down_bytes) for c in r.clients]))
        for r in run.records
        if r.clients
    ]
    most = max((sum(parts.values()) for _, parts in rounds), default=0.0)
    unit, name = next(
        (size, name) for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")) if most >= size or size == 1
    )
    chart = figures.stacked_bars(
        rounds, run.plan_styles, what="Bytes moved", heading="Round {}", write=bytes_text, unit=unit
    )
    caption = "Serialised factors as they travel, both directions."
    return Figure(
        "traffic-chart", "Traffic per round", f"{name if chart else 'bytes'} up and down, by rank plan", caption, chart
    )


def stage_times(run: RunFolder) -> Figure:
    """Return the wall time of each round by stage."""
    stages = [row.stage for row in tables.time_table(run.records)]
    rounds = [(r.server_round, {k: v for k, v in r.seconds.items() if k != "total"}) for r in run.records if r.seconds]
    chart = figures.stacked_bars(
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
        chart = figures.line_chart(series, what=title, from_zero=from_zero, write=_writer(digits), axis=axis)
        key = f"virtual-{measure.replace('_', '-')}"
        caption = "Each point is an evaluation; the server's own work takes no virtual time."
        shown.append(Figure(key, f"{title} over virtual time", f"over virtual {words}", caption, chart))
    return shown


def spectra_view(run: RunFolder) -> SpectraView | None:
    """Return the singular values with their truncation errors; None when no round recorded any that is not zero."""
    recorded = [record for record in run.records if record.spectra]
    modules = sorted({module for record in recorded for module in record.spectra}, key=layer_order)
    values = [v for r in recorded for s in r.spectra.values() for v in s.singular_values if v > 0 and math.isfinite(v)]
    if not values:
        return None
    kept = _thin(recorded, max(2, MAX_SPECTRA // len(modules)))
    high = 10.0 ** math.ceil(math.log10(max(values)))
    low = max(10.0 ** math.floor(math.log10(min(values))), high * 1e-8)
    length = max(len(s.singular_values) for r in recorded for s in r.spectra.values())
    plan_ranks = run.plan_ranks
    errors = {
        plan: [[_error(record.spectra.get(module), ranks.get(module, 0)) for record in kept] for module in modules]
        for plan, ranks in plan_ranks.items()
    }
    present = [e for lines in errors.values() for line in lines for e in line if e is not None]
    top = max(0.1, math.ceil(10 * max(present, default=0.1) - 1e-9) / 10)
    smallest = next(iter(plan_ranks), "")
    rounds = [record.server_round for record in kept]
    short = short_names(modules)
    first = kept[-1].spectra.get(modules[0])
    return SpectraView(
        modules=modules,
        rounds=rounds,
        num_rounds_left_out=len(recorded) - len(kept),
        curve=Chart(
            figures.spectrum_chart(low, high, length, [("then", []), ("c1", first.singular_values if first else [])]),
            [],
            [],
            f"Singular values of one module on a logarithmic axis from {low:g} to {high:g}",
        ),
        heat=figures.heatmap(short, rounds, errors.get(smallest, [[None] * len(kept)] * len(modules)), top),
        heat_top=top,
        plans=list(plan_ranks),
        error_rows=[
            (name, [(plan_ranks[plan].get(modules[place], 0), errors[plan][place][-1]) for plan in plan_ranks])
            for place, name in enumerate(short)
        ],
        data={
            "modules": modules,
            "rounds": rounds,
            "plans": [
                {"name": plan, "style": run.plan_styles[plan], "ranks": [ranks.get(module, 0) for module in modules]}
                for plan, ranks in plan_ranks.items()
            ],
            "low": math.log10(low),
            "high": math.log10(high),
            "length": max(length, 2),
            "box": [figures.LEFT, figures.RIGHT, figures.TOP, figures.BOTTOM],
            "top": top,
            "errors": [[figures.encode(line, 0.0, 1.0) for line in errors[plan]] for plan in plan_ranks],
            **_pack([[record.spectra.get(module) for record in kept] for module in modules], low, high),
        },
    )


def _pack(spectra: Sequence[Sequence[SpectrumRecord | None]], low: float, high: float) -> dict[str, object]:
    """Return ``indices`` (lists of 1-based places) and ``values`` (per module and round, ``list:codes``)."""
    lengths: list[int] = []
    values = []
    for line in spectra:
        cells = []
        for spectrum in line:
            numbers = spectrum.singular_values if spectrum else []
            if len(numbers) not in lengths:
                lengths.append(len(numbers))
            logs = [
                math.log10(max(numbers[k - 1], low)) if math.isfinite(numbers[k - 1]) else None
                for k in figures.sampled_indices(len(numbers))
            ]
            codes = figures.encode(logs, math.log10(low), math.log10(high))
            cells.append(f"{lengths.index(len(numbers))}:{codes}")
        values.append(cells)
    return {"indices": [figures.sampled_indices(length) for length in lengths], "values": values}


def _readings(chart: Chart) -> list[tuple[float, str, list[tuple[str, str, str]]]]:
    """Return what the page's script shows where the pointer is, as plain lists."""
    return [(reading.x, reading.heading, list(reading.lines)) for reading in chart.readings]


def _unseen_series(run: RunFolder, measure: str) -> list[Series]:
    name = f"Federated, {run.manifest.method}" if run.manifest else "Federated"
    scores = [(r.server_round, getattr(r.evaluation.unseen, measure) if r.evaluation else None) for r in run.records]
    series = [Series(name, FEDERATED, scores)]
    fedit = run.references.fedit_smallest_rank
    if fedit:
        points = [(e.server_round, getattr(e.unseen, measure)) for e in fedit.evaluations]
        if not points and fedit.final:
            points = [(0, getattr(fedit.final.unseen, measure))]
        series.append(Series("FedIT, smallest rank", FEDIT, points, is_level=not fedit.evaluations))
    local = run.references.local_only
    if local and local.unseen:
        series.append(Series("Training alone", LOCAL, [(0, getattr(local.unseen, measure))], is_level=True))
    base = tables.base_evaluation(run.records, run.references)
    if base:
        series.append(Series("Base model", BASE, [(0, getattr(base.unseen, measure))], is_level=True))
    return series


def _what_was_run(run: RunFolder, num_rounds: int) -> str:
    if num_rounds == 0:
        return "No round of training is finished yet."
    if not run.manifest:
        return f"{count_text(num_rounds, 'round')} of federated tuning."
    manifest = run.manifest
    kinds = len(run.plan_ranks)
    mixed = f" in {kinds} rank plans" if kinds > 1 else ""
    return (
        f"{count_text(num_rounds, 'round')} of {manifest.method} on {manifest.base_model} with "
        f"{count_text(manifest.num_clients, 'client')}{mixed}."
    )


def _num_rounds(run: RunFolder) -> int:
    return run.records[-1].server_round if run.records else 0


def _ahead(gain: float | None) -> str:
    if gain is None:
        return "not comparable"
    if abs(gain) < 0.05:
        return "the same"
    return f"{number_text(abs(gain))} points {'less' if gain > 0 else 'more'}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _sum_by_plan(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for plan, value in pairs:
        sums[plan] = sums.get(plan, 0.0) + value
    return sums


def _error(spectrum: SpectrumRecord | None, rank: int) -> float | None:
    return tables.truncation_error(spectrum, rank) if spectrum else None


def _thin(records: Sequence[RoundRecord], most: int) -> list[RoundRecord]:
    """Return at most ``most`` of the records, evenly spread, first and last included."""
    if len(records) <= most:
        return list(records)
    return [records[round(place * (len(records) - 1) / (most - 1))] for place in range(most)]


def _top(values: Sequence[float | None]) -> float:
    return max([10.0, *(10 * math.ceil(value / 10) for value in values if value is not None)])


def _writer(digits: int) -> figures.NumberText:
    return lambda value: number_text(value, digits)


def _in_percent(value: float) -> str:
    return number_text(value, 1, " %")


def _counter(noun: str) -> figures.NumberText:
    return lambda value: count_text(round(value), noun)
