"""Sets a method up to be checked, with four clients of mixed ranks."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flexlora.aggregators.contract_client import reply, with_own_factors
from flexlora.aggregators.contract_compare import Deltas, change_of
from flexlora.aggregators.settings import Traits, traits_of
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SHAPES: Mapping[str, tuple[int, int]] = {"attn.k_proj": (6, 20), "attn.q_proj": (20, 20), "mlp.down_proj": (20, 31)}
"""Module path -> ``(out_features, in_features)``: wide, square and wide, none with the same sides as another."""

SERVER_RANK = 5
SCALINGS = (Scaling("constant_alpha", 16.0), Scaling("constant_ratio", 2.0), Scaling("rslora", 4.0))


@dataclass(frozen=True)
class Case:
    """A method with its options, and clients to try it on.

    Attributes:
        method: The class.
        options: As a configuration would give them.
        scaling: The scaling rule.
        shapes: Module path -> ``(out_features, in_features)``.
        client_ranks: The rank of each client in every module; the largest is the server's. Empty is four clients whose
            ranks also differ between modules. Methods for one rank get the largest for all.
    """

    method: type[Any]
    options: Mapping[str, Any]
    scaling: Scaling = SCALINGS[0]
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=lambda: SHAPES)
    client_ranks: tuple[int, ...] = ()

    @property
    def aggregator(self) -> Any:
        """The method, constructed."""
        return self.method(scaling=self.scaling, **self.options)

    @property
    def traits(self) -> Traits:
        """The traits of the method."""
        return traits_of(self.aggregator)

    @property
    def server_rank(self) -> int:
        """The rank that the server starts with."""
        return max(self.client_ranks, default=SERVER_RANK)

    @property
    def global_rank(self) -> int:
        """The rank of the server's global adapter: that which its traits name, or the one that it starts with."""
        return self.server_rank if self.traits.needs_one_rank else self.traits.server_rank or self.server_rank

    def all_modules(self, rank: int | None = None) -> dict[str, int]:
        """Return one rank for every module, the server's unless another is given."""
        return dict.fromkeys(self.shapes, self.server_rank if rank is None else rank)

    def plans(self) -> list[dict[str, int]]:
        """Return the ranks of the clients: mixed, and not the same in every module, where the method can do that."""
        num_clients = len(self.client_ranks) or 4
        if self.traits.needs_one_rank:
            return [self.all_modules()] * num_clients
        if self.client_ranks:
            return [self.all_modules(rank) for rank in self.client_ranks]
        mixed = {module: 2**index for index, module in enumerate(sorted(self.shapes))}
        return [self.all_modules(2), mixed, self.all_modules(), self.all_modules(1)]

    def start(self) -> Any:
        """Return the first state."""
        return self.aggregator.init(initial_adapter(self.scaling, self.server_rank, self.shapes))

    def broadcast(self, state: Any, ranks: Mapping[str, int] | None = None, client_id: str = "client-0") -> Broadcast:
        """Return what a client receives: its own broadcast if the method makes one for each; the server's rank."""
        ranks = ranks or self.all_modules()
        if self.traits.per_client:
            return self.aggregator.broadcast_to(state, ranks, client_id)
        return self.aggregator.broadcast(state, ranks)

    def update(
        self, state: Any, ranks: Mapping[str, int], client_id: str, weight: float, seed: int, step: float = 0.3
    ) -> Update:
        """Return what a client sends after training from ``state``; with step 0 it returns what it was sent."""
        return reply(self.broadcast(state, ranks, client_id), client_id, weight, seed, step)

    def updates(self, state: Any, seed: int = 0, step: float = 0.3) -> list[Update]:
        """Return what clients with weights 10, 20, 30, ... send after training from ``state``."""
        return [
            self.update(state, plan, f"client-{i}", 10.0 * (i + 1), 10 * seed + i, step)
            for i, plan in enumerate(self.plans())
        ]

    def after_a_round(self, seed: int = 0) -> Any:
        """Return the state after one round."""
        state = self.start()
        return self.aggregator.aggregate(state, self.updates(state, seed))

    def deltas(self, state: Any, ranks: Mapping[str, int] | None = None) -> Deltas:
        """Return the change of a model of these ranks, trained and frozen part together, as it is scored and exported.

        A factor that clients keep is always the same one here.
        """
        return change_of(with_own_factors(self.aggregator.broadcast(state, ranks or self.all_modules())))


def all_modules(rank: int) -> dict[str, int]:
    """Return one rank for every module of ``SHAPES``."""
    return dict.fromkeys(SHAPES, rank)


def initial_adapter(
    scaling: Scaling = SCALINGS[0], rank: int = SERVER_RANK, shapes: Mapping[str, tuple[int, int]] = SHAPES
) -> AdapterState:
    """Return an adapter as PEFT would start it: random ``A``, zero ``B``."""
    rng = torch.Generator().manual_seed(0)
    return {
        module: LoraFactors(torch.rand(rank, shape[1], generator=rng) - 0.5, torch.zeros(shape[0], rank), scaling(rank))
        for module, shape in sorted(shapes.items())
    }


@dataclass
class OneShot(Iterable[Update]):
    """Updates that count how often they are read."""

    updates: list[Update]
    num_readers: int = 0

    def __iter__(self) -> Iterator[Update]:
        self.num_readers += 1
        yield from self.updates
