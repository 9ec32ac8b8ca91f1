"""Trains one client: factors in, factors out, nothing kept in between.

The loop is our own, because building a Trainer takes longer than training a small client.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from flexlora.data.prompts import EncodedExample, num_labels, padding_token
from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import AdapterState
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.length_runs import PASS_TOKENS, cheapest_runs
from flexlora.training.logits import answer_losses
from flexlora.training.randomness import torch_seeded
from flexlora.training.trained_parts import TrainedParts


class TrainingError(FlexLoraError, ValueError):
    """Data or settings that cannot be used for training."""


class DivergedError(FlexLoraError, ArithmeticError):
    """Local training whose loss is no longer a number."""


@dataclass(frozen=True)
class LocalTraining:
    """How every client trains between receiving and sending.

    Attributes:
        optimizer: ``adamw`` or ``sgd``; its state starts anew for each client in each round.
        batch_size: Most examples in one forward pass.
        gradient_accumulation_steps: Optimiser steps look at this many times ``batch_size`` examples.
        num_epochs: Passes over the examples; a fraction stops inside one. At least one step is made.
        max_steps: Upper limit of optimiser steps.
        max_grad_norm: Norm over all trained factors at which gradients are scaled down; None never does.
        weight_decay: Decoupled for AdamW, added to the gradient for SGD.
        momentum: Of SGD.
        betas: Of AdamW.
        proximal: FedProx's mu: ``mu / 2 * ||s B A - s B0 A0||_F^2`` is added to the loss for each module, ``A0`` and
            ``B0`` being where the client started.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    num_epochs: float = 1.0
    max_steps: int | None = None
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    proximal: float = 0.0

    def num_steps(self, num_examples: int) -> int:
        """Return the number of optimiser steps for this many examples; the last step of an epoch may be smaller."""
        steps_per_epoch = math.ceil(num_examples / (self.batch_size * self.gradient_accumulation_steps))
        num_steps = max(1, math.ceil(self.num_epochs * steps_per_epoch))
        return num_steps if self.max_steps is None else min(num_steps, self.max_steps)


@runtime_checkable
class TrainClient(Protocol):
    """Trains one client at a time, as ``train_client`` does."""

    def __call__(
        self,
        model: AdaptedModel,
        broadcast: Broadcast,
        examples: Sequence[EncodedExample],
        settings: LocalTraining,
        learning_rate: float,
        seed: int,
    ) -> tuple[AdapterState, Mapping[str, float]]:
        """Return the trained factors and what was measured."""
        ...


def train_client(
    model: AdaptedModel,
    broadcast: Broadcast,
    examples: Sequence[EncodedExample],
    settings: LocalTraining,
    learning_rate: float,
    seed: int,
) -> tuple[AdapterState, dict[str, float]]:
    """Return the trained factors, at the ranks of ``broadcast``, and what was measured.

    Trained cores are in ``model.read_cores()`` until something else is loaded; the factors are then as they were sent.

    The loss of a step is the mean over all answer tokens of its examples, however these are split into passes. The
    result depends on the arguments alone: global random generators are neither used nor changed.

    Args:
        model: The base; factors loaded before do not matter.
        broadcast: Where to start from.
        examples: The client's data.
        settings: How to train.
        learning_rate: Constant during this call.
        seed: Decides the order of the examples and the dropout.

    Returns:
        The factors, and ``loss`` (mean over steps), ``first_loss`` and ``last_loss`` (of one step), ``steps``,
        ``tokens`` (padding excluded), ``answer_tokens`` and ``grad_norm`` (mean over steps, before clipping).

    Raises:
        TrainingError: If there are no examples, no answer tokens, or nothing to train.
        DivergedError: If a loss is not finite.
    """
    check_trainable(broadcast, examples)
    model.load(broadcast)
    trained = TrainedParts(model, broadcast, settings.proximal)
    optimizer = _optimizer(trained.parameters, settings, learning_rate)
    padding = padding_token(model.tokenizer)
    losses, norms, num_tokens, num_answers = [], [], 0, 0
    with torch_seeded(seed, model.device), model.dropping_out():
        for batch in step_batches(examples, settings, np.random.default_rng(seed)):
            answer_tokens = num_answer_tokens(batch)
            losses.append(_backward(model, batch, answer_tokens, settings.batch_size, padding))
            # A step without an answer token has no gradient, and terms that are added to the loss move nothing either.
            if answer_tokens:
                trained.complete_gradients()
            norms.append(nn.utils.clip_grad_norm_(trained.parameters, settings.max_grad_norm or math.inf))
            optimizer.step()
            optimizer.zero_grad()
            trained.after_step()
            num_tokens += sum(len(example.input_ids) for example in batch)
            num_answers += answer_tokens
    return model.read(), training_metrics(losses, norms, num_tokens, num_answers)


