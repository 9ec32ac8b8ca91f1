"""Runs a client: the process that trains, and the connection to the server."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flexlora.engines.flower.certificates import read_private_key
from flexlora.engines.flower.client_loop import ClientLoop, News
from flexlora.engines.flower.node import Place
from flexlora.engines.flower.resident import Resident
from flexlora.errors import FlexLoraError
from flexlora.experiment.client_order import ClientRequestError, ClientSetup
from flexlora.experiment.client_process import MODULE
from flexlora.files import write_whole
from flexlora.locks import locked

STATE_FILE, LOG_FILE = "node.json", "client.log"


def run_client(
    setup: ClientSetup, notify: Callable[[News], None], *, wait_seconds: float = 300.0, stays: bool = False
) -> None:
    """Take part in the run of a server until it is over.

    Args:
        setup: The client.
        notify: Told what happens.
        wait_seconds: How long to try to reach a server that does not answer.
        stays: Whether to wait for another run then.

    Raises:
        FlexLoraError: If the server refuses this client, cannot be reached, or this client cannot take part.
    """
    with locked(setup.folder, lambda holder: _in_use(setup.folder, holder)):
        state = setup.folder / STATE_FILE
        key = None if setup.key is None else read_private_key(setup.key)

        def remember(node_id: int) -> None:
            """Keep the number of this client for the case that it is killed."""
            write_whole(state, json.dumps({"server": setup.server, "node_id": node_id}))

        with Resident(MODULE, setup.order.to_bytes(), setup.folder / LOG_FILE) as resident:
            loop = ClientLoop(
                place=Place(setup.server, setup.authority, key),
                answer=resident.answer,
                notify=notify,
                remember=remember,
                wait_seconds=wait_seconds,
                stays=stays,
            )
            loop.run(_earlier_node(state, setup.server))
        state.unlink(missing_ok=True)


def _earlier_node(state: Path, server: str) -> int:
    """Return the number that this client had at the server when it was killed; 0 if it was not."""
    with suppress(OSError, ValueError):
        content = json.loads(state.read_text())
        if isinstance(content, dict) and content.get("server") == server and isinstance(content.get("node_id"), int):
            return content["node_id"]
    return 0


def _in_use(folder: Path, holder: str) -> FlexLoraError:
    return ClientRequestError(
        f"{folder} belongs to a client that is running ({holder}); give this one another --name or --out"
    )
