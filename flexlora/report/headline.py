"""Says in a few words and large numbers what was run and what came of it."""

from dataclasses import dataclass

from flexlora.report.reference_names import SHORT_NAMES, SMALLEST, inside_a_sentence
from flexlora.report.run_folder import RunFolder
from flexlora.report.score_tables import SummaryRow, summary_table
from flexlora.report.scores import difference
from flexlora.text import bytes_text, count_text, number_text, signed_text


@dataclass(frozen=True)
class Tile:
    """One large number at the top of the page."""

    label: str
    value: str
    detail: str


COMPARED = {SMALLEST: SHORT_NAMES[SMALLEST], "Training alone": "Training alone"} | SHORT_NAMES
"""Rows of the summary that the federated one is compared with -> what a tile calls them."""


def headline(run: RunFolder) -> str:
    """Return what was run and what came of it, in two or three sentences with numbers."""
    rows = _rows_by_name(run)
    base, federated = rows.get("Base model"), rows.get("Federated")
    what = _what_was_run(run, _num_rounds(run))
    if not federated or federated.rouge_l is None:
        if base and base.rouge_l is not None:
            return f"{what} Base model alone: ROUGE-L {number_text(base.rouge_l)} of 100 on unseen tasks."
        return f"{what} No result on unseen tasks yet."
    compared = [
        f"{name} reached {number_text(rows[name].rouge_l)} "
        f"({_ahead(difference(federated.rouge_l, rows[name].rouge_l))})"
        for name in COMPARED
        if name in rows and rows[name].rouge_l is not None
    ]
    # Names begin with a capital only where the sentence does.
    comparison = "; ".join([*compared[:1], *map(inside_a_sentence, compared[1:])])
    return " ".join([what, _change_in_words(federated, base), *([f"{comparison}."] if compared else [])])


def _change_in_words(federated: SummaryRow, base: SummaryRow | None) -> str:
    score = number_text(federated.rouge_l)
    if base is None or base.rouge_l is None or federated.difference is None:
        return f"ROUGE-L on unseen tasks reached {score} of 100."
    before, change = number_text(base.rouge_l), signed_text(federated.difference)
    if before == score:
        return f"ROUGE-L on unseen tasks stayed at {score}, that of the base model alone."
    verb = "rose" if federated.difference > 0 else "fell"
    return f"ROUGE-L on unseen tasks {verb} from {before} (base model alone) to {score}: {change} points."


def status(run: RunFolder) -> str | None:
    """Return one sentence if the run is not finished or ended early, else None."""
    if not run.records:
        return "No round is finished yet."
    # Only the last record counts: a run that stopped may have been resumed.
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
    rows = _rows_by_name(run)
    found = []
    federated = rows.get("Federated")
    if federated:
        detail = f"{signed_text(federated.difference)} points over base"
        if federated.difference is None:
            detail = "of 100, on unseen tasks"
        found.append(Tile("Unseen ROUGE-L", number_text(federated.rouge_l), detail))
    for name, called in COMPARED.items():
        if federated and name in rows:
            gain = difference(federated.rouge_l, rows[name].rouge_l)
            detail = f"points; it reached {number_text(rows[name].rouge_l)}"
            found.append(Tile(f"Versus {inside_a_sentence(called)}", signed_text(gain), detail))
    if any(record.clients for record in run.records):
        moved = sum(record.up_bytes + record.down_bytes for record in run.records)
        up = bytes_text(sum(record.up_bytes for record in run.records))
        down = bytes_text(sum(record.down_bytes for record in run.records))
        found.append(Tile("Traffic", bytes_text(moved), f"{up} up, {down} down"))
    return found


def _rows_by_name(run: RunFolder) -> dict[str, SummaryRow]:
    """Return the rows of the summary by name, without the method."""
    return {row.name.split(" (")[0]: row for row in summary_table(run.records, run.references)}


def _what_was_run(run: RunFolder, num_rounds: int) -> str:
    if num_rounds == 0:
        return "No round of training is finished yet."
    if not run.manifest:
        return f"{count_text(num_rounds, 'round')} of federated tuning."
    manifest = run.manifest
    kinds = len(run.plan_ranks)
    mixed = f" in {kinds} rank plans" if kinds > 1 else ""
    return (
        f"{count_text(num_rounds, 'round')} of {manifest.method} on the {manifest.base_model} model with "
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
