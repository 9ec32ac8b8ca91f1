"""Lets a training script of the user's own take part in a round over files: adapter in, adapter out.

With a ``transformers.Trainer``, or a subclass such as TRL's ``SFTTrainer``, it takes three lines:

    part = flexlora.patch(trainer, "round-0001/small", client="clinic-a")
    trainer.train()
    part.reply("reply")

Any other loop asks ``take_part`` for the same and calls ``complete_gradients`` before each optimiser step.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import SchedulerType

from flexlora.engines.exchange_client import OpenedBroadcast, check_new, checked_name, open_broadcast
from flexlora.engines.exchange_folder import write_reply
from flexlora.engines.exchange_manifest import ExchangeError
from flexlora.federation.messages import Update
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_digest import base_digest
from flexlora.training.own_loop import TrainingSettings
from flexlora.training.trained_parts import TrainedParts


@dataclass(eq=False)
class Participation:
    """One client's part in one round, trained by a loop of its own.

    The network carries PEFT's LoRA layers with the factors that the server sent, and the branch that is added and not
    trained where the method sends one. The factors to train, and no others, require a gradient.

    Attributes:
        opened: What the server sent.
        client: The client's name.
        model: The base with the factors.
        parts: What is trained.
        trainer: Whose state tells the loss and the steps; None for a loop of another kind.
    """

    opened: OpenedBroadcast
    client: str
    model: AdaptedModel
    parts: TrainedParts
    trainer: Trainer | None = field(default=None, repr=False)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the round; the run's schedule has been applied."""
        return self.opened.manifest.learning_rate

    @property
    def settings(self) -> TrainingSettings:
        """What the run's configuration says about local training; a loop may follow as much of it as it likes."""
        return TrainingSettings(learning_rate=self.learning_rate, **self.opened.manifest.run.training.model_dump())

    def complete_gradients(self) -> None:
        """Add what the run adds to the local loss (FedProx) to the gradients; between ``backward`` and clipping.

        To be called once for each optimiser step, when the gradients of all its passes are there.
        """
        self.parts.complete_gradients()

    def reply(
        self,
        out: Path | str,
        *,
        num_examples: int | None = None,
        loss: float | None = None,
        steps: int | None = None,
        key: Path | None = None,
    ) -> Path:
        """Write the trained adapter as the client's reply and return its folder.

        Args:
            out: Must not exist.
            num_examples: Examples trained on, the weight of the reply; None asks the trainer's data set.
            loss: Mean over the steps, for the records; None asks the trainer.
            steps: Optimiser steps, for the records; None asks the trainer.
            key: The client's private key; None leaves the reply unsigned.

        Raises:
            ExchangeError: If nothing was trained, the number of examples is unknown, or ``out`` exists.
        """
        out = Path(out)
        check_new(out)
        if self.trainer is not None:
            state: Any = self.trainer.state
            if not state.global_step:
                raise ExchangeError("a reply needs a trained adapter; call trainer.train() first")
            losses = [entry["train_loss"] for entry in state.log_history if "train_loss" in entry]
            loss = losses[-1] if loss is None and losses else loss
            steps = state.global_step if steps is None else steps
            num_examples = _num_examples(self.trainer) if num_examples is None else num_examples
        if num_examples is None or num_examples < 1:
            raise ExchangeError(f"a reply needs num_examples, at least 1, for its weight; got {num_examples}")
        told = self.opened.reply_manifest(self.client, num_examples, loss, steps)
        update = Update(self.client, self.model.read(), float(num_examples))
        write_reply(out, update, told, self.opened.manifest, key)
        return out


def take_part(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    broadcast: Path | str,
    *,
    client: str,
    rank: int | None = None,
    base: str | None = None,
    revision: str | None = None,
    server_key: Path | None = None,
) -> Participation:
    """Put what a server sent into a base model, for a loop of the user's own to train in place.

    Args:
        model: The base as ``from_pretrained`` gives it, without adapters; it is frozen but for the factors.
        tokenizer: Its tokenizer.
        broadcast: Folder from the server.
        client: The client's name, the same in all rounds.
        rank: Which broadcast to take from a folder with several.
        base: Folder or hub id that ``model`` was loaded from; None asks the model. Its weights must be the server's.
        revision: Branch, tag or commit of ``base`` on the hub.
        server_key: Public key of the server; None asks for no signature.

    Raises:
        ExchangeError: If the broadcast is not what it says, or the base is another one.
    """
    checked_name(client)
    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        raise ExchangeError(
            "the model must be the base alone, without adapters: the server sends the adapter. Leave peft_config out, "
            "or load the base anew"
        )
    opened = open_broadcast(broadcast, rank, server_key)
    run, name = opened.manifest.run, base or model.name_or_path or ""
    digest = base_digest(name, run.dtype, revision)
    if digest != run.base_sha256:
        raise ExchangeError(
            f"the base model must have the weights of the server's {run.base_model}, SHA-256 {run.base_sha256[:12]}; "
            f"those of {name} have {digest[:12]}: load the same model and revision"
        )
    adapted = AdaptedModel(model, tokenizer, dropout=run.dropout)
    adapted.load(opened.sent)
    return Participation(opened, client, adapted, TrainedParts(adapted, opened.sent, run.training.proximal))


def patch(
    trainer: Trainer,
    broadcast: Path | str,
    *,
    client: str,
    rank: int | None = None,
    base: str | None = None,
    revision: str | None = None,
    server_key: Path | None = None,
) -> Participation:
    """Make a trainer train what a server sent: its factors, its learning rate, its branches, and its FedProx term.

    Args:
        trainer: Built on the base alone and not yet used. Everything else about it stays as its user has chosen.
        broadcast: As for ``take_part``, and so are the others.
        client: The client's name.
        rank: Which broadcast to take.
        base: What the model was loaded from.
        revision: Of ``base``.
        server_key: Public key of the server.

    Raises:
        ExchangeError: As ``take_part`` does, or naming what of the trainer cannot take part.
    """
    if not isinstance(trainer, Trainer):
        raise ExchangeError(f"patch needs a transformers.Trainer, or a subclass; got {type(trainer).__name__}")
    if trainer.optimizer is not None:
        raise ExchangeError(
            "the trainer must not have an optimizer yet, because it would not know the adapter; leave optimizers out"
        )
    arguments: Any = trainer.args
    if arguments.fp16 and open_broadcast(broadcast, rank).manifest.run.training.proximal:
        raise ExchangeError(
            "fp16 scales gradients, to which the run's FedProx term (training.proximal) could not be added; use bf16"
        )
    tokenizer: Any = trainer.processing_class
    model: Any = trainer.model
    part = take_part(
        model, tokenizer, broadcast, client=client, rank=rank, base=base, revision=revision, server_key=server_key
    )
    part.trainer = trainer
    arguments.learning_rate = part.learning_rate
    arguments.lr_scheduler_type, arguments.warmup_steps = SchedulerType.CONSTANT, 0
    arguments._n_gpu = min(1, arguments.n_gpu)  # Copies of the network on other GPUs would train nothing of ours.
    one_pass = trainer.training_step

    def training_step(*inputs: Any, **more: Any) -> Any:
        """Do the trainer's own pass, and complete the gradients after the last one of a step."""
        loss = one_pass(*inputs, **more)
        if trainer.accelerator.sync_gradients:
            part.complete_gradients()
        return loss

    trainer.training_step = training_step
    return part


def _num_examples(trainer: Trainer) -> int | None:
    data: Any = trainer.train_dataset
    return len(data) if hasattr(data, "__len__") else None
