"""Runs a study of scripts/studies.py, over as many sittings as it needs, and keeps its rows in results/NAME.jsonl.

    python scripts/run_study.py main --jobs 2 --minutes 60
    python scripts/run_study.py main --export      # only writes results/main.jsonl from what has been run

A study goes on from the rows in results/, so rows that were made on another machine count too.
"""

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import Any

from studies import STUDIES, StudySpec

from flexlora.experiment.compare import CompareEvent, run_comparison
from flexlora.experiment.compare_arms import read_arms
from flexlora.experiment.compare_folder import append_rows, locked_comparison, open_comparison
from flexlora.experiment.compare_jobs import Job, Study
from flexlora.experiment.compare_study import make_study
from flexlora.foreign_logs import quiet_libraries
from flexlora.limits import num_cores
from flexlora.report.study_rows import read_rows

RESULTS = Path(__file__).parent.parent / "results"


def study_of(spec: StudySpec) -> Study:
    """Return what a specification compares."""
    return make_study(
        spec.config,
        spec.overrides,
        read_arms(spec.methods),
        distributions=spec.distributions,
        draws=spec.draws,
        tuning_draws=spec.tuning_draws,
        trials=spec.trials,
        tune_on=spec.tune_on,
        text=spec.text,
        evaluations=spec.evaluations,
        with_controls=spec.with_controls,
    )


def command_of(spec: StudySpec) -> str:
    """Return the command that runs the same comparison by itself."""
    options = [
        f"--methods {shlex.quote(spec.methods)}",
        f"--distributions {','.join(spec.distributions)}",
        f"--draws {spec.draws} --tuning-draws {spec.tuning_draws} --trials {spec.trials}",
        f"--evaluations {spec.evaluations} --reference {spec.reference}",
        *([f"--tune-on {spec.tune_on}"] if spec.tune_on else []),
        *([] if spec.text else ["--no-text"]),
        *([] if spec.with_controls else ["--no-controls"]),
    ]
    return f"flexlora compare {spec.config} {' '.join(spec.overrides)} {' '.join(options)}"


def export(name: str, folder: Path, results: Path = RESULTS) -> Path:
    """Write the rows of a study behind a line that describes it."""
    spec = STUDIES[name]
    described = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    head = {
        "kind": "study",
        "name": name,
        "title": spec.title,
        "question": spec.question,
        "command": command_of(spec),
        "config": spec.config,
        "verdict": spec.in_verdict,
        "reference": spec.reference,
        "described": described,
    }
    rows = sorted(read_rows(folder / "rows.jsonl"), key=_order)
    devices = sorted({row["device"] for row in rows if row.get("device")})
    hours = sum(row["seconds"] for row in rows if not row.get("copy_of")) / 3600
    head["machine"] = f"{len(rows)} rows, {hours:.1f} hours of one process each on {' and '.join(devices)}"
    results.mkdir(exist_ok=True)
    path = results / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)), encoding="utf-8")
    return path


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["phase"] != "tuning", row["distribution"], row["arm"], row["learning_rate"], row["draw"]


def shared_rows(spec: StudySpec) -> list[dict[str, Any]]:
    """Return the rows of the study that shares its rows with this one: its runs are runs of this one too."""
    path = RESULTS / f"{spec.shares}.jsonl"
    if spec.shares is None or not path.exists():
        return []
    own, other = study_of(spec), study_of(STUDIES[spec.shares])
    same_settings = own.settings == other.settings and (own.text, own.evaluations) == (other.text, other.evaluations)
    if not same_settings or own.tune_on != other.tune_on:
        raise SystemExit(f"{spec.shares} has other settings than the study that shares its rows")
    arms, draws = {arm.label for arm in own.arms if arm in other.arms}, {"tuning": own.tuning_draws, "test": own.draws}
    rows = [row for row in read_rows(path) if row["arm"] in arms and row["distribution"] in own.distributions]
    # A copy of the row of a distribution that this study lacks is the run itself here.
    return [
        row | {"copy_of": row["copy_of"] if row.get("copy_of") in own.distributions else None}
        for row in rows
        if row["draw"] < draws[row["phase"]]
    ]


def take_up(name: str, folder: Path) -> None:
    """Fill the folder of a study with the rows that results/ has of it, and of the study that shares its rows."""
    path, spec = RESULTS / f"{name}.jsonl", STUDIES[name]
    if not (folder / "study.json").exists() and path.exists():
        head = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in read_rows(path)), encoding="utf-8")
        (folder / "study.json").write_text(json.dumps(head["described"]), encoding="utf-8")
    if spec.shares is not None:
        with locked_comparison(folder):
            known = {_key(row) for row in open_comparison(study_of(spec), folder, overwrite=False)}
            append_rows(folder, [row for row in shared_rows(spec) if _key(row) not in known])


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["phase"], row["draw"], row["distribution"], row["arm"], row["learning_rate"]


def main() -> None:
    """Run or export the study that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--out", type=Path, help="default runs/studies/STUDY")
    parser.add_argument("--jobs", type=int, default=num_cores())
    parser.add_argument("--minutes", type=float, help="start no further run after this")
    parser.add_argument("--only", help="labels of the arms to run in this sitting, separated by commas")
    parser.add_argument("--on", help="distributions to run in this sitting, separated by commas")
    parser.add_argument("--export", action="store_true", help="run nothing")
    options = parser.parse_args()
    quiet_libraries()
    name = options.study
    folder = options.out or Path("runs/studies") / name
    take_up(name, folder)
    if not options.export:
        until = None if options.minutes is None else time.time() + 60 * options.minutes
        arms, distributions = (text.split(",") if text else None for text in (options.only, options.on))

        def wanted(job: Job) -> bool:
            """Return whether a job is for this sitting: its arm, and one of the distributions that it serves."""
            where = {job.distribution, *study.served_by(job)}
            return (arms is None or job.arm in arms) and (distributions is None or not where.isdisjoint(distributions))

        study = study_of(STUDIES[name])
        run_comparison(study, folder, jobs=options.jobs, until=until, wanted=wanted, notify=_tell)
    print(export(name, folder))


def _tell(event: CompareEvent) -> None:
    row = event.row
    if row is not None:
        facts = [row["phase"], row["draw"], row["distribution"], row["arm"], f"{row['learning_rate']:g}"]
        facts += [row["validation_loss"], row["unseen"] and row["unseen"]["loss"], f"{row['seconds']:.0f} s"]
        print(*facts, row["failure"] or "", flush=True)
    left = "" if event.seconds_left is None else f", {event.seconds_left / 60:.1f} minutes"
    print(f"{event.num_done} done, {event.num_left} left{left}", flush=True)


if __name__ == "__main__":
    main()
