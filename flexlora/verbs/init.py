"""The verb ``init``: writes a commented configuration to start from."""

import shlex
from pathlib import Path
from typing import Annotated, cast

import typer

from flexlora.progress import stage
from flexlora.verbs.arguments import JsonOption
from flexlora.verbs.terminal import err, out, print_json


def init(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[demo|own-data|natural-instructions] DIR",
            help="What it is about, demo if left out, and the folder to write to.",
            autocompletion=lambda incomplete: [
                kind for kind in ("demo", "own-data", "natural-instructions") if kind.startswith(incomplete)
            ],
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Write a commented configuration that runs as it is, with made-up data in the place of yours."""
    from flexlora.experiment.starter import STARTERS, Starter, StarterError, write_starter

    *kinds, folder = words
    kind = kinds[0] if kinds else "demo"
    if len(kinds) > 1 or kind not in STARTERS:
        raise StarterError(f"init takes one of {', '.join(STARTERS)} and a folder to write to; got {' '.join(words)}")
    if not kinds and folder in STARTERS:
        raise StarterError(f"init needs the folder to write to as well: flexlora init {folder} DIR")
    with stage(err, "Writing", hidden=as_json):
        path = write_starter(cast("Starter", kind), Path(folder))
    if as_json:
        print_json({"config": str(path)})
        return
    name, place = shlex.quote(str(path)), shlex.quote(str(Path(folder) / "run"))
    out.print(f"Wrote {path}. Next:", highlight=False, markup=False, soft_wrap=True)
    for command in (f"flexlora plan {name}", f"flexlora run {name} --out {place}"):
        out.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)
