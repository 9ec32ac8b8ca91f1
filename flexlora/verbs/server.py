"""The verb ``server``: runs a federation of clients on machines of their own."""

from pathlib import Path
from typing import Annotated

import typer

from flexlora.text import printable
from flexlora.verbs.arguments import JsonOption, OptionalConfigArgument, OverridesArgument
from flexlora.verbs.extras import need_flower
from flexlora.verbs.leaving import ended_by_sigterm, interruptible
from flexlora.verbs.run_end import tell_result
from flexlora.verbs.terminal import err, hide_other_progress_bars, reading


def server(
    config: OptionalConfigArgument = None,
    overrides: OverridesArgument = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is every address of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 9440,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder of the run; runs/run if left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in --out first.")] = False,
    certificates: Annotated[
        Path | None,
        typer.Option("--certificates", help="Folder that flexlora certificates made; certificates if left out."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve without TLS and let anybody join; on this machine only.")
    ] = False,
    min_clients: Annotated[
        int | None,
        typer.Option("--min-clients", min=1, help="Start when so many are connected."),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="A small run with made-up data, for flexlora client --demo on this machine.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the final table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Wait for clients, train with them round by round, and write adapters, records and a report."""
    need_flower()
    wanted = [*(overrides or ()), *([] if min_clients is None else [f"deployment.min_clients={min_clients}"])]
    with reading(config or "the configuration of the demo"):
        from flexlora.experiment.live_progress import LiveProgress
        from flexlora.experiment.run_folder import check_folder
        from flexlora.experiment.server_order import opened_link, server_config
        from flexlora.experiment.stages import Stage

        settings, place = server_config(config, wanted, folder, demo)
        overwrite = overwrite or (demo and not resume)
        check_folder(settings, place, resume, overwrite)
        link = opened_link(place, host, port, certificates, insecure, demo)

    def say(line: str) -> None:
        """Print a line above the moving bars."""
        if not (quiet or as_json):
            err.print(f"  {printable(line)}", highlight=False, markup=False, soft_wrap=True)

    with (
        ended_by_sigterm(),
        interruptible("the same command with --resume continues from the last checkpoint"),
        link,
        LiveProgress(err, hidden=quiet or as_json) as progress,
    ):
        progress(Stage("Loading libraries"))
        from flexlora.engines.flower.children import make_quiet

        make_quiet()
        # Only here: loading torch and Flower takes seconds, and a mistake is told before.
        from flexlora.experiment.serving import serve_run

        hide_other_progress_bars()
        result = serve_run(settings, place, link, resume=resume, overwrite=overwrite, notify=progress, say=say)
    tell_result(result, as_json=as_json)
