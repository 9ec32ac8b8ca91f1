"""Makes the ServerApp of a run: Flower calls it with a Grid, and everything else happens elsewhere."""

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

RunOnGrid = Callable[[Grid, Mapping[str, Any]], None]
"""Runs a federation over a Grid, with the settings of ``[tool.flwr.app.config]`` and ``flwr run --run-config``."""


def make_server_app(run: RunOnGrid) -> ServerApp:
    """Return a ServerApp that does nothing but call ``run``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(grid, context.run_config)

    return app
