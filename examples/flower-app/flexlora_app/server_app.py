"""The ServerApp. It runs the rounds of ``federation.yaml`` with the SuperNodes that are connected."""

from pathlib import Path

from flexlora.flower import server_app

app = server_app(Path(__file__).parents[1])
