"""Says in a few sentences what was run, what came of it, and what went wrong."""

from flexlora.report.falls import best_of, best_of_reference
from flexlora.report.reference_names import reference_runs
from flexlora.report.run_folder import RunFolder
from flexlora.report.score_tables import SummaryRow, summary_table
from flexlora.text import count_text, number_text, signed_text


def headline(run: RunFolder) -> str:
    """Return what was run and what came of it, in two or three sentences with numbers."""
    rows = _rows_by_name(run)
    base, federated = rows.get("Base model"), rows.get("Federated")
    what = _what_was_run(run, _num_rounds(run))
    if not federated or federated.rouge_l is None:
        if base and base.rouge_l is not None:
            return f"{what} Base model alone: ROUGE-L {number_text(base.rouge_l)} of 100 on unseen tasks."
        return f"{what} No result on unseen tasks yet."
    fall = best_of(run.records)
    return " ".join([what, _change_in_words(federated, base), *([fall.in_words()] if fall and fall.is_told else [])])


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
    """Return one sentence if records are lost, or the run is not finished or ended early, else None."""
    if run.gaps.missing:
        return run.gaps.in_words()[0]
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
    """Return what somebody changed, warnings of the run, references that fell from their best, and notes of rounds."""
    warnings = list(run.manifest.warnings) if run.manifest else []
    fallen = [
        best.in_words(name)
        for name, reference in reference_runs(run.references).items()
        if (best := best_of_reference(reference)) and best.is_told
    ]
    changed = run.gaps.in_words()[1 if run.gaps.missing else 0 :]
    return (
        changed
        + warnings
        + fallen
        + [f"Round {record.server_round}: {record.note}" for record in run.records if record.note]
    )


def _rows_by_name(run: RunFolder) -> dict[str, SummaryRow]:
    """Return the rows of the summary by name, without the method."""
    return {row.name.split(" (")[0]: row for row in summary_table(run.records, run.references)}


def _what_was_run(run: RunFolder, num_rounds: int) -> str:
    if run.gaps.missing and num_rounds == 0:
        return "No round of training is on record any more."
    if num_rounds == 0:
        return "No round of training is finished yet."
    if not run.manifest:
        return f"{count_text(num_rounds, 'round')} of federated tuning."
    manifest = run.manifest
    kinds = len(run.plan_ranks)
    mixed = f" of {kinds} kinds of device" if kinds > 1 else ""
    return (
        f"{count_text(num_rounds, 'round')} of {manifest.method} on the {manifest.base_model} model with "
        f"{count_text(manifest.num_clients, 'client')}{mixed}."
    )


def _num_rounds(run: RunFolder) -> int:
    return run.records[-1].server_round if run.records else 0
