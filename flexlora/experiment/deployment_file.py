"""Writes and reads what a running server tells programs on its machine: where it is and who is connected."""

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexlora.errors import FlexLoraError
from flexlora.experiment.run_folder import SERVER_FOLDER
from flexlora.files import write_whole
from flexlora.foreign import ForeignError, read_json

DEPLOYMENT_FILE = "deployment.json"

DEMO_FOLDER = Path("runs/federation")
"""Run folder of ``flexlora server --demo``."""


class DeploymentError(FlexLoraError, ValueError):
    """A folder without a running server."""


@dataclass(frozen=True)
class ConnectedClient:
    """A client that is connected.

    Attributes:
        client_id: Its name.
        plan: Name of its rank plan.
        num_examples: That it trains on.
        device: Where it trains.
    """

    client_id: str
    plan: str
    num_examples: int
    device: str


@dataclass(frozen=True)
class DeploymentFile:
    """What a running server says about itself.

    Attributes:
        address: Where clients on this machine reach it, as HOST:PORT.
        process: Number of the server's process.
        certificates: Folder of certificates; None without TLS.
        num_rounds: That the run has.
        clients: Who is connected.
        refused: Why others cannot take part.
    """

    address: str
    process: int
    certificates: str | None
    num_rounds: int
    clients: tuple[ConnectedClient, ...] = ()
    refused: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write it into a run folder."""
        place = folder / SERVER_FOLDER
        place.mkdir(parents=True, exist_ok=True)
        write_whole(place / DEPLOYMENT_FILE, json.dumps(asdict(self), indent=1) + "\n")


def read_deployment(folder: Path) -> DeploymentFile:
    """Return what the server of a run folder says about itself.

    Raises:
        DeploymentError: If no server runs there.
    """
    path = folder / SERVER_FOLDER / DEPLOYMENT_FILE
    try:
        content: Any = read_json(path.read_bytes(), path)
        clients = content.pop("clients")
        found = DeploymentFile(
            **content
            | {"refused": tuple(content["refused"]), "clients": tuple(ConnectedClient(**one) for one in clients)}
        )
        _check(found)
        return found
    except OSError as error:
        raise DeploymentError(
            f"no server runs in {folder} ({path.name} is not there); start one by: flexlora server"
            + (" --demo" if folder == DEMO_FOLDER else f" CONFIG --out {folder}")
        ) from error
    except (ForeignError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise DeploymentError(f"{path} must be what flexlora server writes; start the server again: {error}") from error


def _check(found: DeploymentFile) -> None:
    """Raise ValueError unless the fields are what programs take them for: a signal goes to ``process``."""
    numbers = (found.num_rounds, *(client.num_examples for client in found.clients))
    texts = (found.address, *found.refused)
    clients = (text for client in found.clients for text in (client.client_id, client.plan, client.device))
    if not all(isinstance(text, str) for text in (*texts, *clients, found.certificates or "")):
        raise ValueError("addresses, names and reasons are texts")
    if not all(type(number) is int for number in (*numbers, found.process)):
        raise ValueError("process, num_rounds and num_examples are whole numbers")
    # Numbers below stand for groups of processes, or for all of them.
    if not 0 < found.process < 1 << 31:
        raise ValueError(f"process is the number of one process; got {found.process}")


def is_running(deployment: DeploymentFile) -> bool:
    """Return whether the process that wrote a file is still there."""
    try:
        os.kill(deployment.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):
        # The number may belong to another process by now.
        return b"flexlora" in Path(f"/proc/{deployment.process}/cmdline").read_bytes()
    return True


def running_deployment(folder: Path) -> DeploymentFile:
    """Return what the server that runs in a run folder says about itself.

    Raises:
        DeploymentError: If none runs there.
    """
    deployment = read_deployment(folder)
    if not is_running(deployment):
        raise DeploymentError(
            f"the server in {folder} (process {deployment.process}) has ended without saying so; go on by: flexlora "
            "server with --resume"
        )
    return deployment


def wait_for_deployment(folder: Path, seconds: float) -> None:
    """Return once a server runs in a run folder, or after so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(DeploymentError):
            running_deployment(folder)
            return
        time.sleep(0.2)


def remove_deployment(folder: Path) -> None:
    """Say that no server runs in a run folder."""
    (folder / SERVER_FOLDER / DEPLOYMENT_FILE).unlink(missing_ok=True)
