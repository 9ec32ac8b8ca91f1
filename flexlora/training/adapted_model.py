"""Puts LoRA factors around the linear modules of a base model; the only file that names PEFT's keys.

One base serves every client of a process. To load a client means to copy its factors into the PEFT layers, and costs no
more than that; the base weights are never touched.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from flexlora.federation.known_rows import known_rows
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.training.base_model import frozen
from flexlora.training.length_runs import pace_of
from flexlora.training.linear_modules import ModelError, features
from flexlora.training.probes import (
    cache_name,
    can_cache,
    can_pad_left,
    grows_plainly,
    has_dropout,
    separate_head,
    takes_positions,
)
from flexlora.training.quantized_base import num_weights
from flexlora.training.randomness import torch_seeded

_TRAINABLE, _FROZEN = "trainable", "frozen"
# No module has this name.
_NO_NAME = "no-module-by-name"


@dataclass(frozen=True, eq=False)
class LoadedCore:
    """A core between the factors of a module.

    Attributes:
        core: [rank, rank], on the device of the model.
        B: As it was sent, there too; the layer holds ``B @ core`` in its place.
    """

    core: nn.Parameter
    B: Tensor


class AdaptedModel:
    """A base model whose linear modules carry, at any time, the factors of one broadcast and no others.

    Attributes:
        network: The transformers model, with PEFT layers around the modules adapted so far.
        tokenizer: Its tokenizer.
        dropout: Probability that an input of the trained factors is dropped while training.
        base_drops_out: Whether the base has dropout of its own.
        takes_positions: Whether the base can be told the position of each token.
        cache_name: What the base calls its cache; state-space models have another word.
        checkpoints_gradients: Whether activations are computed a second time instead of being kept.
        cores: Module path -> the core that is loaded there; empty where the broadcast has none.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Freeze ``network`` and use it from now on.

        Args:
            network: The base model.
            tokenizer: Its tokenizer.
            dropout: See the attribute.
            gradient_checkpointing: Compute each block's activations a second time in the backward pass instead of
                keeping them.

        Raises:
            ModelError: If gradients of this architecture cannot be checkpointed.
        """
        self.network = frozen(network)
        self.tokenizer = tokenizer
        self._num_parameters = sum(map(num_weights, network.parameters()))
        self.checkpoints_gradients = gradient_checkpointing
        self.dropout = dropout
        self.base_drops_out = has_dropout(network)
        self._layers: dict[str, LoraLayer] = {}
        self._broadcast = Broadcast(trainable={})
        self.cores: dict[str, LoadedCore] = {}
        self._drops_out = dropout > 0 or self.base_drops_out
        self._head = separate_head(network)
        self._refusal: str | None = None
        self.takes_positions = takes_positions(network)
        self.cache_name = cache_name(network)
        if gradient_checkpointing:
            _checkpoint_gradients(network)

    @cached_property
    def can_cache(self) -> bool:
        """Whether generation can go on from a cache; else each step computes all tokens anew."""
        return can_cache(self.network)

    @cached_property
    def can_pad_left(self) -> bool:
        """Whether prompts of one batch may have different lengths.

        The state of a state-space model would see what is in front of the shorter ones.
        """
        return self.cache_name == "past_key_values" and can_pad_left(self.network, with_cache=self.can_cache)

    @cached_property
    def can_join_caches(self) -> bool:
        """Whether prompts that were read in several passes can be decoded as one batch.

        Positions are counted from each prompt's own first token, or the padding between passes would matter.
        """
        return self.can_cache and self.can_pad_left and self.takes_positions and grows_plainly(self.network)

    @property
    def device(self) -> torch.device:
        """The device of the base model."""
        return self.network.device

    @property
    def separate_head(self) -> nn.Module | None:
        """The output layer with its adapter, if applying it to some of the last hidden states gives their logits.

        None also while a group of clients trains with a layer in its place, which needs whole rows.
        """
        head = self.network.get_output_embeddings()
        own = head.get_base_layer() if isinstance(head, LoraLayer) else head
        return cast("nn.Module", head) if own is self._head else None

    @property
    def pace(self) -> str:
        """What passes cost here: a key of tables such as ``PASS_TOKENS``."""
        return pace_of(self.device.type, self._num_parameters)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the base without adapters; shared ones count once."""
        return self._num_parameters

    def initial_adapter(self, ranks: Mapping[str, int], scaling: Scaling, seed: int) -> AdapterState:
        """Return PEFT's initial factors on the CPU: ``A`` Kaiming-uniform with slope sqrt(5), ``B`` zero.

        Each module draws from its own stream of ``seed``, so that leaving one out changes no other.

        Args:
            ranks: Rank of each module to adapt.
            scaling: The rule that gives the scaling of a rank.
            seed: The only source of randomness.
        """
        return initial_adapter({path: self._shape(path) for path in ranks}, ranks, scaling, seed)

    def load(self, broadcast: Broadcast) -> None:
        """Make the factors of ``broadcast`` active, as float32 copies, and no others.

        Raises:
            ModelError: If a module does not exist in the base or factors do not fit it, or after ``refuse``.
        """
        if self._refusal is not None:
            raise ModelError(self._refusal)
        branches = {_TRAINABLE: broadcast.trainable, _FROZEN: broadcast.frozen or {}}
        self.check(broadcast.trainable)
        self.check(branches[_FROZEN])
        self._wrap(sorted((branches[_TRAINABLE].keys() | branches[_FROZEN].keys()) - self._layers.keys()))
        self._broadcast, self.cores = broadcast, {}
        for path, layer in self._layers.items():
            active = [branch for branch, adapter in branches.items() if path in adapter]
            if layer.active_adapters != active:
                layer.set_adapter(active, inference_mode=True)
            for branch in active:
                _set_factors(layer, branch, branches[branch][path])
        for path, core in sorted((broadcast.cores or {}).items()):
            self._set_core(path, core)
        for parameter in self.trained_parameters():
            parameter.requires_grad_(True)

    def _set_core(self, path: str, core: Tensor) -> None:
        """Put a core between the factors that are loaded, ``B`` as a new parameter."""
        layer = _linear(self._layers[path], "B", _TRAINABLE)
        B = layer.weight.detach()
        own = nn.Parameter(core.detach().to(B.device, torch.float32, copy=True), requires_grad=False)
        layer.weight = nn.Parameter(B @ own, requires_grad=False)
        self.cores[path] = LoadedCore(own, B)

    def refuse(self, reason: str) -> None:
        """Load nothing from now on, because the base is no longer what it was; ``reason`` becomes the error."""
        self._refusal = reason

    def read(self) -> AdapterState:
        """Return the trainable factors as they are now: detached float32 copies on the CPU."""
        adapter: dict[str, LoraFactors] = {}
        for path, loaded in sorted(self._broadcast.trainable.items()):
            A, B = self.loaded_factors(path)
            B = self.cores[path].B if path in self.cores else B
            adapter[path] = LoraFactors(_to_cpu(A), _to_cpu(B), loaded.scaling)
        return adapter

    def read_cores(self) -> dict[str, Tensor] | None:
        """Return the cores as they are now, detached float32 copies on the CPU; None if the broadcast has none."""
        if self._broadcast.train_factors != "core":
            return None
        return {path: _to_cpu(loaded.core) for path, loaded in self.cores.items()}

    def loaded_factors(self, path: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return ``A`` and ``B`` of the trainable branch as a layer uses them, the core multiplied into ``B``."""
        A, B = (cast("nn.Parameter", _linear(self._layers[path], name, _TRAINABLE).weight) for name in ("A", "B"))
        return A, B

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that get gradients, always in the same order; a core gets its own through ``B``."""
        factors = {"both": ("A", "B"), "A": ("A",), "B": ("B",), "core": ("B",)}[self._broadcast.train_factors]
        return [
            cast("nn.Parameter", _linear(self._layers[path], name, _TRAINABLE).weight)
            for path in sorted(self._broadcast.trainable)
            for name in factors
        ]

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Make the model the bare base for the length of a ``with`` block."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)
                # Enabling marks every active factor as trained, the frozen branch included.
                layer.set_adapter(layer.active_adapters, inference_mode=True)
            for parameter in self.trained_parameters():
                parameter.requires_grad_(True)

    @contextmanager
    def dropping_out(self) -> Iterator[None]:
        """Turn on the dropout of the adapters and of the base for the length of a ``with`` block.

        Checkpointing is on in the same block: transformers checkpoints in training mode alone.
        """
        if not self._drops_out and not self.checkpoints_gradients:
            # Switching a small model to training mode and back takes as long as loading a client.
            yield
            return
        self.network.train()
        try:
            yield
        finally:
            self.network.eval()

    def check(self, adapter: AdapterState) -> None:
        """Raise unless every module exists and its factors fit it.

        Raises:
            ModelError: Naming the module.
        """
        for path, factors in adapter.items():
            shape = self._shape(path)
            if (factors.B.shape[0], factors.A.shape[1]) != shape or factors.A.shape[0] != factors.B.shape[1]:
                raise ModelError(
                    f"{path}: factors must multiply to {shape}; got B {tuple(factors.B.shape)} and A "
                    f"{tuple(factors.A.shape)}"
                )

    def _shape(self, path: str) -> tuple[int, int]:
        if path in self._layers:
            layer = self._layers[path]
            return cast("tuple[int, int]", (layer.out_features, layer.in_features))
        try:
            module = self.network.get_submodule(path)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear | Conv1D):
            kind = "no module" if module is None else type(module).__name__
            raise ModelError(f"{path}: LoRA needs a linear module of the base model; this is {kind}")
        return features(module)

    def _wrap(self, paths: Sequence[str]) -> None:
        """Put PEFT layers around modules that are not wrapped yet."""
        # In one call of PEFT, all weights must be stored the same way round.
        by_layout: dict[bool, list[str]] = {}
        for path in paths:
            by_layout.setdefault(isinstance(self.network.get_submodule(path), Conv1D), []).append(path)
        for is_transposed, names in by_layout.items():
            for branch, dropout in ((_TRAINABLE, self.dropout), (_FROZEN, 0.0)):
                config = LoraConfig(
                    r=1, lora_alpha=1, target_modules=[_NO_NAME], lora_dropout=dropout, fan_in_fan_out=is_transposed
                )
                # Names of tensors say exactly which modules are meant. PEFT also adapts what ends in a target's name,
                # and takes some names for those of experts.
                tensors = {f"{name}.lora_A.weight": torch.empty(0) for name in names}
                # PEFT draws initial factors from the global generator; ``load`` replaces them.
                with torch_seeded(0, self.device), warnings.catch_warnings():
                    # A second adapter is intended: the frozen branch beside the trained one.
                    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                    # So is an adapted output layer beside its unchanged embedding.
                    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
                    warnings.filterwarnings("ignore", message="While injecting the PEFT adapters, an inconsistency")
                    try:
                        inject_adapter_in_model(config, self.network, branch, state_dict=tensors)
                    except ValueError as error:
                        raise ModelError(
                            f"PEFT cannot adapt {names[0]} and {len(names) - 1} others: {error}"
                        ) from error
        self._check_wrapped(paths)
        for path in paths:
            self._layers[path] = cast("LoraLayer", self.network.get_submodule(path))
            self._layers[path].set_adapter([], inference_mode=True)
        if paths:
            self.network.eval()

    def _check_wrapped(self, paths: Sequence[str]) -> None:
        """Raise unless PEFT has put its layers around these modules and around no others.

        Raises:
            ModelError: Naming the modules.
        """
        wrapped = {path for path, module in self.network.named_modules() if isinstance(module, LoraLayer)}
        missing, extra = sorted(set(paths) - wrapped), sorted(wrapped - set(paths) - self._layers.keys())
        if missing or extra:
            raise ModelError(
                f"PEFT must adapt exactly the modules that it is told; it left out {', '.join(missing[:5]) or 'none'} "
                f"and adapted {', '.join(extra[:5]) or 'none'} besides: leave these out of lora.target_modules, or use "
                "another version of peft"
            )


