"""Offers what an app of Flower's needs: the ServerApp, and a strategy for people who have a ServerApp of their own."""

from functools import partial
from pathlib import Path

from flwr.serverapp import ServerApp

from flexlora.engines.flower.server_app import make_server_app
from flexlora.engines.flower.strategy import FlexLoraStrategy
from flexlora.experiment.flower_app import run_app

__all__ = ["FlexLoraStrategy", "server_app"]


def server_app(folder: Path | None = None) -> ServerApp:
    """Return a ServerApp that runs the rounds of a configuration with the clients that are connected.

    The configuration and the run folder are named by ``[tool.flwr.app.config]``; see ``docs/flower.md``.

    Args:
        folder: Of the app, in which the configuration may be; None takes absolute paths only.
    """
    return make_server_app(partial(run_app, folder=folder))
