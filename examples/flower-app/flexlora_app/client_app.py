"""The ClientApp. What a client trains on, and at which rank, is said by ``--node-config`` of its SuperNode."""

from flexlora.engines.flower.client_app import app

__all__ = ["app"]
