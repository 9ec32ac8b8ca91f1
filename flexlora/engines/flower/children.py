"""Says how Flower's processes and ours are started: nothing calls home, and the same package is imported."""

import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

QUIET: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Colours would end in log files.
    "NO_COLOR": "1",
}
"""Turns telemetry, update checks and the installation of packages off."""


def make_quiet(environment: MutableMapping[str, str] | None = None) -> None:
    """Set what is in ``QUIET``, whatever was set before.

    Args:
        environment: Of a process that will run Flower's code; None takes that of this process. It must happen before
            anything of Flower is imported.
    """
    (os.environ if environment is None else environment).update(QUIET)
    if environment is None:
        # Otherwise each request becomes a line. Flower sets the level of its logger when it is imported.
        for name in ("flwr", "httpx"):
            logging.getLogger(name).addFilter(_is_warning)


def reach_directly(host: str) -> None:
    """Let no proxy of the environment stand between this process and a server on its own machine.

    Requests to it may carry the secret of a deployment, and a proxy would look for the address on its own machine.
    """
    for name in ("no_proxy", "NO_PROXY"):
        others = [part.strip() for part in os.environ.get(name, "").split(",")]
        os.environ[name] = ",".join(dict.fromkeys((*filter(None, others), host)))


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of this package in another process."""
    # Not from the current folder, which may hold something of the same name.
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment() -> dict[str, str]:
    """Return the environment of a process that imports this package from where this process has it."""
    environment = dict(os.environ)
    make_quiet(environment)
    place = str(Path(__file__).parents[3])
    others = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part and part != place]
    environment["PYTHONPATH"] = os.pathsep.join([place, *others])
    return environment


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
