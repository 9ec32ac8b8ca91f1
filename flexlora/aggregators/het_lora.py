"""HetLoRA: padded factors averaged by the norms of their products; clients whose tail shrinks lose rank.

    S_i = ||s_i B_i A_i||_F,   A+ = sum_i (S_i / sum S) pad(A_i),   B+ = sum_i (S_i / sum S) pad(s_i B_i)

module by module; a client of rank ``r`` receives ``A+[:r]`` and ``B+[:, :r] / s`` (arXiv:2401.06432, sec. 4). Weights
do not depend on the amount of data. In a module in which all norms are zero nothing changes.

Self-pruning: clients add ``penalty * sum over modules of ||B[:, k:]|| ||A[k:]||`` to their loss, ``k`` being
``max(1, floor(gamma r))``. Where that sum, taken of what came back, is below that of what was sent, the client is cut
to ``k`` directions in every module, in this round's mean and from then on.

Known flaws: cross terms and gauge as in ``zero_pad``, and an untrained direction decays by ``c_j^2`` a round, ``c_j``
being the share of the norms at clients that hold it. The server needs each single update.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import floor

from flexlora.aggregators.nested import first_directions, folded, spectra_of, within_server_ranks
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits, option
from flexlora.federation.messages import Broadcast, TailPenalty, Update
from flexlora.lora.factor_mean import mean_factors
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum


@dataclass(frozen=True)
class HetLoraState:
    """The averaged adapter, and which clients have been pruned.

    Attributes:
        adapter: At the largest rank, in float64, with scaling 1: ``B`` carries it.
        num_prunings: Client id -> how often it was cut; those never cut are not in it.
    """

    adapter: Mapping[str, LoraFactors]
    num_prunings: Mapping[str, int]


@aggregation_method("het_lora")
@dataclass(frozen=True)
class HetLora:
    """Zero padding with norm weights and self-pruning (arXiv:2401.06432).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling
    norm_weights: bool = option(
        True, "Weigh clients by the norm of their change in each module; false weighs them by their examples."
    )
    self_pruning: bool = option(True, "Cut the rank of a client whose last directions have shrunk in training.")
    gamma: float = option(0.99, "Share of a client's rank that the penalty and a pruning leave alone.", gt=0, le=1)
    penalty: float = option(
        0.001, "Weight of the clients' penalty on their last directions, beside the loss in nats (lambda).", ge=0
    )

    @property
    def traits(self) -> Traits:
        """What others must know of this method."""
        return Traits(
            per_client=True,
            fewer_directions=self.self_pruning,
            counts_examples=not self.norm_weights,
            takes_own_training=self.penalty == 0,
        )

    def init(self, adapter: AdapterState) -> HetLoraState:
        """Return the initial adapter, whose ranks are the largest a client may have; nobody is pruned."""
        return HetLoraState(folded(adapter), {})

    def aggregate(self, state: HetLoraState, updates: Iterable[Update]) -> HetLoraState:
        """Return the mean of the padded factors, and who has been pruned.

        Raises:
            AggregationError: If an update has a larger rank than the server's adapter.
        """
        num_prunings = dict(state.num_prunings)
        adapter = mean_factors(
            state.adapter,
            self._pruned(state, updates, num_prunings),
            importance=LoraFactors.norm if self.norm_weights else None,
        )
        return HetLoraState(adapter, dict(sorted(num_prunings.items())))

    def broadcast(self, state: HetLoraState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the first rows and columns in float32, the client's own scaling divided out of ``B``.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        # A client of rank 1 has no direction to give away.
        has_tail = self.penalty > 0 and max(ranks.values(), default=1) > 1
        penalty = TailPenalty(self.penalty, self.gamma) if has_tail else None
        return Broadcast(first_directions(state.adapter, ranks, self.scaling), tail_penalty=penalty)

    def broadcast_to(self, state: HetLoraState, ranks: Mapping[str, int], client_id: str) -> Broadcast:
        """Return what ``broadcast`` does at the ranks that the client has been pruned to."""
        left = dict(ranks)
        for _ in range(state.num_prunings.get(client_id, 0)):
            left = {module: self._next_rank(rank) for module, rank in left.items()}
        return self.broadcast(state, left)

    def spectra(self, state: HetLoraState) -> dict[str, Spectrum]:
        """Return the decomposed product of the averaged factors; nothing of it was discarded."""
        return spectra_of(state.adapter)

    def _next_rank(self, rank: int) -> int:
        """Return ``floor(gamma rank)``, at least 1; 0.29 of 100 is 29, as it is for the clients' penalty."""
        return max(1, floor(self.gamma * rank + 1e-9))

    def _pruned(
        self, state: HetLoraState, updates: Iterable[Update], num_prunings: dict[str, int]
    ) -> Iterator[tuple[AdapterState, float]]:
        """Yield what is left of each update, with its weight; prunings are counted in ``num_prunings``."""
        for update in within_server_ranks(state.adapter, updates):
            payload, client_id = update.payload, update.client_id
            if update.weight == 0:
                continue
            if self.self_pruning and client_id is not None and self._has_shrunk(state, payload):
                num_prunings[client_id] = num_prunings.get(client_id, 0) + 1
                payload = {module: one.truncate(self._next_rank(one.rank)) for module, one in payload.items()}
            yield payload, 1.0 if self.norm_weights else update.weight

    def _has_shrunk(self, state: HetLoraState, payload: AdapterState) -> bool:
        """Return whether the last directions, over all modules, are smaller than those that the client was sent."""
        ranks = {module: factors.rank for module, factors in payload.items()}
        sent = first_directions(state.adapter, ranks, self.scaling)
        return self._tail(payload) < self._tail(sent)

    def _tail(self, adapter: AdapterState) -> float:
        """Return ``sum over modules of ||B[:, k:]|| ||A[k:]||``, ``k`` being the rank that a pruning leaves."""
        total = 0.0
        for factors in adapter.values():
            k = self._next_rank(factors.rank)
            B, A = factors.B.detach()[:, k:].double(), factors.A.detach()[k:].double()
            total += float((B.square().sum() * A.square().sum()).sqrt())
        return total
