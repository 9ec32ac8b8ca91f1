"""Defines the verbs of the command line.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done; 1 an unexpected error; 2 wrong
configuration, input or usage; 3 the run made no progress; 4 the machine failed (disk, permission, memory); 130
interrupted, ``--resume`` continues.
"""

import io
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text
except KeyboardInterrupt:
    # Loading these takes most of the time before main can catch an interruption.
    sys.stderr.write("Interrupted.\n")
    sys.exit(130)

from flexlora import __version__
from flexlora.errors import FlexLoraError

EXIT_ERROR, EXIT_WRONG_INPUT, EXIT_NO_PROGRESS, EXIT_MACHINE, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

app = typer.Typer(
    name="flexlora",
    help="Fine-tune one language model across many data owners whose devices afford different LoRA ranks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 unexpected error, 2 wrong input, 3 no progress, 4 disk or memory, 130 interrupted.",
)
# A client may be called task:100:a, and :100: is no emoji here.
out = Console(emoji=False)
err = Console(emoji=False, stderr=True)

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that replace those of the file, as rounds.num_rounds=3."),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
AdaptersArgument = Annotated[
    list[str] | None, typer.Argument(metavar="ADAPTER", help="PEFT folders, or ids on the Hugging Face hub.")
]
WeightsOption = Annotated[str | None, typer.Option("--weights", help="One per adapter, as 3,1,1; default all 1.")]
MergeMethodOption = Annotated[
    Literal["mean", "sum"],
    typer.Option("--method", help="mean divides the weights by their sum; sum takes them as they are, signs included."),
]
MergeRankOption = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="Rank of every module; default the largest that an adapter has there."),
]
EnergyOption = Annotated[
    float | None, typer.Option("--energy", help="Least rank that keeps this share of the energy, as 0.99.")
]
ExactOption = Annotated[bool, typer.Option("--exact", help="Keep every direction that the sum has.")]
MissingOption = Annotated[
    Literal["zero", "renormalise"],
    typer.Option("--missing", help="A module that an adapter lacks counts as unchanged, or is left out of the mean."),
]
AccuracyOption = Annotated[
    Literal["exact", "fast"],
    typer.Option("--accuracy", help="Within 1e-6 or within 1e-3 of the best approximation of its rank."),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Of the factors written.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda or cuda:N.")]
DifferentBasesOption = Annotated[
    bool, typer.Option("--allow-different-bases", help="Take adapters that name different base models.")
]
ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Show how each module was decomposed and why; every one with --inspect.")
]
InspectOption = Annotated[
    str | None, typer.Option("--inspect", metavar="ADAPTER", help="Show the spectrum of one adapter instead.")
]
MergeOutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder to write; with --inspect a picture (.svg, .png or .pdf). Must not exist."),
]


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show more log messages.")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit()
    handler = RichHandler(console=err, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], format="%(message)s")


@app.command(epilog="Example: flexlora run configs/demo.yaml rounds.num_rounds=10 --out runs/demo")
def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/run"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in --out first.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the final table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a model across clients; write adapters, records and a report."""
    from flexlora.experiment.config_file import load_config
    from flexlora.experiment.live_progress import LiveProgress
    from flexlora.experiment.run import run_experiment
    from flexlora.experiment.terminal import print_summary

    settings = load_config(config, overrides or (), check_paths=True)
    _hide_other_progress_bars()
    with (
        _interruptible("the same command with --resume continues from the last checkpoint"),
        LiveProgress(err, hidden=quiet or as_json) as progress,
    ):
        result = run_experiment(settings, folder, resume=resume, overwrite=overwrite, notify=progress)
    if as_json:
        _print_json(result.summary())
    else:
        print_summary(out, result)
    if not result.has_progress:
        err.print(
            f"[bold red]No progress:[/] {escape(result.stopped or 'no client ever sent a usable update')}. "
            f"The reasons are in {escape(str(result.report))}."
        )
        raise typer.Exit(EXIT_NO_PROGRESS)


