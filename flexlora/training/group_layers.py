"""Replaces the linear modules of a base so that each row of a pass uses the factors of its own client.

For a row of client i, a linear module computes ``x W^T + s_i (x A_i^T) B_i^T``. One product with ``W`` serves all rows;
those with ``A_i`` and ``B_i`` are batched over clients.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flexlora.federation.messages import Broadcast
from flexlora.training.factor_bank import FactorBank

# Rows and length of the probe.
_PROBE = (2, 3)


@dataclass(frozen=True)
class BankRows:
    """The rows of a pass that use the factors of one bank.

    Attributes:
        bank: Holds the factors.
        rows: Positions of the rows; those of a client are neighbours.
        slots: Slot of each segment's client; segments are runs of equally many rows.
        num_segments: Number of segments.
        masks: Draws dropout masks; None drops nothing.
    """

    bank: FactorBank
    rows: slice
    slots: slice | Tensor
    num_segments: int
    masks: "RowMasks | None" = None

    def segments(self, of_rows: Tensor) -> Tensor:
        """Return a view of these rows of [rows, length, features] as [segments, tokens, features]."""
        part = of_rows[self.rows]
        return part.reshape(self.num_segments, -1, part.shape[-1])

    def mask(self, x: Tensor) -> Tensor | None:
        """Return a dropout mask for these rows of ``x``, scaled, as [segments, tokens, features]."""
        return None if self.masks is None else self.masks.draw(x[self.rows]).reshape(self.num_segments, -1, x.shape[-1])

    def factors(self, path: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``A`` and ``B`` of each segment in ``dtype``, and its scaling in float32."""
        found = (*self.bank.factors[path], self.bank.scalings(path))
        if isinstance(self.slots, slice):
            A, B, scalings = (tensor[self.slots] for tensor in found)
        else:
            A, B, scalings = (tensor.index_select(0, self.slots) for tensor in found)
        if A.dtype != dtype:
            A, B = A.to(dtype), B.to(dtype)
        return A, B, scalings

    def add_gradient(self, gradient: Tensor, segments: Tensor) -> None:
        """Add the gradient of each segment to that of its client."""
        if isinstance(self.slots, slice):
            gradient[self.slots] += segments
        else:
            # Twice as fast as index_add_ on rows that are not side by side.
            gradient.index_put_((self.slots,), segments.to(gradient.dtype), accumulate=True)


class RowMasks:
    """Draws dropout masks from one stream per row, so that other rows of the pass do not matter."""

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


class CurrentPass:
    """The bank rows of the pass that is being computed; all layers of a network read them here."""

    def __init__(self, device: torch.device) -> None:
        """Start without bank rows: every module is the bare base."""
        self.bank_rows: Sequence[BankRows] = ()
        # Makes autograd call backward where the input of a layer needs no gradient but its factors do.
        self.anchor = torch.zeros((), device=device, requires_grad=True)


