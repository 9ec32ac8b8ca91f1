"""Sets a method up to be checked, with four clients of mixed ranks, and compares changes."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flexlora.aggregators.settings import Traits, traits_of
from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SHAPES = {"attn.k_proj": (6, 20), "attn.q_proj": (20, 20), "mlp.down_proj": (20, 31)}
SERVER_RANK = 5
SCALINGS = (Scaling("constant_alpha", 16.0), Scaling("constant_ratio", 2.0), Scaling("rslora", 4.0))
Deltas = Mapping[str, np.ndarray]


class ContractError(FlexLoraError, AssertionError):
    """A method breaks a rule that the rest of the package relies on; the message names the rule and what was found."""


@dataclass(frozen=True)
class Case:
    """A method with its options, and four clients to try it on.

    Attributes:
        method: The class.
        options: As a configuration would give them.
        scaling: The scaling rule.
    """

    method: type[Any]
    options: Mapping[str, Any]
    scaling: Scaling = SCALINGS[0]

    @property
    def aggregator(self) -> Any:
        """The method, constructed."""
        return self.method(scaling=self.scaling, **self.options)

    @property
    def traits(self) -> Traits:
        """The traits of the method."""
        return traits_of(self.aggregator)

    def plans(self) -> list[dict[str, int]]:
        """Return the ranks of four clients: mixed, and not the same in every module, where the method can do that."""
        if self.traits.needs_one_rank:
            return [all_modules(SERVER_RANK)] * 4
        mixed = {"attn.k_proj": 1, "attn.q_proj": 2, "mlp.down_proj": 4}
        return [all_modules(2), mixed, all_modules(SERVER_RANK), all_modules(1)]

    def start(self) -> Any:
        """Return the first state."""
        return self.aggregator.init(initial_adapter(self.scaling))

    def updates(self, state: Any, seed: int = 0) -> list[Update]:
        """Return what four clients with weights 10, 20, 30 and 40 send after training from ``state``."""
        return [
            Update(f"client-{i}", trained(self.aggregator.broadcast(state, plan), 10 * seed + i), weight=10.0 * (i + 1))
            for i, plan in enumerate(self.plans())
        ]

    def after_a_round(self, seed: int = 0) -> Any:
        """Return the state after one round."""
        state = self.start()
        return self.aggregator.aggregate(state, self.updates(state, seed))

    def deltas(self, state: Any, ranks: Mapping[str, int] | None = None) -> Deltas:
        """Return the change that a client of these ranks runs, trained and frozen part together."""
        return change_of(self.aggregator.broadcast(state, ranks or all_modules(SERVER_RANK)))


def all_modules(rank: int) -> dict[str, int]:
    """Return one rank for every module."""
    return dict.fromkeys(SHAPES, rank)


def initial_adapter(scaling: Scaling = SCALINGS[0], rank: int = SERVER_RANK) -> AdapterState:
    """Return an adapter as PEFT would start it: random ``A``, zero ``B``."""
    rng = torch.Generator().manual_seed(0)
    return {
        module: LoraFactors(torch.rand(rank, shape[1], generator=rng) - 0.5, torch.zeros(shape[0], rank), scaling(rank))
        for module, shape in SHAPES.items()
    }


def trained(broadcast: Broadcast, seed: int) -> AdapterState:
    """Return factors as if trained from a broadcast: noise on the factors that it lets clients train."""
    rng = torch.Generator().manual_seed(seed)
    adapter: dict[str, LoraFactors] = {}
    for module, factors in broadcast.trainable.items():
        noise = [0.3 * torch.randn(factor.shape, generator=rng) for factor in (factors.A, factors.B)]
        A = factors.A + noise[0] * (broadcast.train_factors != "B")
        B = factors.B + noise[1] * (broadcast.train_factors != "A")
        adapter[module] = LoraFactors(A, B, factors.scaling)
    return adapter


def change_of(broadcast: Broadcast) -> Deltas:
    """Return ``scaling * B @ A`` of each module that a client trains, the frozen branch added, in float64."""
    frozen = broadcast.frozen or {}
    return {
        module: _product(factors) + (_product(frozen[module]) if module in frozen else 0.0)
        for module, factors in broadcast.trainable.items()
    }


def require_equal(found: Deltas, expected: Deltas, rule: str, rtol: float = 1e-5) -> None:
    """Raise unless two changes are equal up to ``rtol`` in the Frobenius norm of each module.

    Raises:
        ContractError: Naming the rule and the module.
    """
    require(list(found) == list(expected), f"{rule}: modules must be {list(expected)}; got {list(found)}")
    for module, delta in expected.items():
        error, norm = float(np.linalg.norm(found[module] - delta)), float(np.linalg.norm(delta))
        require(error <= rtol * norm, f"{rule}: {module} is off by {error:.3g}, its norm is {norm:.3g}")


def require(condition: object, rule: str) -> None:
    """Raise ContractError with the rule unless the condition holds."""
    if not condition:
        raise ContractError(rule)


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


def _product(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.detach().double().numpy() @ factors.A.detach().double().numpy()


@dataclass
class OneShot(Iterable[Update]):
    """Updates that count how often they are read."""

    updates: list[Update]
    num_readers: int = 0

    def __iter__(self) -> Iterator[Update]:
        self.num_readers += 1
        yield from self.updates


def as_type(adapter: AdapterState, dtype: torch.dtype) -> AdapterState:
    """Return a copy of the factors in another type."""
    return {
        module: LoraFactors(
            factors.A.detach().to(dtype, copy=True), factors.B.detach().to(dtype, copy=True), factors.scaling
        )
        for module, factors in adapter.items()
    }


def in_another_gauge(adapter: AdapterState, seed: int) -> AdapterState:
    """Return ``(B M, M^-1 A)`` in float64 for a well-conditioned random ``M``: other factors, the same product."""
    rng = np.random.default_rng(seed)
    turned: dict[str, LoraFactors] = {}
    for module, factors in adapter.items():
        mixing = np.eye(factors.rank) + 0.4 * rng.standard_normal((factors.rank, factors.rank)) / factors.rank
        A = np.linalg.solve(mixing, factors.A.double().numpy())
        B = factors.B.double().numpy() @ mixing
        turned[module] = LoraFactors(torch.tensor(A), torch.tensor(B), factors.scaling)
    return turned


def is_frozen(kind: type[Any]) -> bool:
    """Return whether a class is a frozen dataclass."""
    parameters: Any = getattr(kind, "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)
