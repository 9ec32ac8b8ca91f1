"""Compares changes for the contract, and says which rule is broken."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import LoraFactors

Deltas = Mapping[str, np.ndarray]
"""Module path -> dense change in float64."""


class ContractError(FlexLoraError, AssertionError):
    """A method breaks a rule that the rest of the package relies on; the message names the rule and what was found."""


def change_of(broadcast: Broadcast) -> Deltas:
    """Return what a broadcast adds to the base, trained and frozen part together, in float64.

    ``scaling * B @ A`` in each module, or ``scaling * B @ core @ A``, plus that of the frozen branch, which may have
    modules of its own. Computed by numpy.
    """
    cores, frozen = broadcast.cores or {}, broadcast.frozen or {}
    parts = {module: [_product(factors, cores.get(module))] for module, factors in broadcast.trainable.items()}
    for module, factors in frozen.items():
        parts.setdefault(module, []).append(_product(factors))
    return {module: np.sum(parts[module], axis=0) for module in sorted(parts)}


def best_approximation(delta: np.ndarray, rank: int) -> np.ndarray:
    """Return the best approximation of this rank in the Frobenius norm, by numpy's decomposition."""
    U, S, Vh = np.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def require(condition: object, rule: str) -> None:
    """Raise ContractError with the rule unless the condition holds."""
    if not condition:
        raise ContractError(rule)


def require_equal(found: Deltas, expected: Deltas, rule: str, rtol: float = 1e-5) -> None:
    """Raise unless two changes are equal up to ``rtol`` in the Frobenius norm of each module.

    Raises:
        ContractError: Naming the rule and the module.
    """
    require(list(found) == list(expected), f"{rule}: modules must be {list(expected)}; got {list(found)}")
    for module, delta in expected.items():
        error, norm = float(np.linalg.norm(found[module] - delta)), float(np.linalg.norm(delta))
        require(error <= rtol * norm, f"{rule}: {module} is off by {error:.3g}, its norm is {norm:.3g}")


def require_best(found: Deltas, expected: Deltas, rule: str, rtol: float = 1e-5) -> None:
    """Raise unless every module is the best approximation of what was expected at the rank that it has.

    Raises:
        ContractError: Naming the rule and the module.
    """
    best = {
        module: best_approximation(delta, int(np.linalg.matrix_rank(found[module], tol=rtol * np.linalg.norm(delta))))
        for module, delta in expected.items()
        if module in found
    }
    for module, delta in best.items():
        require(delta.any() or not expected[module].any(), f"{rule}: nothing is left of {module}")
    require_equal(found, best, rule, rtol)


def require_refused(call: Callable[[], object], what: str) -> None:
    """Raise unless ``call`` raises an error of the package.

    Raises:
        ContractError: If it raises nothing, or an error of another kind.
    """
    try:
        call()
    except FlexLoraError:
        return
    except Exception as error:
        raise ContractError(
            f"{what} must be refused with an AggregationError; got {type(error).__name__}: {error}"
        ) from error
    raise ContractError(f"{what} must be refused with an AggregationError; it was taken")


def tensors_of(state: Any, name: str = "state") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield path and tensor of every tensor in a state."""
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key in state:  # pyright: ignore[reportUnknownVariableType]
            yield from tensors_of(state[key], f"{name}/{key}")
    elif isinstance(state, tuple):
        for index in range(len(state)):  # pyright: ignore[reportUnknownArgumentType]
            yield from tensors_of(state[index], f"{name}/{index}")
    elif dataclasses.is_dataclass(state):
        for field in dataclasses.fields(state):
            yield from tensors_of(getattr(state, field.name), f"{name}/{field.name}")


def is_frozen(kind: type[Any]) -> bool:
    """Return whether a class is a frozen dataclass."""
    parameters: Any = getattr(kind, "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)


def _product(factors: LoraFactors, core: torch.Tensor | None = None) -> np.ndarray:
    left, right = factors.B.detach().double().numpy(), factors.A.detach().double().numpy()
    return factors.scaling * (left if core is None else left @ core.detach().double().numpy()) @ right
