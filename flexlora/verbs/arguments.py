"""The arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flexlora.errors import FlexLoraError
from flexlora.verbs.completion import configurations, runs, settings

ConfigArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", help="A YAML file, or demo, which comes with flexlora.", autocompletion=configurations
    ),
]
OptionalConfigArgument = Annotated[
    Path | None,
    typer.Argument(metavar="[CONFIG]", help="A YAML file; left out with --demo.", autocompletion=configurations),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that replace those of the file, as rounds.num_rounds=3.",
        autocompletion=settings,
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", autocompletion=runs)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
RanksOption = Annotated[
    Literal["uniform", "exact"],
    typer.Option(
        "--ranks",
        help="uniform pads all modules to one rank, which every reader understands; exact keeps each its own.",
    ),
]
UniformOption = Annotated[bool, typer.Option("--uniform", help="The same as --ranks uniform, the default.")]
PadToOption = Annotated[
    int | None,
    typer.Option(
        "--pad-to", help="The one rank to pad to, of those vLLM makes room for: 1, 8, 16, 32, 64, 128, 256, 320, 512."
    ),
]


def check_uniform(uniform: bool, ranks: str) -> None:
    """Raise FlexLoraError if both ways of writing ranks were asked for."""
    if uniform and ranks == "exact":
        raise FlexLoraError("--uniform is --ranks uniform; got --ranks exact too, leave one of them out")
