"""Flower as the engine: the one folder that knows flwr."""