def check_trainable(broadcast: Broadcast, examples: Sequence[EncodedExample]) -> None:
    """Raise unless there is something to train and something to train on.

    Raises:
        TrainingError: If there are no examples, no answer tokens, or no adapted module.
    """
    if not examples:
        raise TrainingError("a client needs at least one training example; got none")
    if not any(num_answer_tokens([example]) for example in examples):
        raise TrainingError(f"the loss needs at least one answer token; none of {len(examples)} examples has one")
    if not broadcast.trainable:
        raise TrainingError("a client needs at least one adapted module; its ranks leave all of them out")


def training_metrics(
    losses: Sequence[Float[Tensor, ""]], norms: Sequence[Float[Tensor, ""]], num_tokens: int, num_answers: int
) -> dict[str, float]:
    """Return the metrics of ``train_client``, from the loss and the gradient norm of each step.

    Raises:
        DivergedError: If a loss is not finite.
    """
    # One transfer at the end: reading a number in every step would make a GPU wait.
    values = torch.stack(list(losses)).tolist()
    for step, loss in enumerate(values, start=1):
        if not math.isfinite(loss):
            raise DivergedError(f"the loss must stay finite; it was {loss} at step {step}, lower the learning rate")
    return {
        "loss": math.fsum(values) / len(values),
        "first_loss": values[0],
        "last_loss": values[-1],
        "steps": len(values),
        "tokens": num_tokens,
        "answer_tokens": num_answers,
        "grad_norm": float(torch.stack(list(norms)).mean()),
    }


def _optimizer(parameters: list[nn.Parameter], settings: LocalTraining, learning_rate: float) -> torch.optim.Optimizer:
    # For small factors, the fused kernels take a fifth of the time of the loops, on a CPU too.
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
    return torch.optim.AdamW(
        parameters, learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def step_batches(
    examples: Sequence[EncodedExample], settings: LocalTraining, rng: np.random.Generator
) -> Iterator[list[EncodedExample]]:
    """Yield the examples of each optimiser step: in every epoch each example once, in a new order."""
    size = settings.batch_size * settings.gradient_accumulation_steps
    left = settings.num_steps(len(examples))
    while left:
        order = rng.permutation(len(examples))
        first_of_step = range(0, len(examples), size)[:left]
        yield from ([examples[index] for index in order[first : first + size]] for first in first_of_step)
        left -= len(first_of_step)


def num_answer_tokens(batch: Sequence[EncodedExample]) -> int:
    """Return the number of tokens of these examples that the loss looks at."""
    return sum(num_labels(example.labels) for example in batch)


def _backward(
    model: AdaptedModel, batch: Sequence[EncodedExample], answer_tokens: int, most_per_pass: int, padding: int
) -> Float[Tensor, ""]:
    """Add the gradient of the mean loss over ``answer_tokens`` and return that loss."""
    total = torch.zeros((), device=model.device)
    for part in cut_by_length(batch, most_per_pass, PASS_TOKENS.get(model.pace, 0)):
        if not num_answer_tokens(part):
            continue
        rows, labels = [example.input_ids for example in part], [example.labels for example in part]
        loss = answer_losses(model, rows, labels, padding).sum() / answer_tokens
        loss.backward()
        total += loss.detach()
    return total


def cut_by_length(batch: Sequence[EncodedExample], most: int, pass_tokens: int) -> list[list[EncodedExample]]:
    """Return the batch cut into passes of similar length, at the least cost in padded tokens and passes.

    Args:
        batch: Examples of one optimiser step.
        most: Most examples of a pass.
        pass_tokens: What one more pass costs, in padded tokens.
    """
    ordered = sorted(batch, key=lambda example: len(example.input_ids))
    runs = cheapest_runs([len(example.input_ids) for example in ordered], most, pass_tokens)
    return [ordered[run] for run in reversed(runs)]
