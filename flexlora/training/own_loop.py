"""Lets a training loop of the user's own train clients: adapter in, adapter out.

The function gets the network with LoRA around its modules and trains it in place, or returns another adapter of the
same ranks. Whatever it does to the network besides is undone, and what it returns is checked.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexlora.data.prompts import EncodedExample
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import AdapterState, LoraFactors
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.one_client import DivergedError, LocalTraining, TrainingError, check_trainable
from flexlora.training.randomness import all_seeded
from flexlora.training.snapshot import NetworkSnapshot

TrainingRow = dict[str, list[int]]
"""One sequence: ``input_ids``, ``labels`` (not shifted; -100 where no loss looks) and ``attention_mask``."""


@dataclass(frozen=True)
class TrainingSettings:
    """What the configuration says about local training; a function may follow as much of it as it likes.

    Attributes:
        learning_rate: Of this round; the schedule has been applied.
        optimizer: ``adamw`` or ``sgd``.
        batch_size: Most examples in one forward pass.
        gradient_accumulation_steps: Optimiser steps look at this many times ``batch_size`` examples.
        num_epochs: Passes over the examples; a fraction stops inside one.
        max_steps: Upper limit of optimiser steps.
        max_grad_norm: Norm at which gradients are scaled down; None never does.
        weight_decay: Decoupled for AdamW, added to the gradient for SGD.
        momentum: Of SGD.
        betas: Of AdamW.
        proximal: FedProx's mu, the weight of ``mu / 2 * ||s B A - s B0 A0||_F^2`` for each module, ``A0`` and ``B0``
            being what the client received; 0 for none. The function has to add the term itself.
    """

    learning_rate: float
    optimizer: Literal["adamw", "sgd"]
    batch_size: int
    gradient_accumulation_steps: int
    num_epochs: float
    max_steps: int | None
    max_grad_norm: float | None
    weight_decay: float
    momentum: float
    betas: tuple[float, float]
    proximal: float = 0.0

    def num_steps(self, num_examples: int) -> int:
        """Return the number of optimiser steps that the built-in loop makes on this many examples."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(LocalTraining)}
        return LocalTraining(**fields).num_steps(num_examples)


