"""Defines the command line: its verbs, each with an example, and how a command starts.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done; 1 an unexpected error; 2 wrong
configuration, input or usage; 3 the run made no progress; 4 the machine failed (disk, permission, memory); 130
interrupted, ``--resume`` continues.
"""

import io
import logging
import os
import sys
from typing import Annotated

try:
    import typer
    from rich.logging import RichHandler

    from flexlora.verbs.certificates import certificates
    from flexlora.verbs.client import client
    from flexlora.verbs.compare import compare
    from flexlora.verbs.doctor import doctor
    from flexlora.verbs.evaluate import evaluate
    from flexlora.verbs.export import export
    from flexlora.verbs.group import Verbs
    from flexlora.verbs.init import init
    from flexlora.verbs.leaving import guarded
    from flexlora.verbs.merge import merge
    from flexlora.verbs.methods import methods
    from flexlora.verbs.plan import plan
    from flexlora.verbs.report import report
    from flexlora.verbs.round import steps as round_steps
    from flexlora.verbs.run import run
    from flexlora.verbs.server import server
    from flexlora.verbs.status import status, stop
    from flexlora.verbs.terminal import err, out
except KeyboardInterrupt:
    # Loading these takes most of the time before main can catch an interruption.
    sys.stderr.write("Interrupted.\n")
    sys.exit(130)

from flexlora import __version__
from flexlora.foreign_logs import quiet_libraries
from flexlora.text import printable

ENDLESS_COLUMNS = 10_000

VERBS = (
    ("run", run, "flexlora run demo rounds.num_rounds=10 --out runs/demo"),
    (
        "compare",
        compare,
        "flexlora compare demo --methods fedit,flexlora,aligned --draws 8 --jobs 2 --out cmp",
    ),
    ("plan", plan, "flexlora plan configs/natural_instructions.yaml data.path=natural-instructions"),
    ("export", export, "flexlora export runs/demo --rank 8 --out adapter"),
    ("merge", merge, "flexlora merge clinic-a clinic-b me/on-the-hub --weights 3,1,1 --rank 16 --out merged"),
    ("eval", evaluate, "flexlora eval runs/demo --rank 4 data.test_examples_per_task=50"),
    ("report", report, "flexlora report runs/wait runs/deadline runs/async --target 30"),
    ("init", init, "flexlora init own-data my-federation"),
    ("methods", methods, "flexlora methods flexlora"),
    ("doctor", doctor, "flexlora doctor"),
    ("server", server, "flexlora server federation.yaml --host 0.0.0.0 --certificates certificates --out runs/fed"),
    ("client", client, "flexlora client --server fed.example.org:9440 --data rows.jsonl --certificates alpha"),
    ("certificates", certificates, "flexlora certificates --host fed.example.org --client alpha --client beta"),
    ("status", status, "flexlora status runs/fed"),
    ("stop", stop, "flexlora stop runs/fed"),
)
VERBS_OF_STEPS = (
    (
        "round",
        round_steps,
        "Run a federation whose server and clients exchange nothing but files.",
        "flexlora round init federation.yaml --out runs/hospitals",
    ),
)

app = typer.Typer(
    name="flexlora",
    help="Fine-tune one language model across many data owners whose devices afford different LoRA ranks.",
    no_args_is_help=True,
    cls=Verbs,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 unexpected error, 2 wrong input, 3 no progress, 4 disk or memory, 130 interrupted.",
)
for _name, _verb, _example in VERBS:
    app.command(name=_name, epilog=f"Example: {_example}")(_verb)
for _name, _steps, _help, _example in VERBS_OF_STEPS:
    app.add_typer(_steps, name=_name, help=_help, epilog=f"Example: {_example}")


class _OneLine(logging.Formatter):
    """Writes messages of this package, which may hold names of others, without their line breaks."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message of a record, before what a traceback adds."""
        text = super().formatMessage(record)
        return printable(text) if record.name.partition(".")[0] == "flexlora" else text


def _say_version(wanted: bool) -> None:
    if wanted:
        # Not through rich: programs read this.
        sys.stdout.write(f"flexlora {__version__}\n")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_say_version)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show more log messages.")] = False,
) -> None:
    handler = RichHandler(console=err, show_path=False, show_time=False)
    handler.setFormatter(_OneLine("%(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    quiet_libraries(verbose=verbose)


def main() -> None:
    """Run the command line and leave with one of the documented exit codes."""
    # Before torch is imported: idle OpenMP threads that spin make small operations slow on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A command must not fail because the terminal lacks a letter.
            stream.reconfigure(errors="backslashreplace")
    if not out.is_terminal and "COLUMNS" not in os.environ:
        # Programs and files have no width.
        out.width = ENDLESS_COLUMNS
    sys.exit(guarded(app))


if __name__ == "__main__":
    main()