def _checkpoint_gradients(network: PreTrainedModel) -> None:
    """Let a network compute activations again instead of keeping them, from its next time in training mode on.

    Raises:
        ModelError: If its architecture cannot do that.
    """
    if not network.supports_gradient_checkpointing:
        raise ModelError(
            f"gradients of {type(network).__name__} cannot be checkpointed; set model.gradient_checkpointing=false"
        )
    # The older way would need an input with a gradient, which a frozen base has not.
    enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def initial_adapter(
    shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], scaling: Scaling, seed: int
) -> AdapterState:
    """Return PEFT's initial factors as ``AdaptedModel.initial_adapter`` does, from shapes alone.

    Args:
        shapes: Module path -> (out_features, in_features).
        ranks: Rank of each module to adapt.
        scaling: The rule that gives the scaling of a rank.
        seed: The only source of randomness.
    """
    adapter: dict[str, LoraFactors] = {}
    for path, rank in sorted(ranks.items()):
        out_features, in_features = shapes[path]
        A = known_rows(seed, path, rank, in_features)
        adapter[path] = LoraFactors(A, torch.zeros(out_features, rank), scaling(rank))
    return adapter


def _linear(layer: LoraLayer, name: str, branch: str) -> nn.Linear:
    return cast("nn.Linear", getattr(layer, f"lora_{name}")[branch])


def _set_factors(layer: LoraLayer, branch: str, factors: LoraFactors) -> None:
    """Copy factors of any rank into a PEFT layer."""
    device = layer.weight.device
    for name, factor in (("A", factors.A), ("B", factors.B)):
        linear = _linear(layer, name, branch)
        linear.weight = nn.Parameter(factor.detach().to(device, torch.float32, copy=True), requires_grad=False)
        linear.out_features, linear.in_features = factor.shape
    layer.r[branch] = factors.rank
    layer.lora_alpha[branch] = factors.scaling * factors.rank
    layer.scaling[branch] = factors.scaling


def _to_cpu(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", copy=True)
