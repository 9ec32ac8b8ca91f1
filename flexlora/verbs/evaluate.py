"""The verb ``eval``: scores the adapter of a run."""

import json
from typing import Annotated, Literal

import typer

from flexlora.verbs.arguments import JsonOption, OverridesArgument, RunArgument
from flexlora.verbs.terminal import err, hide_other_progress_bars, out, print_json, reading


def evaluate(
    run_folder: RunArgument,
    overrides: OverridesArgument = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Cut the adapter to this rank first.")] = None,
    which: Annotated[
        Literal["last", "best"], typer.Option("--round", help="The last round, or that of the lowest validation loss.")
    ] = "last",
    categories: Annotated[bool, typer.Option("--categories", help="Show every category of tasks.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Score the adapter of a run on its unseen tasks, compared with the base model alone."""
    with reading(run_folder):
        from flexlora.experiment.config_file import load_config
        from flexlora.experiment.kept_rounds import check_checkpoints, check_rank, known_top_rank
        from flexlora.experiment.live_progress import LiveProgress
        from flexlora.experiment.run_folder import CONFIG_FILE, read_run_config
        from flexlora.experiment.score_changes import check_changes
        from flexlora.experiment.stages import Stage

        before = read_run_config(run_folder)
        check_changes(before, load_config(run_folder / CONFIG_FILE, overrides or (), check_paths=True))
        check_checkpoints(run_folder)
        top = known_top_rank(before, run_folder)
        if top is not None:
            check_rank(rank, top)
    with LiveProgress(err, hidden=as_json) as progress:
        progress(Stage("Loading libraries"))
        # Only here: loading torch takes seconds, and a mistake is told before.
        from flexlora.experiment.score_run import evaluate_run
        from flexlora.experiment.terminal import MOST_CATEGORIES, print_evaluation

        hide_other_progress_bars()
        scores = evaluate_run(run_folder, overrides or (), rank=rank, which=which, notify=progress)
    if as_json:
        print_json({name: json.loads(record.model_dump_json()) for name, record in scores.items()})
    else:
        most = sum(len(record.categories) for record in scores.values()) if categories else MOST_CATEGORIES
        print_evaluation(out, scores, most_categories=most)
