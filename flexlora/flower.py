"""Offers what an app of Flower's needs: the ServerApp, and a strategy for people who have a ServerApp of their own."""

from flexlora.engines.flower.server_app import make_server_app
from flexlora.engines.flower.strategy import FlexLoraStrategy
from flexlora.experiment.flower_app import run_app

__all__ = ["FlexLoraStrategy", "server_app"]

server_app = make_server_app(run_app)
"""Runs the rounds of a configuration with the clients that are connected; see ``docs/flower.md``."""
