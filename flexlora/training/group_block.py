"""Writes out one block of a Llama-like decoder, forward and backward, for a group of clients.

Written out, the gradient of a block is a few products added up in place; autograd would record each operation and read
the activations more often. With a base in bfloat16 only the products with its weights are in that type; the stream, the
factors, attention and all sums are in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexlora.training.group_layers import BankRows

# The scaled product of an input with A, and A, B and the scalings.
_Low = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class GroupModule:
    """A linear module: where it is, and its frozen weights."""

    path: str
    weight: Tensor
    bias: Tensor | None

    def forward(
        self, x: Tensor, bank_rows: Sequence[BankRows], onto: Tensor | None = None
    ) -> tuple[Tensor, list[_Low]]:
        """Return the output, added to ``onto`` if given, and what ``backward`` needs."""
        if onto is None or self.bias is not None or self._is_mixed(x):
            y = nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)
            y = y if onto is None else y.add_(onto)
        else:
            y = torch.addmm(onto.flatten(0, 1), x.flatten(0, 1), self.weight.T).view_as(onto)
        lows = []
        for part in self._own(bank_rows):
            A, B, scaling = part.factors(self.path, x.dtype)
            low = torch.bmm(part.segments(x), A.mT).mul_(scaling)
            part.segments(y).baddbmm_(low, B.mT)
            lows.append((low, A, B, scaling))
        return y, lows

    def backward(
        self,
        x: Tensor,
        lows: Sequence[_Low],
        dy: Tensor,
        bank_rows: Sequence[BankRows],
        dx: Tensor | None = None,
        *,
        wanted: bool = True,
    ) -> Tensor | None:
        """Add the gradients of the factors to their banks and, if wanted, return that of ``x``, added to ``dx``."""
        if wanted:
            flat = dy.flatten(0, 1)
            if dx is None or self._is_mixed(x):
                through = (flat.to(self.weight.dtype) @ self.weight).to(x.dtype).view_as(x)
                dx = through if dx is None else dx.add_(through)
            else:
                dx.flatten(0, 1).addmm_(flat, self.weight)
        for part, (low, A, B, scaling) in zip(self._own(bank_rows), lows, strict=True):
            into_A, into_B = part.bank.factor_gradients[self.path]
            own = part.segments(dy)
            if into_B is not None:
                part.add_gradient(into_B, torch.bmm(own.mT, low))
            if into_A is None and not wanted:
                continue
            dlow = torch.bmm(own, B).mul_(scaling)
            if into_A is not None:
                part.add_gradient(into_A, torch.bmm(dlow.mT, part.segments(x)))
            if dx is not None:
                part.segments(dx).baddbmm_(dlow, A)
        return dx

    def _is_mixed(self, x: Tensor) -> bool:
        """Return whether the weights are of another type than the stream, in which their products are taken."""
        return self.weight.dtype != x.dtype

    def _own(self, bank_rows: Sequence[BankRows]) -> list[BankRows]:
        return [part for part in bank_rows if self.path in part.bank.shapes]


@dataclass(frozen=True)
class RmsNorm:
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
        """Return the gradient of the input; ``dy`` is overwritten."""
        dunit = dy.mul_(self.weight)
        along = (dunit * unit).mean(-1, keepdim=True)
        return dunit.addcmul_(unit, along, value=-1.0).mul_(inverse)


@dataclass(frozen=True)
class Heads:
    """The number of heads, and views of features by head."""

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
class Positions:
    """Positions of keys and queries, as attention needs them.

    Attributes:
        cos: Of the angles of keys, [length, half a head].
        sin: Of the same angles.
        query_cos: Of the angles of queries, times the scale of the scores.
        query_sin: Of the same angles.
        mask: Added to the scores, broadcast to [rows * groups, heads * queries, length].
        chosen: Flat positions [rows, chosen] of the queries; None for all.
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
        """Add the gradient of what was picked to ``dx``, at the positions it was picked from."""
        assert self.chosen is not None
        dx.flatten(0, 1).index_add_(0, self.chosen.flatten(), dpicked.flatten(0, 1))


@dataclass(frozen=True)
class Block:
    """Attention and a gated multilayer perceptron, each applied to a norm of the residual stream and added to it."""

    modules: Mapping[str, GroupModule]
    norms: tuple[RmsNorm, RmsNorm]
    heads: Heads

    def forward(self, x: Tensor, at: Positions, bank_rows: Sequence[BankRows]) -> tuple[Tensor, dict[str, Any]]:
        """Return the stream after the block, at the positions of the queries, and what ``backward`` needs."""
        kept: dict[str, Any] = {}
        normed, *kept["norm_1"] = self.norms[0].forward(x)
        asking = at.pick(normed)
        mixed = self._attend(normed, asking, at, bank_rows, kept)
        x, kept["o_proj"] = self.modules["o_proj"].forward(mixed, bank_rows, onto=at.pick(x))
        again, *kept["norm_2"] = self.norms[1].forward(x)
        gate, kept["gate_proj"] = self.modules["gate_proj"].forward(again, bank_rows)
        up, kept["up_proj"] = self.modules["up_proj"].forward(again, bank_rows)
        opened = nn.functional.silu(gate)
        gated = opened * up
        x, kept["down_proj"] = self.modules["down_proj"].forward(gated, bank_rows, onto=x)
        kept |= {"normed": normed, "asking": asking, "mixed": mixed, "again": again}
        kept |= {"gate": gate, "up": up, "opened": opened, "gated": gated}
        return x, kept

    def _attend(
        self, normed: Tensor, asking: Tensor, at: Positions, bank_rows: Sequence[BankRows], kept: dict[str, Any]
    ) -> Tensor:
        q, kept["q_proj"] = self.modules["q_proj"].forward(asking, bank_rows)
        k, kept["k_proj"] = self.modules["k_proj"].forward(normed, bank_rows)
        v, kept["v_proj"] = self.modules["v_proj"].forward(normed, bank_rows)
        queries, keys = self.heads.queries(q), self.heads.keys(k)
        q = _rotate(queries, at.query_cos, at.query_sin, q.new_empty(queries.shape)).flatten(2, 3).flatten(0, 1)
        k = _rotate(keys, at.cos, at.sin, k.new_empty(keys.shape)).flatten(0, 2)
        v = self.heads.keys(v).flatten(0, 2)
        attention = torch.baddbmm(at.mask, q, k.mT).softmax(-1)
        mixed = torch.bmm(attention, v).view(queries.shape).permute(0, 3, 1, 2, 4).flatten(2)
        kept |= {"q": q, "k": k, "v": v, "attention": attention}
        return mixed

    def backward(
        self, dx: Tensor, at: Positions, bank_rows: Sequence[BankRows], kept: dict[str, Any], *, wanted: bool
    ) -> Tensor | None:
        """Return the gradient of the stream before the block, if it is wanted; ``dx`` is overwritten."""

        def back(name: str, x: str, dy: Tensor, dx: Tensor | None = None, wanted: bool = True) -> Tensor | None:
            """Go back through one module, from the gradient of its output to that of its input."""
            return self.modules[name].backward(kept[x], kept[name], dy, bank_rows, dx, wanted=wanted)

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

    def _attend_backward(self, dmixed: Tensor, at: Positions, kept: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the outputs of the query, key and value modules."""
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
        """Return an empty tensor for the features of all heads, and its view by head."""
        per_group = self.heads.num_per_group if view == self.heads.queries else 1
        features = like.new_empty(*like.shape[:2], self.heads.num_groups * per_group * self.heads.width)
        return features, view(features)


def _some(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient
