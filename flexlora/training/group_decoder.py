"""A Llama-like decoder written out, forward and backward, for a group of clients on a CPU.

Small bases spend most of a step outside their matrix products: in the bookkeeping of autograd, in passes over
activations, and in the last layer at positions where no loss looks. Written out, a layer's gradient is a few products
added up in place, the last layer works behind its keys and values at the chosen positions only, and nothing is
differentiated below the lowest module that has factors. A network is taken only if it comes to the same on some tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, proxy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexlora.training.group_layers import Share, base_linear

_PROBE = (2, 5)


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


_MLP = ("gate_proj", "up_proj", "down_proj")


# What a share's A made of an input, and its A, B and scalings.
_Low = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Module:
    """A linear module: where it is, and its frozen weights."""

    path: str
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor, shares: Sequence[Share], onto: Tensor | None = None) -> tuple[Tensor, list[_Low]]:
        """Return the output, added to ``onto`` if given, and what ``backward`` needs of each share."""
        if onto is None or self.bias is not None:
            y = nn.functional.linear(x, self.weight, self.bias)
            y = y if onto is None else y.add_(onto)
        else:
            y = torch.addmm(onto.flatten(0, 1), x.flatten(0, 1), self.weight.T).view_as(onto)
        lows = []
        for share in self._own(shares):
            A, B, scaling = share.factors(self.path, x.dtype)
            low = torch.bmm(share.segments(x), A.mT).mul_(scaling)
            share.segments(y).baddbmm_(low, B.mT)
            lows.append((low, A, B, scaling))
        return y, lows

    def backward(
        self,
        x: Tensor,
        lows: Sequence[_Low],
        dy: Tensor,
        shares: Sequence[Share],
        dx: Tensor | None = None,
        *,
        wanted: bool = True,
    ) -> Tensor | None:
        """Add the gradients of the factors to their banks and, if wanted, return that of ``x``, added to ``dx``."""
        if wanted:
            flat = dy.flatten(0, 1)
            dx = (flat @ self.weight if dx is None else dx.flatten(0, 1).addmm_(flat, self.weight)).view_as(x)
        for share, (low, A, B, scaling) in zip(self._own(shares), lows, strict=True):
            into_A, into_B = share.bank.factor_gradients[self.path]
            own = share.segments(dy)
            if into_B is not None:
                share.add_gradient(into_B, torch.bmm(own.mT, low))
            if into_A is None and not wanted:
                continue
            dlow = torch.bmm(own, B).mul_(scaling)
            if into_A is not None:
                share.add_gradient(into_A, torch.bmm(dlow.mT, share.segments(x)))
            if dx is not None:
                share.segments(dx).baddbmm_(dlow, A)
        return dx

    def _own(self, shares: Sequence[Share]) -> list[Share]:
        return [share for share in shares if self.path in share.bank.shapes]


@dataclass(frozen=True)
class _Norm:
    """The root-mean-square norm ``weight * x / sqrt(mean(x^2) + eps)``."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, the input divided by its size, and one over that size."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = size.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        unit = x * inverse
        return unit * self.weight, unit, inverse

    def backward(self, dy: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
        """Return the gradient of the input; ``dy`` is used up."""
        dunit = dy.mul_(self.weight)
        along = (dunit * unit).mean(-1, keepdim=True)
        return dunit.addcmul_(unit, along, value=-1.0).mul_(inverse)


@dataclass(frozen=True)
class _Heads:
    """How many heads there are, and how a row of features is divided among them."""

    num_groups: int
    num_per_group: int
    width: int

    def queries(self, x: Tensor) -> Tensor:
        """View [rows, length, features] as [rows, groups, heads of a group, length, width]."""
        return x.unflatten(2, (self.num_groups, self.num_per_group, self.width)).permute(0, 2, 3, 1, 4)

    def keys(self, x: Tensor) -> Tensor:
        """View [rows, length, features] as [rows, groups, 1, length, width]."""
        return x.unflatten(2, (self.num_groups, 1, self.width)).permute(0, 2, 3, 1, 4)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, into: Tensor) -> Tensor:
    """Turn each pair of features, one from either half of a head, by the angle of its position."""
    first, second = x.chunk(2, -1)
    turned_first, turned_second = into.chunk(2, -1)
    torch.mul(first, cos, out=turned_first)
    turned_first.addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=turned_second)
    turned_second.addcmul_(first, sin)
    return into


@dataclass(frozen=True)
class _Positions:
    """What attention needs to know of where its queries are.

    Attributes:
        cos: Of the angles of keys, [length, half a head].
        sin: Likewise.
        query_cos: Of the angles of queries, with the scale of the scores.
        query_sin: Likewise.
        mask: Added to the scores, broadcast to [rows * groups, heads * queries, length].
        chosen: Flat positions [rows, chosen] that queries are at; None for all.
    """

    cos: Tensor
    sin: Tensor
    query_cos: Tensor
    query_sin: Tensor
    mask: Tensor
    chosen: Tensor | None = None

    def pick(self, x: Tensor) -> Tensor:
        """Return [rows, chosen, features] of [rows, length, features]."""
        if self.chosen is None:
            return x
        return x.flatten(0, 1).index_select(0, self.chosen.flatten()).view(*self.chosen.shape, -1)

    def put(self, dx: Tensor, dpicked: Tensor) -> None:
        """Add the gradient of what was picked to that of where it came from."""
        assert self.chosen is not None
        dx.flatten(0, 1).index_add_(0, self.chosen.flatten(), dpicked.flatten(0, 1))


@dataclass(frozen=True)
class _Layer:
    """One block: attention and a gated multilayer perceptron, each behind a norm and beside the residual stream."""

    modules: Mapping[str, _Module]
    norms: tuple[_Norm, _Norm]
    heads: _Heads

    def forward(self, x: Tensor, at: _Positions, shares: Sequence[Share]) -> tuple[Tensor, dict[str, Any]]:
        """Return the stream behind the block, at the positions of the queries, and what ``backward`` needs."""
        kept: dict[str, Any] = {}
        normed, *kept["norm_1"] = self.norms[0].forward(x)
        asking = at.pick(normed)
        mixed = self._attend(normed, asking, at, shares, kept)
        x, kept["o_proj"] = self.modules["o_proj"].forward(mixed, shares, onto=at.pick(x))
        again, *kept["norm_2"] = self.norms[1].forward(x)
        gate, kept["gate_proj"] = self.modules["gate_proj"].forward(again, shares)
        up, kept["up_proj"] = self.modules["up_proj"].forward(again, shares)
        opened = nn.functional.silu(gate)
        gated = opened * up
        x, kept["down_proj"] = self.modules["down_proj"].forward(gated, shares, onto=x)
        kept |= {"normed": normed, "asking": asking, "mixed": mixed, "again": again}
        kept |= {"gate": gate, "up": up, "opened": opened, "gated": gated}
        return x, kept

    def _attend(
        self, normed: Tensor, asking: Tensor, at: _Positions, shares: Sequence[Share], kept: dict[str, Any]
    ) -> Tensor:
        q, kept["q_proj"] = self.modules["q_proj"].forward(asking, shares)
        k, kept["k_proj"] = self.modules["k_proj"].forward(normed, shares)
        v, kept["v_proj"] = self.modules["v_proj"].forward(normed, shares)
        queries, keys = self.heads.queries(q), self.heads.keys(k)
        q = _rotate(queries, at.query_cos, at.query_sin, q.new_empty(queries.shape)).flatten(2, 3).flatten(0, 1)
        k = _rotate(keys, at.cos, at.sin, k.new_empty(keys.shape)).flatten(0, 2)
        v = self.heads.keys(v).flatten(0, 2)
        shares_of_attention = torch.baddbmm(at.mask, q, k.mT).softmax(-1)
        mixed = torch.bmm(shares_of_attention, v).view(queries.shape).permute(0, 3, 1, 2, 4).flatten(2)
        kept |= {"q": q, "k": k, "v": v, "attention": shares_of_attention}
        return mixed

    def backward(
        self, dx: Tensor, at: _Positions, shares: Sequence[Share], kept: dict[str, Any], *, wanted: bool
    ) -> Tensor | None:
        """Return the gradient of the stream before the block, if it is wanted; ``dx`` is used up."""

        def back(name: str, x: str, dy: Tensor, dx: Tensor | None = None, wanted: bool = True) -> Tensor | None:
            return self.modules[name].backward(kept[x], kept[name], dy, shares, dx, wanted=wanted)

        dgated = _some(back("down_proj", "gated", dx))
        dagain = back("up_proj", "again", dgated * kept["opened"])
        dgate = torch.ops.aten.silu_backward(dgated.mul_(kept["up"]), kept["gate"])
        dagain = _some(back("gate_proj", "again", dgate, dagain))
        dx += self.norms[1].backward(dagain, *kept["norm_2"])
        dq, dk, dv = self._attend_backward(_some(back("o_proj", "mixed", dx)), at, kept)
        dnormed = back("k_proj", "normed", dk, wanted=wanted)
        dnormed = back("v_proj", "normed", dv, dnormed, wanted)
        if at.chosen is None or dnormed is None:
            dnormed = back("q_proj", "asking", dq, dnormed, wanted)
        else:
            at.put(dnormed, _some(back("q_proj", "asking", dq)))
        if dnormed is None:
            return None
        dbefore = self.norms[0].backward(dnormed, *kept["norm_1"])
        if at.chosen is None:
            return dbefore.add_(dx)
        at.put(dbefore, dx)
        return dbefore

    def _attend_backward(self, dmixed: Tensor, at: _Positions, kept: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of what the modules gave as queries, keys and values."""
        q, k, v, attention = (kept[name] for name in ("q", "k", "v", "attention"))
        dout = self.heads.queries(dmixed).flatten(2, 3).flatten(0, 1)
        dscores = torch.ops.aten._softmax_backward_data(torch.bmm(dout, v.mT), attention, -1, attention.dtype)
        dq, queries = self._empty(kept["asking"], self.heads.queries)
        dk, keys = self._empty(kept["normed"], self.heads.keys)
        dv, values = self._empty(kept["normed"], self.heads.keys)
        _rotate(torch.bmm(dscores, k).view(queries.shape), at.query_cos, -at.query_sin, queries)
        _rotate(torch.bmm(dscores.mT, q).view(keys.shape), at.cos, -at.sin, keys)
        values.copy_(torch.bmm(attention.mT, dout).view(values.shape))
        return dq, dk, dv

    def _empty(self, like: Tensor, view: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return room for features of all heads, and its view by heads."""
        per_group = self.heads.num_per_group if view == self.heads.queries else 1
        features = like.new_empty(*like.shape[:2], self.heads.num_groups * per_group * self.heads.width)
        return features, view(features)


def _some(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


class GroupDecoder:
    """The layers of a network between embedding and last norm, which stay the network's own."""

    def __init__(self, network: PreTrainedModel, layers: Sequence[_Layer]) -> None:
        """Take the layers of ``network`` as ``written_out`` found them."""
        # Weakly, because ``_tried`` keeps the decoder for as long as there is the network.
        self._network: Any = proxy(network)
        self._layers = layers
        self.paths = frozenset(module.path for layer in layers for module in layer.modules.values())

    def still_has_weights_of(self, network: PreTrainedModel) -> bool:
        """Return whether these are the very weights that ``network`` has now."""
        return network.dtype == torch.float32 and all(
            getattr(base_linear(network, module.path), "weight", None) is module.weight
            for layer in self._layers
            for module in layer.modules.values()
        )

    def forward(
        self, input_ids: Int[Tensor, "rows length"], chosen: Int[Tensor, "rows chosen"], shares: Sequence[Share]
    ) -> tuple[Float[Tensor, "rows chosen hidden"], list[Any]]:
        """Return the hidden states before the last norm at chosen columns of each row, and what ``backward`` needs.

        Args:
            input_ids: Padded on the right.
            chosen: Any columns, in any order; as many as there are means all of them, in order.
            shares: Which rows meet which factors.
        """
        decoder: Any = self._network.base_model
        x = decoder.embed_tokens(input_ids)
        everywhere, at_chosen = self._positions(x, chosen)
        kept: list[Any] = []
        for number, layer in enumerate(self._layers, start=1):
            at = at_chosen if number == len(self._layers) else everywhere
            x, own = layer.forward(x, at, shares)
            kept.append((at, own))
        return x, kept

    def last_norm(self, hidden: Float[Tensor, "chosen hidden"]) -> Float[Tensor, "chosen hidden"]:
        """Return what the output layer is applied to."""
        decoder: Any = self._network.base_model
        return decoder.norm(hidden)

    def _positions(self, x: Tensor, chosen: Tensor) -> tuple[_Positions, _Positions]:
        rows, length = x.shape[:2]
        heads = self._layers[0].heads
        columns = torch.arange(length, device=x.device)
        decoder: Any = self._network.base_model
        cos, sin = decoder.rotary_emb(x, position_ids=columns[None])
        cos, sin = (angles[0, :, : heads.width // 2].contiguous() for angles in (cos, sin))
        query_cos, query_sin = (angles * heads.width**-0.5 for angles in (cos, sin))
        future = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
        everywhere = _Positions(cos, sin, query_cos, query_sin, future.repeat(heads.num_per_group, 1))
        if chosen.shape[1] >= length:
            return everywhere, everywhere
        # Axes: rows, groups, heads of a group, queries, features.
        query_cos, query_sin = (angles[chosen][:, None, None] for angles in (query_cos, query_sin))
        mask = (
            future[chosen][:, None].expand(-1, heads.num_groups, -1, -1).flatten(0, 1).repeat(1, heads.num_per_group, 1)
        )
        flat = chosen + length * torch.arange(rows, device=x.device)[:, None]
        return everywhere, _Positions(cos, sin, query_cos, query_sin, mask, flat)

    def backward(self, dx: Tensor, kept: list[Any], shares: Sequence[Share]) -> None:
        """Add the gradients of the factors to their banks, from that of the hidden states; ``dx`` is used up."""
        paths = {path for share in shares if share.bank.trained != "none" for path in share.bank.shapes}
        lowest = min(
            number for number, layer in enumerate(self._layers) if any(m.path in paths for m in layer.modules.values())
        )
        gradient: Tensor | None = dx
        for number in range(len(self._layers) - 1, lowest - 1, -1):
            assert gradient is not None
            at, own = kept.pop()
            gradient = self._layers[number].backward(gradient, at, shares, own, wanted=number > lowest)


# Trying a network out takes as long as some steps of a small one.
_tried: WeakKeyDictionary[PreTrainedModel, GroupDecoder] = WeakKeyDictionary()


def decoder_of(network: PreTrainedModel) -> GroupDecoder | None:
    """Return what ``written_out`` does, for a network with nothing put into it, which is tried once for its weights."""
    decoder = _tried.get(network)
    if decoder is None or not decoder.still_has_weights_of(network):
        decoder = written_out(network)
        if decoder is not None:
            _tried[network] = decoder
    return decoder


def written_out(network: PreTrainedModel) -> GroupDecoder | None:
    """Return the decoder of ``network`` written out, or None if it is of another kind."""
    if network.dtype != torch.float32 or network.device.type != "cpu" or _slides(network):
        return None
    base: Any = network.base_model
    try:
        layers = [_layer(network, number) for number in range(len(base.layers))]
        decoder = GroupDecoder(network, layers)
        with torch.no_grad():
            tokens = torch.arange(_PROBE[0] * _PROBE[1], device=network.device).view(_PROBE)
            expected = base(input_ids=tokens, use_cache=False).last_hidden_state
            for columns in (_PROBE[1], 2):
                chosen = torch.arange(_PROBE[1], device=network.device)[-columns:].expand(_PROBE[0], -1)
                hidden, _ = decoder.forward(tokens, chosen, ())
                if not torch.allclose(base.norm(hidden), expected[:, -columns:], rtol=1e-3, atol=1e-4):
                    return None
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, KeyError):
        return None
    return decoder


def _slides(network: PreTrainedModel) -> bool:
    """Return whether some layer attends to a window only, which a few tokens would not show."""
    config = network.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [None]
    return getattr(config, "sliding_window", None) is not None and any(kind != "full_attention" for kind in kinds)


def _layer(network: PreTrainedModel, number: int) -> _Layer:
    prefix = f"{network.base_model_prefix}.layers.{number}"
    block: Any = network.get_submodule(prefix)
    modules = {}
    for parent, names in (("self_attn", _ATTENTION), ("mlp", _MLP)):
        for name in names:
            base = base_linear(network, path := f"{prefix}.{parent}.{name}")
            if type(base) is not nn.Linear:
                raise NotImplementedError
            modules[name] = _Module(path, base.weight, base.bias)
    norms = (block.input_layernorm, block.post_attention_layernorm)
    width = block.self_attn.head_dim
    num_groups = modules["k_proj"].weight.shape[0] // width
    heads = _Heads(num_groups, modules["q_proj"].weight.shape[0] // width // num_groups, width)
    first, second = (_Norm(norm.weight, norm.variance_epsilon) for norm in norms)
    return _Layer(modules, (first, second), heads)