class GroupLinear(nn.Module):
    """Takes the place of a linear module while a group trains."""

    def __init__(self, path: str, base: nn.Linear, current: CurrentPass) -> None:
        """Use the weights of ``base``, which is left as it is."""
        super().__init__()
        self.path, self._current = path, current
        # In a tuple, so that the weights are not registered as parameters of this module.
        self._base = (base,)

    @property
    def weight(self) -> Tensor:
        """The frozen weight; some models read its dtype."""
        return self._base[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output plus each row's own low-rank change."""
        (base,) = self._base
        bank_rows = [part for part in self._current.bank_rows if self.path in part.bank.shapes]
        if not bank_rows:
            return nn.functional.linear(x, base.weight, base.bias)
        return cast(
            "Tensor", _GroupedLinear.apply(x, self._current.anchor, base.weight, base.bias, self.path, bank_rows)
        )


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, path: str, bank_rows: list[BankRows]
    ) -> Tensor:
        """Return the output of the base plus the low-rank change of each row."""
        y = nn.functional.linear(x, weight, bias)
        kept: list[Tensor | None] = []
        for part in bank_rows:
            A, B, scaling = part.factors(path, x.dtype)
            mask = part.mask(x)
            low = torch.bmm(_masked(part.segments(x), mask), A.mT).mul_(scaling)
            part.segments(y).baddbmm_(low, B.mT)
            kept += [low, mask]
        ctx.save_for_backward(x, weight, *kept)
        ctx.path, ctx.bank_rows = path, bank_rows
        return y

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Add the gradients of the factors to their banks and return that of ``x``, if it is needed."""
        (dy,) = outputs
        x, weight, *kept = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        for part, low, mask in zip(ctx.bank_rows, kept[::2], kept[1::2], strict=True):
            A, B, scaling = part.factors(ctx.path, x.dtype)
            into_A, into_B = part.bank.factor_gradients[ctx.path]
            dys = part.segments(dy)
            if into_B is not None:
                part.add_gradient(into_B, torch.bmm(dys.mT, low))
            if into_A is None and dx is None:
                continue
            dlow = torch.bmm(dys, B).mul_(scaling)
            if into_A is not None:
                part.add_gradient(into_A, torch.bmm(dlow.mT, _masked(part.segments(x), mask)))
            if dx is not None and mask is None:
                part.segments(dx).baddbmm_(dlow, A)
            elif dx is not None:
                part.segments(dx).addcmul_(torch.bmm(dlow, A), mask)
        return dx, None, None, None, None, None


def _masked(inputs: Tensor, mask: Tensor | None) -> Tensor:
    return inputs if mask is None else inputs * mask


class GroupLayers:
    """Puts the layers of a group into a network while a pass is computed."""

    def __init__(self, network: nn.Module) -> None:
        """Start without a layer."""
        self._network = network
        self._current = CurrentPass(next(network.parameters()).device)
        self._layers: dict[str, GroupLinear] = {}

    def add(self, paths: Iterable[str]) -> None:
        """Prepare layers for modules; they must be plain linear modules, or PEFT layers around these."""
        for path in sorted(set(paths) - self._layers.keys()):
            base = base_linear(self._network, path)
            assert type(base) is nn.Linear
            self._layers[path] = GroupLinear(path, base, self._current)

    @contextmanager
    def using(self, bank_rows: Sequence[BankRows]) -> Iterator[None]:
        """Apply the factors of ``bank_rows`` to the rows of a pass for the length of a ``with`` block."""
        replaced = {path: _replace(self._network, path, layer) for path, layer in self._layers.items()}
        self._current.bank_rows = bank_rows
        try:
            yield
        finally:
            self._current.bank_rows = ()
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
    """Return the module of the base at a path, without a PEFT layer around it."""
    return without_lora(network.get_submodule(path))


def without_lora(module: nn.Module) -> nn.Module:
    """Return the module inside a PEFT layer; any other module as it is."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def trains_alone(broadcast: Broadcast) -> bool:
    """Return whether a client trains something that groups cannot: cores, or chosen entries of ``B``."""
    return broadcast.train_factors == "core" or broadcast.mask is not None


def reason_against_groups(network: nn.Module, paths: Iterable[str], *, base_drops_out: bool) -> str | None:
    """Return why clients cannot share a pass through this network, or None if they can.

    Args:
        network: The base.
        paths: Modules with factors.
        base_drops_out: Whether the base itself draws random numbers while training.
    """
    if base_drops_out:
        return "the base model has dropout of its own"
    # A path that does not exist is an error of the client that names it.
    paths = sorted(set(paths) & {path for path, _ in network.named_modules()})
    for path in paths:
        if type(base := base_linear(network, path)) is not nn.Linear:
            return f"{path} is no plain linear module but {type(base).__name__}"
    return _reason_in_rows(network, paths)


def _reason_in_rows(network: nn.Module, paths: Sequence[str]) -> str | None:
    """Try a few tokens: every module must receive them as [rows, length, features], once per pass."""
    seen: dict[str, list[tuple[int, ...]]] = {path: [] for path in paths}

    def look(path: str) -> Any:
        """Return a hook that notes the shape of what the module at ``path`` receives."""
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