@app.command(
    epilog="Example: flexlora compare configs/demo.yaml --methods fedit,flexlora,aligned --draws 8 --jobs 2 --out cmp"
)
def compare(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods", help="[LABEL=]METHOD[:KEY=VALUE]...[@RATE], separated by commas; @RATE fixes a rate."
        ),
    ] = "fedit,flexlora,aligned",
    draws: Annotated[int, typer.Option("--draws", help="Paired draws that count; at least 8 for a claim.")] = 8,
    tuning_draws: Annotated[
        int, typer.Option("--tuning-draws", help="Draws that choose learning rates; 0 takes the configuration's.")
    ] = 2,
    trials: Annotated[int, typer.Option("--trials", help="Most learning rates tried for each method.")] = 5,
    distributions: Annotated[
        str | None, typer.Option("--distributions", help="Of client types, as uniform,heavy_tail_light.")
    ] = None,
    tune_on: Annotated[
        str | None,
        typer.Option("--tune-on", help="The distribution that learning rates are chosen on; default each its own."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="Label of the arm that differences are to; default fedit_smallest, without controls the first method.",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs side by side, one thread each; default one per core.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0, help="Start no further run after this; the same command goes on later."),
    ] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="Score losses only; generate no answers.")] = False,
    no_controls: Annotated[bool, typer.Option("--no-controls", help="Leave the controls out.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the comparison; goes on with what is in it.")] = Path(
        "runs/compare"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget what is in --out first.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Make runs that failed again.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the final table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare methods on paired draws, each at its own learning rate, with all controls; see docs/compare.md."""
    from flexlora.experiment.compare import run_comparison
    from flexlora.experiment.compare_arms import read_arms
    from flexlora.experiment.compare_progress import CompareProgress, FreshPage
    from flexlora.experiment.compare_study import make_study, reference_of
    from flexlora.report.compare_page import write_page
    from flexlora.report.compare_terminal import summary_table
    from flexlora.report.paired import summary

    study = make_study(
        config,
        overrides or (),
        read_arms(methods),
        distributions=[name.strip() for name in (distributions or "").split(",") if name.strip()],
        draws=draws,
        tuning_draws=tuning_draws,
        trials=trials,
        text=not no_text,
        tune_on=tune_on,
        with_controls=not no_controls,
    )
    reference = reference_of(study, reference)
    _hide_other_progress_bars()
    until = None if minutes is None else time.time() + 60 * minutes
    with (
        _interruptible("the same command continues with the runs that are left"),
        CompareProgress(err, FreshPage(folder, reference), hidden=quiet or as_json) as progress,
    ):
        rows = run_comparison(
            study,
            folder,
            jobs=jobs or os.cpu_count() or 1,
            overwrite=overwrite,
            until=until,
            retry_failed=retry_failed,
            notify=progress,
        )
    found = summary(rows, reference=reference)
    page = write_page(folder, reference) if rows else None
    if as_json:
        _print_json({"folder": str(folder), "page": page and str(page), "summary": found.to_json()})
    else:
        out.print(summary_table(found))
        if page is not None:
            out.print(f"Page     {page}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: flexlora plan configs/natural_instructions.yaml data.path=natural-instructions")
def plan(config: ConfigArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Show what a run will do and what it will cost each kind of client, before any weight is loaded."""
    from flexlora.experiment.config_file import load_config
    from flexlora.experiment.estimate import estimate_experiment
    from flexlora.experiment.terminal import print_estimate

    estimate = estimate_experiment(load_config(config, overrides or (), check_paths=True))
    if as_json:
        _print_json(estimate.to_json())
    else:
        print_estimate(out, estimate)


@app.command(epilog="Example: flexlora export runs/demo --rank 8 --out adapter")
def export(
    run_folder: RunArgument,
    folder: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="At most the server's, which is the default.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Write the whole model with the adapter merged in.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the global adapter of a run as a standard PEFT folder, at any rank."""
    from flexlora.experiment.export import export_run

    _hide_other_progress_bars()
    written = export_run(run_folder, folder, rank=rank, merged=merged)
    if as_json:
        _print_json({"folder": str(folder), **written})
    else:
        facts = ", ".join(f"{key} {value}" for key, value in written.items())
        out.print(f"Wrote {folder} ({facts})", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: flexlora merge clinic-a clinic-b me/on-the-hub --weights 3,1,1 --rank 16 --out merged")
def merge(
    adapters: AdaptersArgument = None,
    weights: WeightsOption = None,
    method: MergeMethodOption = "mean",
    rank: MergeRankOption = None,
    energy: EnergyOption = None,
    exact: ExactOption = False,
    missing: MissingOption = "zero",
    accuracy: AccuracyOption = "exact",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    allow_different_bases: DifferentBasesOption = False,
    explain: ExplainOption = False,
    inspect: InspectOption = None,
    target: MergeOutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge LoRA adapters of any ranks, exactly, or inspect one."""
    if inspect is not None:
        if adapters or (weights, rank, energy, exact) != (None, None, None, False):
            more = f"{len(adapters)} more" if adapters else "--weights, --rank, --energy or --exact too"
            raise FlexLoraError(f"--inspect shows one adapter and merges nothing; got {more}")
        _inspect(inspect, target, every_module=explain, as_json=as_json)
        return
    if not adapters or target is None:
        raise FlexLoraError("merging needs adapters and the folder to write: flexlora merge A B --out DIR")
    from flexlora.adapters.merge import merge as merge_adapters
    from flexlora.adapters.terminal import module_progress, print_merge

    with _interruptible("nothing was written"), module_progress(err, "merging", hidden=as_json) as progress:
        result = merge_adapters(
            adapters,
            _numbers(weights) if weights is not None else None,
            out=target,
            method=method,
            rank=rank,
            energy=energy,
            exact=exact,
            missing=missing,
            accuracy=accuracy,
            device=device,
            dtype=dtype,
            allow_different_bases=allow_different_bases,
            notify=progress,
        )
    if as_json:
        _print_json(result.to_json())
    else:
        print_merge(out, result, explain=explain)


def _inspect(adapter: str, picture: Path | None, *, every_module: bool, as_json: bool) -> None:
    from flexlora.adapters.inspection import PICTURE_ENDINGS, inspect_adapter
    from flexlora.adapters.terminal import module_progress, print_inspection

    if picture is not None and (picture.suffix not in PICTURE_ENDINGS or os.path.lexists(picture)):
        raise FlexLoraError(
            f"--out must be a new file that ends in {', '.join(PICTURE_ENDINGS)} with --inspect; got {picture}"
        )
    with _interruptible("nothing was written"):
        with module_progress(err, "inspecting", hidden=as_json) as progress:
            found = inspect_adapter(adapter, progress)
        if picture is not None:
            # Only here: it takes a second, and only pictures need it.
            from flexlora.adapters.figure import write_picture

            write_picture(found, picture)
    if as_json:
        _print_json({**found.to_json(), "picture": None if picture is None else str(picture)})
        return
    print_inspection(out, found, every_module=every_module)
    if picture is not None:
        out.print(f"Wrote {picture}", highlight=False, markup=False, soft_wrap=True)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise FlexLoraError(f"--weights must be numbers separated by commas, as 3,1,1; got {text}") from None


@app.command(name="eval", epilog="Example: flexlora eval runs/demo --rank 4 data.test_examples_per_task=50")
def evaluate(
    run_folder: RunArgument,
    overrides: OverridesArgument = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Cut the adapter to this rank first.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Score the adapter of a run on its unseen tasks, compared with the base model alone."""
    from flexlora.experiment.score_run import evaluate_run
    from flexlora.experiment.terminal import print_evaluation

    _hide_other_progress_bars()
    scores = evaluate_run(run_folder, overrides or (), rank=rank)
    if as_json:
        _print_json({name: json.loads(record.model_dump_json()) for name, record in scores.items()})
    else:
        print_evaluation(out, scores)


@app.command(epilog="Example: flexlora report runs/wait runs/deadline runs/async --target 30")
def report(
    run_folder: RunArgument,
    others: Annotated[
        list[Path] | None,
        typer.Argument(metavar="OTHER", help="Folders of runs to compare it with on the virtual clock."),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            "--target",
            help="Unseen ROUGE-L to reach; default the run's own, or one that all runs that learned have reached.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write report.html again from what a run has recorded so far, compared with other runs if any are named."""
    from flexlora.report.comparison import comparison_notes, timed_runs
    from flexlora.report.page import write_report
    from flexlora.report.run_folder import read_run
    from flexlora.report.terminal import print_virtual_time

    for folder in (run_folder, *(others or ())):
        if not folder.is_dir():
            raise FlexLoraError(f"RUN and OTHER must be folders of runs; there is no folder {folder}")
    path = write_report(run_folder, others or (), target)
    run, beside = read_run(run_folder), [read_run(other) for other in others or ()]
    notes = comparison_notes(run, beside, target)
    timed, target = timed_runs(run, beside, target)
    if as_json:
        reached = {one.name: one.seconds_to(target) for one in timed}
        found = {"report": str(path), "target_rouge_l": target, "virtual_seconds_to_target": reached, "notes": notes}
        _print_json(found)
        return
    print_virtual_time(out, timed, target, notes)
    out.print(f"Wrote {path}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: flexlora methods flexlora")
def methods(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Methods to show; default all.")] = None,
    path: Annotated[str | None, typer.Option("--path", help="A Python file with methods of your own.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the aggregation methods, with their options and what is special about them."""
    from flexlora.experiment.method_help import describe_methods, print_methods

    described = describe_methods(names or (), path)
    if as_json:
        _print_json(described)
    else:
        print_methods(out, described)


@app.command(epilog="Example: flexlora doctor")
def doctor(as_json: JsonOption = False) -> None:
    """Check versions, devices and files, and say how to fix what is wrong."""
    from flexlora.experiment.doctor import examine

    findings = examine()
    if as_json:
        _print_json([finding.to_json() for finding in findings])
    else:
        table = Table("", "Check", "Found", "What to do", box=None, pad_edge=False)
        for finding in findings:
            mark = "[green]ok[/]" if finding.is_fine else "[yellow]!![/]"
            table.add_row(mark, Text(finding.check), Text(finding.found), Text(finding.fix))
        out.print(table)
    if any(finding.is_fatal for finding in findings):
        raise typer.Exit(EXIT_MACHINE)


class _Interrupted(Exception):
    """The user interrupted the command; the message says what that means."""


@contextmanager
def _interruptible(consequence: str) -> Iterator[None]:
    """Say ``consequence`` if the user interrupts the ``with`` block."""
    try:
        yield
    except KeyboardInterrupt:
        raise _Interrupted(consequence) from None


def _hide_other_progress_bars() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _print_json(value: Any) -> None:
    # Not through rich: it wraps long lines, and programs read this.
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _guarded(command: Callable[[], None]) -> int:
    try:
        command()
    except FlexLoraError as error:
        err.print("[bold red]Error:[/]", end=" ")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return EXIT_WRONG_INPUT
    except _Interrupted as interruption:
        err.print(f"Interrupted; {interruption}.")
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        err.print("Interrupted.")
        return EXIT_INTERRUPTED
    except SystemExit as leaving:
        if leaving.code == EXIT_INTERRUPTED:
            err.print("Interrupted.")  # Caught by typer, which says nothing.
        return leaving.code if isinstance(leaving.code, int) else EXIT_ERROR
    except (OSError, MemoryError) as error:
        err.print("[bold red]System error:[/]", end=" ")
        err.print(f"{error or type(error).__name__}", markup=False, highlight=False)
        return EXIT_MACHINE
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            err.print("[bold red]Out of device memory.[/] Lower training.batch_size, evaluation.batch_size or ranks.")
            return EXIT_MACHINE
        err.print(traceback.format_exc(), markup=False, highlight=False)
        err.print("[bold red]This should not have happened.[/] Please report it with the lines above.")
        return EXIT_ERROR
    return 0


def main() -> None:
    """Run the command line and leave with one of the documented exit codes."""
    # Before torch is imported: idle OpenMP threads that spin make small operations slow on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A command must not fail because the terminal lacks a letter.
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_guarded(app))


if __name__ == "__main__":
    main()
