"""The verb ``run``: fine-tunes a model across clients."""

from pathlib import Path
from typing import Annotated

import typer

from flexlora.verbs.arguments import ConfigArgument, JsonOption, OverridesArgument
from flexlora.verbs.leaving import interruptible
from flexlora.verbs.run_end import tell_result
from flexlora.verbs.terminal import err, hide_other_progress_bars, reading


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
    with reading(config):
        from flexlora.experiment.config_file import load_config
        from flexlora.experiment.live_progress import LiveProgress
        from flexlora.experiment.run_folder import check_folder
        from flexlora.experiment.stages import Stage

        settings = load_config(config, overrides or (), check_paths=True)
        check_folder(settings, folder, resume, overwrite)
    with (
        interruptible("the same command with --resume continues from the last checkpoint"),
        LiveProgress(err, hidden=quiet or as_json) as progress,
    ):
        progress(Stage("Loading libraries"))
        # Only here: loading torch takes seconds, and a mistake is told before.
        from flexlora.experiment.run import run_experiment

        hide_other_progress_bars()
        result = run_experiment(settings, folder, resume=resume, overwrite=overwrite, notify=progress)
    tell_result(result, as_json=as_json)
