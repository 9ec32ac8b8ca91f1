"""The verb ``export``: writes the adapter of a run as a PEFT folder."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer

from flexlora.errors import FlexLoraError
from flexlora.progress import stage
from flexlora.verbs.arguments import JsonOption, PadToOption, RanksOption, RunArgument, UniformOption, check_uniform
from flexlora.verbs.terminal import err, hide_other_progress_bars, out, print_json


def export(
    run_folder: RunArgument,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; must not exist. Needed unless it is pushed.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="At most the server's, which is the default.")
    ] = None,
    which: Annotated[
        Literal["last", "best"], typer.Option("--round", help="The last round, or that of the lowest validation loss.")
    ] = "last",
    merged: Annotated[bool, typer.Option("--merged", help="Write the whole model with the adapter merged in.")] = False,
    ranks: RanksOption = "uniform",
    uniform: UniformOption = False,
    pad_to: PadToOption = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="ID", help="Upload it to the Hugging Face hub as ID too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the global adapter of a run as a standard PEFT folder, at any rank, with a model card."""
    from flexlora.adapters.rank_layout import RankLayout
    from flexlora.experiment.export_request import check_export
    from flexlora.experiment.run_folder import read_run_config

    if folder is None and push_to_hub is None:
        raise FlexLoraError("exporting needs a place: --out DIR, --push-to-hub ORG/NAME, or both")
    check_uniform(uniform, ranks)
    check_export(
        read_run_config(run_folder),
        run_folder,
        folder,
        rank=rank,
        merged=merged,
        layout=RankLayout(ranks, pad_to),
        push_to_hub=push_to_hub,
    )
    with stage(err, "Loading libraries", hidden=as_json):
        # Only here: loading torch takes seconds, and a mistake is told before.
        from flexlora.experiment.export import export_run

        hide_other_progress_bars()
    writing = "Writing the whole model" if merged else "Writing the adapter"
    with TemporaryDirectory() as passing, stage(err, writing, hidden=as_json):
        target = folder or Path(passing) / "adapter"
        written = export_run(
            run_folder,
            target,
            rank=rank,
            which=which,
            merged=merged,
            ranks=ranks,
            pad_to=pad_to,
            push_to_hub=push_to_hub,
        )
    if as_json:
        print_json({"folder": None if folder is None else str(folder), **written})
    else:
        facts = ", ".join(f"{key} {value}" for key, value in written.items())
        out.print(f"Wrote {folder or push_to_hub} ({facts})", highlight=False, markup=False, soft_wrap=True)
