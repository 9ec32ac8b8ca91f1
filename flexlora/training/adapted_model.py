"""The base model with LoRA around its linear modules: the only file that names PEFT's keys.

One base serves every client of a process. A client's turn places its factors into the PEFT layers and costs no more
than copying them; the base weights are never touched.
"""

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float, Int
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from flexlora.data.prompts import IGNORED
from flexlora.federation.messages import Broadcast
from flexlora.federation.streams import stream_seed
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.training.base_model import ModelError, features, frozen
from flexlora.training.randomness import torch_seeded

_TRAINABLE, _FROZEN = "trainable", "frozen"


_PROBE_LENGTH = 4


class AdaptedModel:
    """A base model whose linear modules carry, at any time, exactly the factors of one broadcast.

    Attributes:
        network: The transformers model, with PEFT layers around the modules adapted so far.
        tokenizer: Its tokenizer.
        dropout: Probability that an input of the trained factors is dropped while training.
        base_drops_out: Whether the base draws random numbers of its own while training.
    """

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, dropout: float = 0.0) -> None:
        """Take over ``network`` and freeze it."""
        self.network = frozen(network)
        self.tokenizer = tokenizer
        self._num_parameters = sum(parameter.numel() for parameter in network.parameters())
        self.dropout = dropout
        self.base_drops_out = _has_dropout(network)
        self._layers: dict[str, LoraLayer] = {}
        self._broadcast = Broadcast(trainable={})
        self._drops_out = dropout > 0 or self.base_drops_out
        self._head = _separate_head(network)
        self._refusal: str | None = None
        self._takes_positions = "position_ids" in inspect.signature(network.forward).parameters

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return self.network.device

    @property
    def separate_head(self) -> nn.Module | None:
        """The output layer with its adapter, if logits are that of the last hidden states, of any of them, and no more.

        None too while a group of clients has something stand in for it, which has to see whole rows.
        """
        head = self.network.get_output_embeddings()
        own = head.get_base_layer() if isinstance(head, LoraLayer) else head
        return cast("nn.Module", head) if own is self._head else None

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the base, shared ones counted once, adapters left out."""
        return self._num_parameters

    def initial_adapter(self, ranks: Mapping[str, int], scaling: Scaling, seed: int) -> AdapterState:
        """Return PEFT's initial factors on the CPU: ``A`` Kaiming-uniform with slope sqrt(5), ``B`` zero.

        Each module draws from its own stream of ``seed``, so that leaving one out changes no other.

        Args:
            ranks: Rank of each module to adapt.
            scaling: The rule that gives the scaling of a rank.
            seed: The only source of randomness.
        """
        adapter: dict[str, LoraFactors] = {}
        for path, rank in sorted(ranks.items()):
            out_features, in_features = self._shape(path)
            generator = torch.Generator().manual_seed(stream_seed(seed, "initial_adapter", path))
            A = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5), generator=generator)
            adapter[path] = LoraFactors(A, torch.zeros(out_features, rank), scaling(rank))
        return adapter

    def load(self, broadcast: Broadcast) -> None:
        """Make exactly the factors of ``broadcast`` active, as float32 copies; other modules become the bare base.

        Raises:
            ModelError: If a module does not exist in the base or factors do not fit it, or after ``refuse``.
        """
        if self._refusal is not None:
            raise ModelError(self._refusal)
        branches = {_TRAINABLE: broadcast.trainable, _FROZEN: broadcast.frozen or {}}
        self.check(broadcast.trainable)
        self.check(branches[_FROZEN])
        self._wrap(sorted((branches[_TRAINABLE].keys() | branches[_FROZEN].keys()) - self._layers.keys()))
        self._broadcast = broadcast
        for path, layer in self._layers.items():
            active = [branch for branch, adapter in branches.items() if path in adapter]
            if layer.active_adapters != active:
                layer.set_adapter(active, inference_mode=True)
            for branch in active:
                _place(layer, branch, branches[branch][path])
        for parameter in self.trained_parameters():
            parameter.requires_grad_(True)

    def refuse(self, reason: str) -> None:
        """Load nothing from now on, because the base is no longer what it was; ``reason`` becomes the error."""
        self._refusal = reason

    def read(self) -> AdapterState:
        """Return the trainable factors as they are now: detached float32 copies on the CPU."""
        adapter: dict[str, LoraFactors] = {}
        for path, loaded in sorted(self._broadcast.trainable.items()):
            A, B = (_linear(self._layers[path], name, _TRAINABLE).weight for name in ("A", "B"))
            adapter[path] = LoraFactors(_to_cpu(A), _to_cpu(B), loaded.scaling)
        return adapter

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters an optimiser has to move, always in the same order."""
        factors = {"both": ("A", "B"), "A": ("A",), "B": ("B",)}[self._broadcast.train_factors]
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
        """Turn on the dropout of the adapters and of the base for the length of a ``with`` block."""
        if not self._drops_out:
            # Switching a small model to training mode and back costs as much as loading a client's factors.
            yield
            return
        self.network.train()
        try:
            yield
        finally:
            self.network.eval()

    def answer_losses(
        self, rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], padding: int
    ) -> Float[Tensor, " rows"]:
        """Return the cross-entropy in nats of each row, summed over the tokens that have a label.

        Where logits are the output layer applied to the last hidden states (found out once, by trying), it is applied
        only where a label looks; models that do more than that, such as capping logits, compute all of them.

        Args:
            rows: Tokens; shorter rows are padded on the right, where a causal model needs no attention mask.
            labels: For each row as many, the token itself or -100; shifted here.
            padding: Any token.
        """
        length = max(map(len, rows))
        padded = [[*row, *[padding] * (length - len(row))] for row in rows]
        looked_at = [
            (index, index * length + column - 1, label)
            for index, row_labels in enumerate(labels)
            for column, label in enumerate(row_labels)
            if column and label != IGNORED
        ]
        owners, positions, targets = torch.tensor(looked_at, device=self.device).reshape(-1, 3).unbind(1)
        logits = self._logits_at(torch.tensor(padded, device=self.device), positions)
        losses = functional.cross_entropy(logits, targets, reduction="none")
        return losses.new_zeros(len(rows)).index_add(0, owners, losses)

    def _logits_at(
        self, input_ids: Int[Tensor, "rows length"], positions: Int[Tensor, " chosen"]
    ) -> Float[Tensor, "chosen vocab"]:
        """Return float32 logits at positions counted through all rows."""
        head = self.separate_head
        if head is None:
            logits = self.network(input_ids=input_ids, use_cache=False).logits
            return logits.flatten(0, 1).index_select(0, positions).float()
        hidden = self.network.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return head(hidden.flatten(0, 1).index_select(0, positions)).float()

    def next_logits(
        self, input_ids: Int[Tensor, "batch new"], attention_mask: Int[Tensor, "batch seen"], cache: Cache | None
    ) -> tuple[Float[Tensor, "batch vocab"], Cache]:
        """Return the logits after the last column, in float32, and the cache that now holds all columns.

        Args:
            input_ids: The columns that ``cache`` does not hold yet; prompts are padded on the left.
            attention_mask: 0 at padding, 1 elsewhere, over all columns so far.
            cache: What the previous call returned; None at first.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": cache, "use_cache": True}
        if self._takes_positions:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -input_ids.shape[1] :]
        head = self.separate_head
        if head is None:
            output = self.network(**inputs)
            return output.logits[:, -1].float(), output.past_key_values
        output = self.network.base_model(**inputs)
        return head(output.last_hidden_state[:, -1]).float(), output.past_key_values

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
        """Put PEFT layers around modules that no broadcast has named before."""
        # PEFT wants to know which way round the weights of a whole call are stored.
        by_layout: dict[bool, list[str]] = {}
        for path in paths:
            by_layout.setdefault(isinstance(self.network.get_submodule(path), Conv1D), []).append(path)
        for is_transposed, names in by_layout.items():
            for branch, dropout in ((_TRAINABLE, self.dropout), (_FROZEN, 0.0)):
                config = LoraConfig(
                    r=1, lora_alpha=1, target_modules=names, lora_dropout=dropout, fan_in_fan_out=is_transposed
                )
                # PEFT draws initial factors from the global generator; ``load`` replaces them.
                with torch_seeded(0, self.device), warnings.catch_warnings():
                    # A second adapter is what we want: the frozen branch lives beside the trained one.
                    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                    # So is an output layer whose embedding stays as it is; merging into the base refuses it by name.
                    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
                    inject_adapter_in_model(config, self.network, branch)
        for path in paths:
            self._layers[path] = cast("LoraLayer", self.network.get_submodule(path))
            self._layers[path].set_adapter([], inference_mode=True)
        if paths:
            self.network.eval()


def _separate_head(network: PreTrainedModel) -> nn.Module | None:
    """Return the output layer if logits are that of the last hidden states and no more, tried on a few tokens."""
    decoder, head = network.base_model, network.get_output_embeddings()
    if decoder is network or head is None:
        return None
    with torch.no_grad():
        tokens = torch.arange(_PROBE_LENGTH, device=network.device)[None]
        hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        expected = network(input_ids=tokens, use_cache=False).logits
        logits = head(hidden)
    return head if logits.shape == expected.shape and torch.allclose(logits, expected) else None


# Settings of heads that a causal model has not got.
_OTHER_HEADS = ("classifier_", "summary_")


def _has_dropout(network: PreTrainedModel) -> bool:
    settings = network.config.get_text_config().to_dict()
    rates = [
        rate
        for name, rate in settings.items()
        if name.endswith(("dropout", "pdrop")) and not name.startswith(_OTHER_HEADS)
    ]
    rates += [module.p for module in network.modules() if isinstance(module, nn.Dropout)]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def _linear(layer: LoraLayer, name: str, branch: str) -> nn.Linear:
    return cast("nn.Linear", getattr(layer, f"lora_{name}")[branch])


def _place(layer: LoraLayer, branch: str, factors: LoraFactors) -> None:
    """Put copies of factors of any rank into a PEFT layer."""
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
