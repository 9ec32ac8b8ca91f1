"""Offers ``from_hf`` and the types of a training function to users with a training loop of their own."""

from flexlora.training.hf_trainer import TrainerFactory, from_hf
from flexlora.training.own_loop import TrainFunction, TrainingRow, TrainingSettings

__all__ = ["TrainFunction", "TrainerFactory", "TrainingRow", "TrainingSettings", "from_hf"]
