"""FedSA-LoRA: clients share ``A`` and each keeps its own ``B``.

    A+[j] = sum_{i: r_i >= j} w_i A_i[j] / W_j,   client i runs W + s_i B_i A+[:r_i]

with ``w_i = n_i / sum n`` and ``W_j = sum_{i: r_i >= j} w_i``. Both factors are trained; ``B_i`` starts at zero, stays
with client ``i`` between its rounds and never travels (arXiv:2410.01463). The paper has one rank; for several, a client
holds the first rows of ``A`` and each row is averaged over its holders.

There is no global change: what a client learned is ``s_i B_i A+``, and without a ``B_i`` of one's own the model is the
base. A broadcast therefore has a zero ``B``. Scored on tasks of no client, or exported, it is exactly the base model;
only scores of clients that kept a ``B`` say anything. What it is worth to a new client is a better start of ``A``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from flexlora.aggregators.nested import first_directions, folded, payloads_of, spectra_of, within_server_ranks
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factor_mean import mean_factors
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum


@dataclass(frozen=True)
class FedSaLoraState:
    """The shared ``A`` at the largest rank, in float64, beside a ``B`` that is zero."""

    adapter: Mapping[str, LoraFactors]


@aggregation_method("fedsa_lora")
@dataclass(frozen=True)
class FedSaLora:
    """Mean of ``A``; every client keeps its own ``B`` (arXiv:2410.01463).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling

    traits = Traits(personal=True, sends_both_factors=False)

    def init(self, adapter: AdapterState) -> FedSaLoraState:
        """Return the ``A`` of the initial adapter, whose ranks are the largest a client may have."""
        return FedSaLoraState(
            {
                module: LoraFactors(factors.A, torch.zeros_like(factors.B), factors.scaling)
                for module, factors in folded(adapter).items()
            }
        )

    def aggregate(self, state: FedSaLoraState, updates: Iterable[Update]) -> FedSaLoraState:
        """Return the mean of every row of ``A`` over its holders; one that nobody holds stays.

        Raises:
            AggregationError: If an update has a larger rank than the server's adapter.
        """
        payloads = payloads_of(within_server_ranks(state.adapter, updates))
        return FedSaLoraState(mean_factors(state.adapter, payloads, over="holders", averaged="A"))

    def broadcast(self, state: FedSaLoraState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the first rows of ``A`` in float32, with a zero ``B`` for those who have none of their own.

        Without the client's ``B`` its change is zero: it scores as the base model does.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        return Broadcast(first_directions(state.adapter, ranks, self.scaling), kept="B")

    def spectra(self, state: FedSaLoraState) -> dict[str, Spectrum]:
        """Return no directions in any module: there is no global change."""
        return spectra_of(state.adapter)
