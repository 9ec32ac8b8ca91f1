"""LoRA layers of many clients around one frozen base: each row of a batch meets the factors of its own client.

For a row of client i a linear module computes ``x W^T + s_i (x A_i^T) B_i^T``. The product with ``W`` is one for all
rows, those with ``A_i`` and ``B_i`` are batched over clients. Clients whose ranks are alike share a bank, padded to the
largest of its ranks: a zero row of ``A`` beside a zero column of ``B`` gets a zero gradient and stays zero.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flexlora.training.factor_bank import FactorBank

# Rows and length of the tokens a network is tried on.
_PROBE = (2, 3)


@dataclass(frozen=True)
class Share:
    """The rows of a pass that meet the factors of one bank.

    Attributes:
        bank: Whose factors.
        rows: Which rows, those of a client side by side.
        slots: The client of each segment; a segment is a run of equally many rows.
        num_segments: How many segments.
        masks: Draws what dropout leaves of the input of each module; None drops nothing.
    """

    bank: FactorBank
    rows: slice
    slots: slice | Tensor
    num_segments: int
    masks: "RowMasks | None" = None

    def segments(self, of_rows: Tensor) -> Tensor:
        """Return a view of this share's part of [rows, length, features] as [segments, tokens, features]."""
        part = of_rows[self.rows]
        return part.reshape(self.num_segments, -1, part.shape[-1])

    def mask(self, x: Tensor) -> Tensor | None:
        """Return what dropout leaves of this share's part of ``x``, scaled, as [segments, tokens, features]."""
        return None if self.masks is None else self.masks.draw(x[self.rows]).reshape(self.num_segments, -1, x.shape[-1])

    def factors(self, path: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``A``, ``B`` and the scaling of each segment; the scaling is not rounded."""
        found = (*self.bank.factors[path], self.bank.scalings(path))
        if isinstance(self.slots, slice):
            A, B, scalings = (tensor[self.slots] for tensor in found)
        else:
            A, B, scalings = (tensor.index_select(0, self.slots) for tensor in found)
        return A.to(dtype), B.to(dtype), scalings

    def add_gradient(self, gradient: Tensor, segments: Tensor) -> None:
        """Add the gradient of each segment to that of its client."""
        if isinstance(self.slots, slice):
            gradient[self.slots] += segments
        else:
            # Twice as fast as index_add_ on rows that are not side by side.
            gradient.index_put_((self.slots,), segments.to(gradient.dtype), accumulate=True)


class RowMasks:
    """Dropout whose draws for a row depend on that row's own stream, not on who else is in the pass."""

    def __init__(self, rate: float, seeds: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        """Take one seed and one length without padding for each row."""
        self._keep = 1.0 - rate
        self._lengths = lengths
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def draw(self, rows: Tensor) -> Tensor:
        """Return zeros and ``1 / keep`` in the shape of ``rows`` [rows, length, features]; zeros at padding."""
        masks = torch.zeros_like(rows)
        for mask, length, generator in zip(masks, self._lengths, self._generators, strict=True):
            mask[:length].bernoulli_(self._keep, generator=generator)
        return masks.div_(self._keep)


class Pass:
    """The shares of the pass that is being computed; the layers of a network look here."""

    def __init__(self, device: torch.device) -> None:
        """Begin without a share: every module is the bare base."""
        self.shares: Sequence[Share] = ()
        # Makes autograd come by where the input of a layer needs no gradient but its factors do.
        self.anchor = torch.zeros((), device=device, requires_grad=True)


class GroupLinear(nn.Module):
    """Stands in for a linear module while a group trains."""

    def __init__(self, path: str, base: nn.Linear, current: Pass) -> None:
        """Share the weights of ``base``, which is left as it is."""
        super().__init__()
        self.path, self._current = path, current
        # A tuple, or the module would count the weights as its own.
        self._base = (base,)

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models ask for its dtype."""
        return self._base[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output plus each row's own low-rank change."""
        (base,) = self._base
        shares = [share for share in self._current.shares if self.path in share.bank.shapes]
        if not shares:
            return nn.functional.linear(x, base.weight, base.bias)
        return cast("Tensor", _GroupedLinear.apply(x, self._current.anchor, base.weight, base.bias, self.path, shares))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, path: str, shares: list[Share]
    ) -> Tensor:
        y = nn.functional.linear(x, weight, bias)
        kept: list[Tensor | None] = []
        for share in shares:
            A, B, scaling = share.factors(path, x.dtype)
            mask = share.mask(x)
            low = torch.bmm(_masked(share.segments(x), mask), A.mT).mul_(scaling)
            share.segments(y).baddbmm_(low, B.mT)
            kept += [low, mask]
        ctx.save_for_backward(x, weight, *kept)
        ctx.path, ctx.shares = path, shares
        return y

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = outputs
        x, weight, *kept = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        for share, low, mask in zip(ctx.shares, kept[::2], kept[1::2], strict=True):
            A, B, scaling = share.factors(ctx.path, x.dtype)
            into_A, into_B = share.bank.factor_gradients[ctx.path]
            dys = share.segments(dy)
            if into_B is not None:
                share.add_gradient(into_B, torch.bmm(dys.mT, low))
            if into_A is None and dx is None:
                continue
            dlow = torch.bmm(dys, B).mul_(scaling)
            if into_A is not None:
                share.add_gradient(into_A, torch.bmm(dlow.mT, _masked(share.segments(x), mask)))
            if dx is not None and mask is None:
                share.segments(dx).baddbmm_(dlow, A)
            elif dx is not None:
                share.segments(dx).addcmul_(torch.bmm(dlow, A), mask)
        return dx, None, None, None, None, None


def _masked(inputs: Tensor, mask: Tensor | None) -> Tensor:
    return inputs if mask is None else inputs * mask


class GroupLayers:
    """The layers of a group in a network, put in only while a pass is computed."""

    def __init__(self, network: nn.Module) -> None:
        """Begin without a layer."""
        self._network = network
        self._current = Pass(next(network.parameters()).device)
        self._layers: dict[str, GroupLinear] = {}

    def add(self, paths: Iterable[str]) -> None:
        """Prepare layers for modules; these must be plain linear ones, or PEFT layers around such."""
        for path in sorted(set(paths) - self._layers.keys()):
            base = base_linear(self._network, path)
            assert type(base) is nn.Linear
            self._layers[path] = GroupLinear(path, base, self._current)

    @contextmanager
    def meeting(self, shares: Sequence[Share]) -> Iterator[None]:
        """Let the rows of a batch meet the factors of ``shares`` for the length of a ``with`` block."""
        replaced = {path: _replace(self._network, path, layer) for path, layer in self._layers.items()}
        self._current.shares = shares
        try:
            yield
        finally:
            self._current.shares = ()
            for path, module in replaced.items():
                _replace(self._network, path, module)


def _replace(network: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put ``module`` at a path and return what was there."""
    parent, _, name = path.rpartition(".")
    modules = network.get_submodule(parent)._modules
    previous = modules[name]
    assert previous is not None
    modules[name] = module
    return previous


def base_linear(network: nn.Module, path: str) -> nn.Module:
    """Return the module of the base at a path, without the PEFT layer that may be around it."""
    return without_lora(network.get_submodule(path))


def without_lora(module: nn.Module) -> nn.Module:
    """Return what a PEFT layer is around, any other module as it is."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def reason_against_groups(network: nn.Module, paths: Iterable[str], *, base_drops_out: bool) -> str | None:
    """Return why several clients cannot share a pass through this network, or None if they can.

    Args:
        network: The base.
        paths: Modules with factors.
        base_drops_out: Whether the base itself draws random numbers while training.
    """
    if base_drops_out:
        return "the base model has dropout of its own"
    # A path that does not exist is the fault of the client that names it.
    paths = sorted(set(paths) & {path for path, _ in network.named_modules()})
    for path in paths:
        if type(base := base_linear(network, path)) is not nn.Linear:
            return f"{path} is no plain linear module but {type(base).__name__}"
    return _reason_in_rows(network, paths)


def _reason_in_rows(network: nn.Module, paths: Sequence[str]) -> str | None:
    """Try a few tokens: every module has to see them as [rows, length, features], once per pass."""
    seen: dict[str, list[tuple[int, ...]]] = {path: [] for path in paths}

    def look(path: str) -> Any:
        return lambda module, inputs: seen[path].append(tuple(inputs[0].shape[:-1]))

    hooks = [base_linear(network, path).register_forward_pre_hook(look(path)) for path in paths]
    try:
        with torch.no_grad():
            network(input_ids=torch.zeros(_PROBE, dtype=torch.long, device=next(network.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    odd = next((path for path in paths if seen[path] != [_PROBE]), None)
    return None if odd is None else f"{odd} does not see the rows of a batch one by one"
