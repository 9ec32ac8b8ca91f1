"""Training loops of the user's own: the door for ``from_hf`` and the types of a training function."""

from flexlora.training.hf_trainer import TrainerFactory, from_hf
from flexlora.training.own_loop import TrainFunction, TrainingRow, TrainingSettings

__all__ = ["TrainFunction", "TrainerFactory", "TrainingRow", "TrainingSettings", "from_hf"]
