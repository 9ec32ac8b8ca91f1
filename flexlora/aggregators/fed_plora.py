"""Fed-PLoRA: clients train some of the server's rank-1 modules and add the others without training them.

With ``R`` persistent modules ``b_j a_j^T``, of which client ``i`` draws ``r_i``, the set ``K_i`` (arXiv:2602.16936):

    client i runs   W0 + sum_{j not in K_i} b_j a_j^T  +  sum_{j in K_i} b_j a_j^T       (folded + trained)
    a_j+ = sum_{i: j in K_i} w_i a_ij / sum_{i: j in K_i} w_i,   b_j+ likewise,   w_i = n_i / sum n

Every client starts from the whole model, whatever its rank. A module that nobody trained stays as it was. Here the
folded part is the frozen branch of the broadcast, so that the base is never changed; what is still zero is not sent.
``b_j`` carries the scaling, so that what is averaged is what each client's model used. ``K_i`` is drawn anew in each
round for each client and each linear module.

A model of a smaller rank is scored and exported as the best approximation of that rank, the rest in its frozen branch.

Known flaws: within a direction the mean of factors has cross terms, ``sum_i w_i (b_ij - b_j+)(a_ij - a_j+)^T``, and
depends on how a client's product is split into factors. The paper's bound of this noise needs factors of bounded norm.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flexlora.aggregators.base import require_rank_within, weighed
from flexlora.aggregators.direction_choice import chosen_directions, seed_of, sender_of
from flexlora.aggregators.nested import folded, spectra_of
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits, option
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.global_change import branch_factors
from flexlora.lora.product import Spectrum


@dataclass(frozen=True)
class FedPLoraState:
    """The rank-1 modules, and what clients' choices are drawn from.

    Attributes:
        adapter: Module -> row ``j`` of ``A`` and column ``j`` of ``B`` are ``a_j`` and ``b_j``; float64, scaling 1.
        seed: Of the choices.
        num_rounds: How many rounds have been aggregated.
    """

    adapter: Mapping[str, LoraFactors]
    seed: int
    num_rounds: int


@aggregation_method("fed_plora")
@dataclass(frozen=True)
class FedPLora:
    """Random rank-1 modules trained by each client, the others folded in, means per module (arXiv:2602.16936).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling
    selection: Literal["random", "first"] = option(
        "random", "Which directions a client trains: random ones each round (the paper's), or always the first."
    )

    traits = Traits(folds_tail=True, per_client=True, keeps_directions=False)

    def init(self, adapter: AdapterState) -> FedPLoraState:
        """Return the initial adapter, whose ranks are the numbers of rank-1 modules."""
        return FedPLoraState(folded(adapter), seed_of(adapter), 0)

    def aggregate(self, state: FedPLoraState, updates: Iterable[Update]) -> FedPLoraState:
        """Return the mean of each rank-1 module over those who trained it.

        Raises:
            AggregationError: If an update has a larger rank than the server's adapter, or no sender.
        """
        A = {module: torch.zeros_like(own.A) for module, own in state.adapter.items()}
        B = {module: torch.zeros_like(own.B) for module, own in state.adapter.items()}
        weights = {module: own.A.new_zeros(own.rank) for module, own in state.adapter.items()}
        for update in weighed(state.adapter, updates):
            client_id = sender_of(update)
            for module, factors in update.payload.items():
                chosen = self._chosen(state, client_id, module, factors.rank)
                trained = factors.to(torch.float64).with_scaling(1.0)
                A[module][chosen] += update.weight * trained.A
                B[module][:, chosen] += update.weight * trained.B
                weights[module][chosen] += update.weight
        adapter = {
            module: LoraFactors(
                torch.where(weights[module][:, None] > 0, A[module] / weights[module][:, None], own.A),
                torch.where(weights[module] > 0, B[module] / weights[module], own.B),
                1.0,
            )
            for module, own in state.adapter.items()
        }
        return FedPLoraState(adapter, state.seed, state.num_rounds + 1)

    def broadcast_to(self, state: FedPLoraState, ranks: Mapping[str, int], client_id: str) -> Broadcast:
        """Return the directions that this client trains in the coming round, and all others as the frozen branch.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        trainable: dict[str, LoraFactors] = {}
        frozen: dict[str, LoraFactors] = {}
        for module, own in state.adapter.items():
            others = own.B.any(0)
            if module in ranks:
                chosen = self._chosen(state, client_id, module, ranks[module])
                others[chosen] = False
                picked = LoraFactors(own.A[chosen], own.B[:, chosen], own.scaling)
                trainable[module] = picked.with_scaling(self.scaling(ranks[module])).to(torch.float32)
            if others.any():
                frozen[module] = LoraFactors(own.A[others], own.B[:, others], own.scaling).to(torch.float32)
        return Broadcast(trainable, frozen or None)

    def broadcast(self, state: FedPLoraState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the best approximation of these ranks and, frozen, what is left of the whole model.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        trainable: dict[str, LoraFactors] = {}
        spectra = self.spectra(state)
        for module, rank in sorted(ranks.items()):
            own = state.adapter[module]
            require_rank_within(own, module, rank)
            trainable[module] = spectra[module].factors(rank, self.scaling(rank), spare=own.A).to(torch.float32)
        rest = {module: spectrum.below(ranks.get(module, 0)) for module, spectrum in spectra.items()}
        return Broadcast(trainable, branch_factors(rest))

    def spectra(self, state: FedPLoraState) -> dict[str, Spectrum]:
        """Return the decomposed sum of the rank-1 modules; nothing of it was discarded."""
        return spectra_of(state.adapter)

    def _chosen(self, state: FedPLoraState, client_id: str, module: str, rank: int) -> Tensor:
        """Return the directions that a client of this rank trains in the coming round, ascending."""
        server = state.adapter[module]
        require_rank_within(server, module, rank)
        if self.selection == "first":
            return torch.arange(rank)
        return chosen_directions(state.seed, state.num_rounds, client_id, module, server.rank, rank)
