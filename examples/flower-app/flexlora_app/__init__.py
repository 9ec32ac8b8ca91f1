"""Federated LoRA among clients of different ranks, as an app of Flower's."""
