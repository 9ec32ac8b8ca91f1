"""Makes a training loop of a ``transformers.Trainer``, or of a subclass such as TRL's ``SFTTrainer``.

A new trainer is built for every client and round. It learns in place on the network that all clients share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    default_data_collator,
)
from transformers.trainer_utils import SaveStrategy

from flexlora.data.prompts import IGNORED, padding_token
from flexlora.lora.factors import AdapterState
from flexlora.training.one_client import TrainingError
from flexlora.training.own_loop import TrainFunction, TrainingRow, TrainingSettings
from flexlora.training.randomness import all_seeded


@runtime_checkable
class TrainerFactory(Protocol):
    """Builds the trainer of one client."""

    def __call__(
        self,
        model: PreTrainedModel,
        train_dataset: list[TrainingRow],
        tokenizer: PreTrainedTokenizerBase,
        settings: TrainingSettings,
        output_dir: str,
    ) -> Trainer:
        """Return a trainer of ``model`` on ``train_dataset`` whose arguments name ``output_dir``.

        Args:
            model: As a ``TrainFunction`` gets it.
            train_dataset: Rows of ``input_ids``, ``labels`` and ``attention_mask``; for an ``SFTTrainer``,
                ``datasets.Dataset.from_list`` makes a dataset of them.
            tokenizer: The tokenizer of ``model``.
            settings: What the configuration says about local training.
            output_dir: A temporary folder; it is gone after training.
        """
        ...


def from_hf(factory: TrainerFactory) -> TrainFunction:
    """Return a training loop that builds a trainer with ``factory`` for each client and lets it train.

    The trainer's ``seed`` is set to the client's. It saves no checkpoints and shows no progress of its own. A trainer
    without a special data collator gets one that pads labels too. Metrics are ``loss``, ``steps`` and, if the trainer
    logged them, ``first_loss`` and ``last_loss``.
    """
    return _HfLoop(factory)


@dataclass(frozen=True)
class _HfLoop:
    factory: TrainerFactory

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: list[TrainingRow],
        adapter: AdapterState,
        settings: TrainingSettings,
        seed: int,
    ) -> tuple[None, Mapping[str, float]]:
        """Train the client's factors in place."""
        with TemporaryDirectory(prefix="flexlora-") as folder, all_seeded(seed, model.device):
            trainer = self.factory(model, examples, tokenizer, settings, folder)
            _prepare(trainer, tokenizer, Path(folder), seed)
            # Building a trainer seeds the generators with a number of its own.
            with all_seeded(seed, model.device):
                output = trainer.train()
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        metrics = {"loss": float(output.training_loss), "steps": float(output.global_step)}
        if losses:
            metrics |= {"first_loss": losses[0], "last_loss": losses[-1]}
        return None, metrics


def _prepare(trainer: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int) -> None:
    """Check what a factory built, and set what is ours to decide."""
    if not isinstance(trainer, Trainer):
        raise TrainingError(f"the factory must return a transformers.Trainer; got {type(trainer).__name__}")
    arguments: Any = trainer.args
    if Path(arguments.output_dir or "").resolve() != folder.resolve():
        raise TrainingError(
            "the factory must pass its output_dir on to the trainer's arguments, so that nothing is left behind; "
            f"got {arguments.output_dir}"
        )
    arguments.seed = seed % 2**32
    arguments.save_strategy = SaveStrategy.NO
    arguments._n_gpu = min(1, arguments.n_gpu)  # Copies of the network on other GPUs would train nothing of ours.
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if trainer.data_collator is default_data_collator or isinstance(trainer.data_collator, DataCollatorWithPadding):
        trainer.data_collator = _PadRows(padding_token(tokenizer))


@dataclass(frozen=True)
class _PadRows:
    """Pads rows on the right, labels included; the collators of transformers leave labels ragged."""

    padding: int

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.padding, "labels": IGNORED, "attention_mask": 0}
        return {
            name: torch.tensor([[*row[name], *[value] * (length - len(row[name]))] for row in rows])
            for name, value in fill.items()
        }
