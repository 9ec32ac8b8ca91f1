"""FSLoRA: clients train random columns of ``B`` and rows of ``A``, and the server adds the mean of their changes.

With ``K_i`` a random set of ``k_i`` of the server's ``R`` directions, ``S_i`` diagonal with ``R / k_i`` on ``K_i`` and
0 elsewhere, so that ``E S_i = I``, and ``w_i = n_i / sum n`` (arXiv:2501.19389, federated sketching LoRA):

    client i runs   W0 + s B S_i A   and trains   B[:, K_i], A[K_i]
    (B, A)+ = (B, A) + sum_i w_i (dB_i, dA_i)        changes are zero outside K_i

In the messages of this package the client has rank ``k_i`` and its own scaling ``s_i``: its ``B`` carries ``R / k_i``
and the ratio of scalings, ``B_i = c_i B[:, K_i]`` with ``c_i = (R / k_i) (s / s_i)``, and the server divides its change
by the same number. Under ``lora_alpha / rank`` it is 1: ``B[:, K_i]`` itself is trained, as in the paper. Under another
rule a step of the client's optimiser on ``B_i`` is ``1 / c_i`` of that step on ``B``. ``K_i`` is drawn anew in each
round for each client and each linear module. The paper's server may also use Adam on the changes; this one adds them.

The global model is that of ``S = I``. For smaller ranks it is scored and exported as the best approximation of that
rank, because a random sketch of it is right on average only.

Known flaws: a client of a small rank runs few directions, each ``R / k_i`` times too large, so the model it trains is
unbiased but far from the global one; the mean of factors has cross terms and depends on how products are split.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.aggregators.base import require_rank_within, weighed
from flexlora.aggregators.direction_choice import chosen_directions, seed_of, sender_of
from flexlora.aggregators.nested import folded, spectra_of
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum, spectrum_of


@dataclass(frozen=True)
class FsLoraState:
    """The server's factors, and what clients' sketches are drawn from.

    Attributes:
        adapter: Float64, with scaling 1: ``B`` carries it.
        seed: Of the sketches.
        num_rounds: How many rounds have been aggregated.
    """

    adapter: Mapping[str, LoraFactors]
    seed: int
    num_rounds: int


@aggregation_method("fs_lora")
@dataclass(frozen=True)
class FsLora:
    """Random columns and rows trained by each client, the mean of their changes added (arXiv:2501.19389).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling

    traits = Traits(per_client=True, keeps_directions=False)

    def init(self, adapter: AdapterState) -> FsLoraState:
        """Return the initial adapter, whose ranks are the largest a client may have."""
        return FsLoraState(folded(adapter), seed_of(adapter), 0)

    def aggregate(self, state: FsLoraState, updates: Iterable[Update]) -> FsLoraState:
        """Return the factors with the weighted mean of the clients' changes added; who lacks a module changes none.

        Raises:
            AggregationError: If an update has a larger rank than the server's adapter, or no sender.
        """
        A = {module: torch.zeros_like(own.A) for module, own in state.adapter.items()}
        B = {module: torch.zeros_like(own.B) for module, own in state.adapter.items()}
        total = 0.0
        for update in weighed(state.adapter, updates):
            total += update.weight
            for module, factors in update.payload.items():
                chosen = _chosen(state, sender_of(update), module, factors.rank)
                # What was sent, with the rounding of float32: an echo is then a change of exactly zero.
                sent = _returned(sketched(state.adapter[module], chosen, factors.scaling), state.adapter[module])
                trained = _returned(factors, state.adapter[module])
                A[module][chosen] += update.weight * (trained.A - sent.A)
                B[module][:, chosen] += update.weight * (trained.B - sent.B)
        adapter = {
            module: LoraFactors(own.A + A[module] / total, own.B + B[module] / total, own.scaling)
            for module, own in state.adapter.items()
        }
        return FsLoraState(adapter, state.seed, state.num_rounds + 1)

    def broadcast_to(self, state: FsLoraState, ranks: Mapping[str, int], client_id: str) -> Broadcast:
        """Return this client's sketch of the global factors for the coming round.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        return Broadcast(
            {
                module: sketched(state.adapter[module], _chosen(state, client_id, module, rank), self.scaling(rank))
                for module, rank in sorted(ranks.items())
            }
        )

    def broadcast(self, state: FsLoraState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the global factors (``S = I``), for smaller ranks the best approximation of their product.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        trainable: dict[str, LoraFactors] = {}
        for module, rank in sorted(ranks.items()):
            own = state.adapter[module]
            require_rank_within(own, module, rank)
            factors = own if rank == own.rank else spectrum_of(own).factors(rank, 1.0, spare=own.A)
            trainable[module] = factors.with_scaling(self.scaling(rank)).to(torch.float32)
        return Broadcast(trainable)

    def spectra(self, state: FsLoraState) -> dict[str, Spectrum]:
        """Return the decomposed product of the global factors; nothing of it was discarded."""
        return spectra_of(state.adapter)


def sketched(server: LoraFactors, chosen: Tensor, scaling: float) -> LoraFactors:
    """Return ``B S A`` at the rank of the sketch, in float32: over all sets of directions, its mean is ``B A``.

    Args:
        server: At rank ``R``.
        chosen: The ``k`` directions of the sketch.
        scaling: Of the client.
    """
    B = server.B[:, chosen] * (server.rank / len(chosen))
    return LoraFactors(server.A[chosen], B, server.scaling).with_scaling(scaling).to(torch.float32)


def _returned(factors: LoraFactors, server: LoraFactors) -> LoraFactors:
    """Return a client's factors in the units of the server's, float64, which undoes ``sketched``."""
    own = factors.to(torch.float64).with_scaling(server.scaling)
    return LoraFactors(own.A, own.B * (factors.rank / server.rank), server.scaling)


def _chosen(state: FsLoraState, client_id: str, module: str, rank: int) -> Tensor:
    """Return the directions that a client of this rank trains in the coming round, ascending."""
    server = state.adapter[module]
    require_rank_within(server, module, rank)
    return chosen_directions(state.seed, state.num_rounds, client_id, module, server.rank, rank)
