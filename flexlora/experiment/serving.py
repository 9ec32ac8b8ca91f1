"""Runs a server of real clients: Flower's process, the rounds, and a file that says who is connected."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flwr.serverapp import Grid

from flexlora.engines.flower.nodes import ClientNodes
from flexlora.engines.flower.open_run import open_run
from flexlora.engines.flower.superlink import SuperLink
from flexlora.experiment.config import Config
from flexlora.experiment.deployment_file import ConnectedClient, DeploymentFile, remove_deployment
from flexlora.experiment.flower_run import run_on_flower
from flexlora.experiment.result import RunResult
from flexlora.experiment.run_folder import SERVER_FOLDER
from flexlora.experiment.stages import Notify


def serve_run(
    config: Config,
    folder: Path,
    link: SuperLink,
    *,
    resume: bool,
    overwrite: bool,
    notify: Notify,
    say: Callable[[str], None],
) -> RunResult:
    """Run what a configuration describes with the clients that connect to ``link``.

    Args:
        config: The run.
        folder: Where to write.
        link: Not started yet.
        resume: Go on with the run in ``folder``.
        overwrite: Delete the run in ``folder`` first.
        notify: Told about every stage and round.
        say: Told a line whenever a client joins, leaves or is refused, and where the server is.

    Raises:
        FlexLoraError: If the run cannot be started, or too few clients connect.
    """
    certificates = None if link.certificates is None else str(link.certificates.folder.absolute())
    deployment = DeploymentFile(link.address, os.getpid(), certificates, config.rounds.num_rounds)

    @contextmanager
    def opened() -> Iterator[Grid]:
        """Start Flower's process and open a run on it."""
        link.start(folder / SERVER_FOLDER)
        link.wait_until_ready()
        with open_run(link) as grid:
            # Removed only by who has written it: while this folder is another server's, nothing comes this far.
            try:
                deployment.write(folder)
                say(f"Listening at {link.listens_at}" + ("" if certificates else ", without TLS"))
                yield grid
            finally:
                remove_deployment(folder)

    def watch(nodes: ClientNodes, line: str) -> None:
        """Show a change, and write it down for ``flexlora status``."""
        say(line)
        clients = tuple(
            ConnectedClient(name, own.spec.plan.name, own.spec.num_examples, own.device)
            for name, own in nodes.connected().items()
        )
        replace(deployment, clients=clients, refused=tuple(nodes.refused.values())).write(folder)

    return run_on_flower(config, folder, opened, resume=resume, overwrite=overwrite, notify=notify, watch=watch)
