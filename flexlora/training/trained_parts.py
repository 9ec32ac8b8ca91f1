"""Holds what the optimiser of one client moves, and completes the gradients that a backward pass leaves.

A core has no layer of its own: the loaded ``B`` is ``B @ core``, whose gradient ``G`` makes that of the core,
``B^T G``. Under a mask, the gradient of ``B`` is zero outside; its values there start at zero and stay there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexlora.federation.known_rows import mask_of
from flexlora.federation.messages import Broadcast
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.added_terms import (
    num_left_alone,
    proximal_core_gradient,
    proximal_gradients,
    tail_gradients,
)


@dataclass(frozen=True, eq=False)
class _Module:
    """A trained module: its loaded factors, and what its gradients need besides.

    Attributes:
        A: As loaded.
        B: As loaded; ``B @ core`` where there is a core.
        start: Copies of ``A`` and ``B`` before training, if a term needs them.
        mask: Entries of ``B`` that train; None is all.
        is_tail: Directions that a tail penalty is about; None for none.
    """

    path: str
    scaling: float
    A: nn.Parameter
    B: nn.Parameter
    start: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    is_tail: Tensor | None


class TrainedParts:
    """What one client trains, while it does.

    Attributes:
        parameters: For the optimiser and for clipping.
    """

    def __init__(self, model: AdaptedModel, broadcast: Broadcast, proximal: float) -> None:
        """Take the parts of a broadcast that ``model`` has loaded.

        Args:
            model: The base with the broadcast.
            broadcast: Says what is trained.
            proximal: Weight of the proximal term; 0 for none.
        """
        self._broadcast, self._proximal, self._cores = broadcast, proximal, model.cores
        self._starts = {path: loaded.core.detach().clone() for path, loaded in self._cores.items()}
        self.parameters = [loaded.core for loaded in self._cores.values()] or model.trained_parameters()
        is_plain = not self._cores and broadcast.mask is None and broadcast.tail_penalty is None and not proximal
        self._modules = [] if is_plain else [self._module(model, path) for path in sorted(broadcast.trainable)]

    def _module(self, model: AdaptedModel, path: str) -> _Module:
        sent, (A, B) = self._broadcast, model.loaded_factors(path)
        factors = sent.trainable[path]
        mask = is_tail = None
        if sent.mask is not None:
            mask = mask_of(sent.mask, path, (B.shape[0], B.shape[1])).to(B.device)
        if sent.tail_penalty is not None:
            left_alone = num_left_alone(sent.tail_penalty.share, factors.rank)
            is_tail = torch.arange(factors.rank, device=B.device) >= left_alone
        keeps_start = bool(self._proximal) and path not in self._cores
        start = (A.detach().clone(), B.detach().clone()) if keeps_start else None
        return _Module(path, factors.scaling, A, B, start, mask, is_tail)

    @torch.no_grad()
    def complete_gradients(self) -> None:
        """Add the gradients of added terms, and turn those of factors into those of what is trained."""
        penalty = self._broadcast.tail_penalty
        for module in self._modules:
            if penalty is not None and module.is_tail is not None:
                _add(module, tail_gradients(module.A, module.B, module.is_tail, penalty.weight))
            if module.start is not None:
                terms = proximal_gradients(module.A, module.B, *module.start, module.scaling, self._proximal)
                _add(module, terms)
            if module.mask is not None and module.B.grad is not None:
                module.B.grad *= module.mask
            if module.path in self._cores:
                self._complete_core(module)

    def _complete_core(self, module: _Module) -> None:
        loaded, gradient = self._cores[module.path], module.B.grad
        if gradient is None:
            return
        core = loaded.core
        core.grad, module.B.grad = loaded.B.mT @ gradient, None
        if self._proximal:
            start = self._starts[module.path]
            core.grad += proximal_core_gradient(module.A, loaded.B, core, start, module.scaling, self._proximal)

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the moved cores where the model uses them."""
        for module in self._modules:
            if module.path in self._cores:
                loaded = self._cores[module.path]
                torch.matmul(loaded.B, loaded.core, out=module.B)


def _add(module: _Module, gradients: tuple[Tensor, Tensor]) -> None:
    """Add gradients to those of the factors that are trained."""
    for parameter, gradient in zip((module.A, module.B), gradients, strict=True):
        if parameter.grad is not None:
            parameter.grad += gradient