@runtime_checkable
class TrainFunction(Protocol):
    """A training loop of the user's own."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: list[TrainingRow],
        adapter: AdapterState,
        settings: TrainingSettings,
        seed: int,
    ) -> tuple[AdapterState | None, Mapping[str, float]]:
        """Train one client and return its adapter and what was measured.

        Args:
            model: The base model in training mode, with PEFT's LoRA layers around the adapted modules. They hold the
                factors of ``adapter``; those to train, and no others, require a gradient. It is shared by all clients:
                train it in place, but do not keep it, and leave all other weights as they are.
            tokenizer: Its tokenizer.
            examples: The client's examples as token ids, in a fixed order. The list can be given to a data loader as it
                is; ``tokenizer.decode`` returns the text.
            adapter: The factors the client received, as float32 tensors on the CPU.
            settings: What the configuration says about local training.
            seed: Of this client in this round. Python, NumPy and torch have been seeded with it.

        Returns:
            The trained adapter, with the modules, ranks and scalings of ``adapter``, or None if ``model`` was trained
            in place; and numbers by name. ``loss`` (mean over the steps) and ``steps`` are recorded.
        """
        ...


@dataclass(frozen=True)
class OwnLoop:
    """Trains clients with a function of the user's own; takes the arguments of ``train_client``.

    Attributes:
        function: The training loop.
    """

    function: TrainFunction

    def __call__(
        self,
        model: AdaptedModel,
        broadcast: Broadcast,
        examples: Sequence[EncodedExample],
        settings: LocalTraining,
        learning_rate: float,
        seed: int,
    ) -> tuple[AdapterState, dict[str, float]]:
        """Return the trained factors and what the function measured.

        Raises:
            TrainingError: If there is nothing to train on, or the function broke a rule.
            DivergedError: If the loss or a factor is not finite.
        """
        check_trainable(broadcast, examples)
        _require_plain(broadcast)
        model.load(broadcast)
        received, own = broadcast.trainable, _settings(settings, learning_rate)
        snapshot = NetworkSnapshot(model.network, model.trained_parameters())
        try:
            with all_seeded(seed, model.device), torch.enable_grad():
                network = model.network.train()
                returned = self.function(network, model.tokenizer, rows_of(examples), received, own, seed)
            adapter, metrics = _pair(returned)
            trained = model.read() if adapter is None else adapter
        finally:
            snapshot.restore()
            overwritten = snapshot.overwritten()
            if overwritten:
                model.refuse(_refusal(overwritten))
        if overwritten:
            raise TrainingError(_refusal(overwritten))
        return _checked_adapter(trained, broadcast), _checked_metrics(metrics)


def as_train_client(function: TrainFunction) -> OwnLoop:
    """Return what trains one client with ``function``, for an engine.

    Raises:
        TrainingError: If it is no function, or takes other arguments.
    """
    rule = "trainer must be a function (model, tokenizer, examples, adapter, settings, seed)"
    if not callable(function):
        raise TrainingError(f"{rule}; got {type(function).__name__}")
    try:
        inspect.signature(function).bind(*range(6))
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise TrainingError(f"{rule}; {name} cannot be called so: {error}") from None
    except ValueError:
        pass  # Some functions in C have no signature.
    return OwnLoop(function)


def rows_of(examples: Sequence[EncodedExample]) -> list[TrainingRow]:
    """Return examples as the rows that data loaders and trainers take."""
    return [
        {
            "input_ids": list(example.input_ids),
            "labels": list(example.labels),
            "attention_mask": [1] * len(example.input_ids),
        }
        for example in examples
    ]


def _require_plain(broadcast: Broadcast) -> None:
    """Raise if the method asks for something that a function that knows only factors cannot do.

    Raises:
        TrainingError: Naming it.
    """
    asked = {
        "trains cores between the factors": broadcast.train_factors == "core",
        "trains chosen entries of B": broadcast.mask is not None,
        "adds a penalty to the loss": broadcast.tail_penalty is not None,
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise TrainingError(
                f"a training function of your own moves factors, but the method {what}; leave trainer out or choose "
                "another method"
            )


def _settings(settings: LocalTraining, learning_rate: float) -> TrainingSettings:
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return TrainingSettings(learning_rate=learning_rate, **fields)


def _refusal(overwritten: Sequence[str]) -> str:
    more = f" and {len(overwritten) - 1} more" if len(overwritten) > 1 else ""
    return (
        "a training function must leave the weights of the base model as they are, because all clients share them; it "
        f"changed {overwritten[0]}{more}. The model can no longer be used, start the run again"
    )


def _pair(returned: Any) -> tuple[Any, Any]:
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TrainingError(
            f"a training function must return a pair (adapter or None, metrics); got {type(returned).__name__}"
        )
    return returned


def _checked_adapter(adapter: Any, broadcast: Broadcast) -> AdapterState:
    """Return what came back as float32 copies on the CPU, sorted by module."""
    received = broadcast.trainable
    if not isinstance(adapter, Mapping):
        raise TrainingError(f"the adapter must map modules to LoraFactors, or be None; got {type(adapter).__name__}")
    if missing := sorted(received.keys() - adapter.keys()):
        raise TrainingError(f"the adapter must have the modules that were received; {missing[0]} is missing")
    if extra := sorted(map(str, adapter.keys() - received.keys())):
        raise TrainingError(f"the adapter must have the modules that were received; {extra[0]} was not")
    return {path: _checked_factors(path, adapter[path], broadcast) for path in sorted(received)}


def _checked_factors(path: str, factors: Any, broadcast: Broadcast) -> LoraFactors:
    sent = broadcast.trainable[path]
    if not isinstance(factors, LoraFactors):
        raise TrainingError(f"{path}: an adapter must hold LoraFactors; got {type(factors).__name__}")
    if (factors.A.shape, factors.B.shape) != (sent.A.shape, sent.B.shape):
        raise TrainingError(
            f"{path}: factors must keep the shapes A {tuple(sent.A.shape)} and B {tuple(sent.B.shape)}; got "
            f"A {tuple(factors.A.shape)} and B {tuple(factors.B.shape)}"
        )
    if factors.scaling != sent.scaling:
        raise TrainingError(f"{path}: factors must keep the scaling {sent.scaling:g}; got {factors.scaling:g}")
    own = LoraFactors(factors.A.cpu(), factors.B.cpu(), factors.scaling).to(torch.float32)
    if not (own.A.isfinite().all() and own.B.isfinite().all()):
        raise DivergedError(f"{path}: trained factors must stay finite; lower the learning rate")
    if broadcast.train_factors != "both":
        name = "A" if broadcast.train_factors == "B" else "B"
        if not torch.equal(getattr(own, name), getattr(sent, name).cpu().to(torch.float32)):
            raise TrainingError(
                f"{path}: the method trains {broadcast.train_factors} only, so {name} must come back as it was received"
            )
    return own


def _checked_metrics(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise TrainingError(f"metrics must map names to numbers; got {type(metrics).__name__}")
    found: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise TrainingError(f"metrics must map names to numbers; {name} is {type(value).__name__}") from None
    loss = found.get("loss", 0.0)
    if not math.isfinite(loss):
        raise DivergedError(f"the loss must stay finite; it was {loss}, lower the learning rate")
    return found
