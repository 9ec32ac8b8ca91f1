"""The verb ``export``: writes the adapter of a run as a PEFT folder."""

from pathlib import Path
from typing import Annotated

import typer

from flexlora.verbs.arguments import JsonOption, PadToOption, RanksOption, RunArgument, UniformOption, check_uniform
from flexlora.verbs.terminal import hide_other_progress_bars, out, print_json


def export(
    run_folder: RunArgument,
    folder: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="At most the server's, which is the default.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Write the whole model with the adapter merged in.")] = False,
    ranks: RanksOption = "uniform",
    uniform: UniformOption = False,
    pad_to: PadToOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the global adapter of a run as a standard PEFT folder, at any rank."""
    from flexlora.experiment.export import export_run

    check_uniform(uniform, ranks)
    hide_other_progress_bars()
    written = export_run(run_folder, folder, rank=rank, merged=merged, ranks=ranks, pad_to=pad_to)
    if as_json:
        print_json({"folder": str(folder), **written})
    else:
        facts = ", ".join(f"{key} {value}" for key, value in written.items())
        out.print(f"Wrote {folder} ({facts})", highlight=False, markup=False, soft_wrap=True)
