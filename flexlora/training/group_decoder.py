"""Runs a Llama-like decoder forward and backward for a group of clients on a CPU, without autograd.

Small bases spend most of a step outside their matrix products: in the bookkeeping of autograd, in passes over
activations, and in the last layer at positions that no loss needs. Written out, a layer's gradient is a few products
added up in place, the last layer computes queries and what follows at the chosen positions only, and no gradient is
computed below the lowest module that has factors. The decoder is used only if it reproduces the network's output on a
probe.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, proxy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexlora.training.group_block import Block, GroupModule, Heads, Positions, RmsNorm
from flexlora.training.group_layers import BankRows, base_linear

_PROBE = (2, 5)

# Where writing out was found to be faster than autograd.
_DEVICES = frozenset({"cpu"})

# Type of the base -> largest error of a probe, as a share of its norm.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# The same against the network as it is, which rounds everything to its type.
_TOLERANCES_AS_IT_IS = {torch.float32: 1e-4, torch.bfloat16: 0.2}


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


_MLP = ("gate_proj", "up_proj", "down_proj")


class GroupDecoder:
    """The blocks of a network; its embedding and last norm are called as they are."""

    def __init__(self, network: PreTrainedModel, layers: Sequence[Block]) -> None:
        """Use ``layers``, the blocks of ``network``."""
        # A weak reference, because ``_tried`` keeps the decoder as long as the network lives.
        self._network: Any = proxy(network)
        self._layers = layers
        self.dtype = network.dtype
        self.paths = frozenset(module.path for layer in layers for module in layer.modules.values())

    def still_has_weights_of(self, network: PreTrainedModel) -> bool:
        """Return whether ``network`` still has the weights that the decoder uses."""
        return network.dtype in _TOLERANCES and all(
            getattr(base_linear(network, module.path), "weight", None) is module.weight
            for layer in self._layers
            for module in layer.modules.values()
        )

    def forward(
        self, input_ids: Int[Tensor, "rows length"], chosen: Int[Tensor, "rows chosen"], bank_rows: Sequence[BankRows]
    ) -> tuple[Float[Tensor, "rows chosen hidden"], list[Any]]:
        """Return the hidden states before the last norm at chosen columns of each row, and what ``backward`` needs.

        Args:
            input_ids: Padded on the right.
            chosen: Columns of each row, in any order; if as many as the length, all of them in order.
            bank_rows: Which rows use which factors.
        """
        decoder: Any = self._network.base_model
        x = decoder.embed_tokens(input_ids).float()
        everywhere, at_chosen = self._positions(x, chosen)
        kept: list[Any] = []
        for number, layer in enumerate(self._layers, start=1):
            at = at_chosen if number == len(self._layers) else everywhere
            x, own = layer.forward(x, at, bank_rows)
            kept.append((at, own))
        return x, kept

    def last_norm(self, hidden: Float[Tensor, "chosen hidden"]) -> Float[Tensor, "chosen hidden"]:
        """Return the input of the output layer."""
        decoder: Any = self._network.base_model
        return decoder.norm(hidden)

    def _positions(self, x: Tensor, chosen: Tensor) -> tuple[Positions, Positions]:
        rows, length = x.shape[:2]
        heads = self._layers[0].heads
        columns = torch.arange(length, device=x.device)
        decoder: Any = self._network.base_model
        cos, sin = decoder.rotary_emb(x, position_ids=columns[None])
        cos, sin = (angles[0, :, : heads.width // 2].contiguous() for angles in (cos, sin))
        query_cos, query_sin = (angles * heads.width**-0.5 for angles in (cos, sin))
        future = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
        everywhere = Positions(cos, sin, query_cos, query_sin, future.repeat(heads.num_per_group, 1))
        if chosen.shape[1] >= length:
            return everywhere, everywhere
        # Axes: rows, groups, heads of a group, queries, features.
        query_cos, query_sin = (angles[chosen][:, None, None] for angles in (query_cos, query_sin))
        mask = (
            future[chosen][:, None].expand(-1, heads.num_groups, -1, -1).flatten(0, 1).repeat(1, heads.num_per_group, 1)
        )
        flat = chosen + length * torch.arange(rows, device=x.device)[:, None]
        return everywhere, Positions(cos, sin, query_cos, query_sin, mask, flat)

    def backward(self, dx: Tensor, kept: list[Any], bank_rows: Sequence[BankRows]) -> None:
        """Add the gradients of the factors to their banks, from that of the hidden states; ``dx`` is overwritten."""
        paths = {path for part in bank_rows if part.bank.trained != "none" for path in part.bank.shapes}
        lowest = min(
            number for number, layer in enumerate(self._layers) if any(m.path in paths for m in layer.modules.values())
        )
        gradient: Tensor | None = dx
        for number in range(len(self._layers) - 1, lowest - 1, -1):
            assert gradient is not None
            at, own = kept.pop()
            gradient = self._layers[number].backward(gradient, at, bank_rows, own, wanted=number > lowest)


# Building and testing a decoder takes as long as some steps of a small network.
_tried: WeakKeyDictionary[PreTrainedModel, GroupDecoder] = WeakKeyDictionary()


def decoder_of(network: PreTrainedModel) -> GroupDecoder | None:
    """Return the decoder of a bare network, or None; it is built once and again if the weights are replaced."""
    decoder = _tried.get(network)
    if decoder is None or not decoder.still_has_weights_of(network):
        decoder = written_out(network)
        if decoder is not None:
            _tried[network] = decoder
    return decoder


def written_out(network: PreTrainedModel) -> GroupDecoder | None:
    """Return a decoder that reproduces ``network``, or None if there is none."""
    if network.dtype not in _TOLERANCES or network.device.type not in _DEVICES or _slides(network):
        return None
    base: Any = network.base_model
    try:
        layers = [_layer(network, number) for number in range(len(base.layers))]
        decoder = GroupDecoder(network, layers)
        with torch.no_grad():
            tokens = torch.arange(_PROBE[0] * _PROBE[1], device=network.device).view(_PROBE)
            as_it_is = base(input_ids=tokens, use_cache=False).last_hidden_state.float()
            expected = _expected(network, decoder.paths, tokens)
            if not _is_near(expected, as_it_is, _TOLERANCES_AS_IT_IS[network.dtype]):
                return None
            for columns in (_PROBE[1], 2):
                chosen = torch.arange(_PROBE[1], device=network.device)[-columns:].expand(_PROBE[0], -1)
                hidden, _ = decoder.forward(tokens, chosen, ())
                if not _is_near(base.norm(hidden), expected[:, -columns:], _TOLERANCES[network.dtype]):
                    return None
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, KeyError):
        return None
    return decoder


def _expected(network: PreTrainedModel, paths: frozenset[str], tokens: Tensor) -> Tensor:
    """Return the last hidden states of a network whose linear modules alone work in the type of their weights."""
    embedded = network.get_input_embeddings()(tokens).float()
    hooks = []
    for path in paths:
        linear: Any = base_linear(network, path)
        hooks.append(linear.register_forward_pre_hook(lambda module, inputs: inputs[0].to(module.weight.dtype)))
        hooks.append(linear.register_forward_hook(lambda module, inputs, output: output.float()))
    try:
        base: Any = network.base_model
        return base(inputs_embeds=embedded, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()


def _is_near(hidden: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float(torch.linalg.vector_norm(hidden - expected)) <= tolerance * float(torch.linalg.vector_norm(expected))


def _slides(network: PreTrainedModel) -> bool:
    """Return whether some layer attends to a window only; a short probe would not show it."""
    config = network.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [None]
    return getattr(config, "sliding_window", None) is not None and any(kind != "full_attention" for kind in kinds)


def _layer(network: PreTrainedModel, number: int) -> Block:
    prefix = f"{network.base_model_prefix}.layers.{number}"
    block: Any = network.get_submodule(prefix)
    modules = {}
    for parent, names in (("self_attn", _ATTENTION), ("mlp", _MLP)):
        for name in names:
            base = base_linear(network, path := f"{prefix}.{parent}.{name}")
            if type(base) is not nn.Linear:
                raise NotImplementedError
            modules[name] = GroupModule(path, base.weight, base.bias)
    norms = (block.input_layernorm, block.post_attention_layernorm)
    width = block.self_attn.head_dim
    num_groups = modules["k_proj"].weight.shape[0] // width
    heads = Heads(num_groups, modules["q_proj"].weight.shape[0] // width // num_groups, width)
    first, second = (RmsNorm(norm.weight, norm.variance_epsilon) for norm in norms)
    return Block(modules, (first, second), heads)
