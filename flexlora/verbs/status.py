"""The verbs ``status`` and ``stop``: look at a running server, and end it."""

import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from flexlora.errors import FlexLoraError
from flexlora.progress import stage
from flexlora.text import printable
from flexlora.verbs.arguments import JsonOption
from flexlora.verbs.completion import runs
from flexlora.verbs.terminal import err, out, print_json

SECONDS_TO_STOP = 30.0

ServerArgument = Annotated[
    Path,
    typer.Argument(
        metavar="[RUN]", help="The folder of the server's run; that of the demo if left out.", autocompletion=runs
    ),
]


def status(run: ServerArgument = Path("runs/federation"), as_json: JsonOption = False) -> None:
    """Show where a server is, who is connected at which rank, and how far its run is."""
    from flexlora.experiment.deployment_file import running_deployment
    from flexlora.rounds.records import RECORDS_FILE, last_round

    deployment = running_deployment(run)
    done = last_round(run / RECORDS_FILE)
    if as_json:
        print_json({**asdict(deployment), "num_rounds_done": done})
        return
    how = "without TLS" if deployment.certificates is None else "over TLS"
    line = (
        f"Server at {deployment.address} {how}, process {deployment.process}: round {done} of {deployment.num_rounds}."
    )
    out.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for header in ("Client", "Ranks", "Examples", "Device"):
        table.add_column(header, overflow="fold", justify="right" if header == "Examples" else "left")
    for client in deployment.clients:
        table.add_row(
            *(Text(printable(one)) for one in (client.client_id, client.plan)),
            f"{client.num_examples:,}",
            Text(printable(client.device)),
        )
    if deployment.clients:
        out.print(table)
    else:
        out.print("No client is connected.")
    for reason in deployment.refused:
        out.print(f"Refused: {printable(reason)}", highlight=False, markup=False, soft_wrap=True)


def stop(run: ServerArgument = Path("runs/federation")) -> None:
    """End a running server as Ctrl-C does; flexlora server with --resume continues its run."""
    from flexlora.experiment.deployment_file import is_running, running_deployment

    deployment = running_deployment(run)
    with stage(err, f"Stopping process {deployment.process}"):
        try:
            os.kill(deployment.process, signal.SIGINT)
        except ProcessLookupError:
            pass  # It has ended meanwhile.
        except PermissionError:
            raise FlexLoraError(
                f"the server in {run} (process {deployment.process}) belongs to another user, who alone can stop it"
            ) from None
        until = time.monotonic() + SECONDS_TO_STOP
        while is_running(deployment) and time.monotonic() < until:
            time.sleep(0.05)
    if is_running(deployment):
        raise FlexLoraError(
            f"process {deployment.process} does not end within {SECONDS_TO_STOP:g} s; end it by: kill -9 "
            f"{deployment.process}"
        )
    out.print(f"Stopped. The run in {run} continues with --resume.", highlight=False, markup=False, soft_wrap=True)
