"""Offers what users with a training loop of their own need: for simulations, and for real rounds."""

from flexlora.engines.exchange_loop import Participation, patch, take_part
from flexlora.training.hf_trainer import TrainerFactory, from_hf
from flexlora.training.own_loop import TrainFunction, TrainingRow, TrainingSettings

__all__ = [
    "Participation",
    "TrainFunction",
    "TrainerFactory",
    "TrainingRow",
    "TrainingSettings",
    "from_hf",
    "patch",
    "take_part",
]
