"""Puts a network back as it was after somebody else's code has worked with it.

Training libraries patch ``forward``, change configurations, register hooks, move or cast weights, and wrap modules. All
of that can be undone without a copy of the weights. Weights that were overwritten cannot be restored; a checksum finds
them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Checksums add up bits, so that any change counts and NaN equals NaN.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NetworkSnapshot:
    """What a network was like at one moment: its modules, hooks, settings and parameters."""

    def __init__(self, network: PreTrainedModel, trained: Iterable[nn.Parameter]) -> None:
        """Take the snapshot; the values of ``trained`` may change, no other may."""
        self._modules = [(module, _attributes(module)) for module in network.modules()]
        settings = (network.config, network.generation_config)
        self._settings = [(owner, dict(vars(owner))) for owner in settings if owner is not None]
        # The data is an alias: it keeps the storage alive if the parameter is moved or cast.
        self._parameters = [(parameter, parameter.data, parameter.requires_grad) for parameter in network.parameters()]
        may_change = {id(parameter) for parameter in trained}
        self._fixed = [
            (name, parameter.data, _checksum(parameter.data))
            for name, parameter in network.named_parameters()
            if id(parameter) not in may_change
        ]

    def overwritten(self) -> list[str]:
        """Return the names of the parameters whose values have changed though they must not."""
        return [name for name, data, checksum in self._fixed if _checksum(data) != checksum]

    def restore(self) -> None:
        """Undo everything but changes of values, and drop all gradients."""
        for owner, attributes in [*self._modules, *self._settings]:
            vars(owner).clear()
            vars(owner).update(attributes)
        for parameter, data, requires_grad in self._parameters:
            parameter.grad = None
            if parameter.data_ptr() != data.data_ptr() or parameter.dtype != data.dtype:
                parameter.data = data
            parameter.requires_grad_(requires_grad)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module; tables of parameters, submodules and hooks as copies."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()}


def _checksum(data: Tensor) -> int:
    return int(data.view(_INTEGERS[data.dtype.itemsize]).sum())
