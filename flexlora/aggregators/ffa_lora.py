"""FFA-LoRA: ``A`` stays as it was drawn, clients train and send ``B`` alone, whose mean is exact.

    A = A_0,   B+[:, j] = sum_{i: r_i >= j} w_i s_i B_i[:, j] / W_j

with ``w_i = n_i / sum n`` and ``W_j = sum_{i: r_i >= j} w_i``; a client of rank ``r`` trains ``B[:, :r]`` over
``A_0[:r]``. At one rank ``B+ A_0 = sum_i w_i s_i B_i A_0``, the mean of the products, with no cross term
(arXiv:2403.12313). At mixed ranks it is that mean over the holders of each direction.

``A_0`` is PEFT's random initial ``A``, drawn from a seed that is sent with every broadcast, so that no ``A`` travels
in either direction. The seed is taken from the initial adapter, which depends on the run's.

Known flaw: nothing is learned outside the rows of ``A_0``, so it can trail methods that train both factors where a
small rank is a limit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from flexlora.aggregators.direction_choice import seed_of
from flexlora.aggregators.nested import first_directions, payloads_of, spectra_of, within_server_ranks
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits
from flexlora.federation.known_rows import known_rows
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factor_mean import mean_factors
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum


@dataclass(frozen=True)
class FfaLoraState:
    """The adapter and the seed of its ``A``.

    Attributes:
        adapter: At the largest rank, in float64, with scaling 1: ``B`` carries it.
        seed: What ``A`` was drawn from.
    """

    adapter: Mapping[str, LoraFactors]
    seed: int


@aggregation_method("ffa_lora")
@dataclass(frozen=True)
class FfaLora:
    """Mean of ``B`` over one ``A`` that all share and nobody trains or sends (arXiv:2403.12313).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling

    traits = Traits(sends_both_factors=False)

    def init(self, adapter: AdapterState) -> FfaLoraState:
        """Return the drawn ``A`` at the ranks of ``adapter``, the largest a client may have, and a zero ``B``."""
        seed = seed_of(adapter)
        factors: dict[str, LoraFactors] = {}
        for module in sorted(adapter):
            rank, (out_features, in_features) = adapter[module].rank, adapter[module].shape
            A = known_rows(seed, module, rank, in_features).to(adapter[module].A.device, torch.float64)
            factors[module] = LoraFactors(A, A.new_zeros(out_features, rank), 1.0)
        return FfaLoraState(factors, seed)

    def aggregate(self, state: FfaLoraState, updates: Iterable[Update]) -> FfaLoraState:
        """Return the mean of every column of ``B`` over its holders; one that nobody holds stays.

        Raises:
            AggregationError: If an update has a larger rank than the server's adapter.
        """
        payloads = payloads_of(within_server_ranks(state.adapter, updates))
        return FfaLoraState(mean_factors(state.adapter, payloads, over="holders", averaged="B"), state.seed)

    def broadcast(self, state: FfaLoraState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the first columns of ``B`` to be trained, over the first rows of ``A``, in float32.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        trainable = first_directions(state.adapter, ranks, self.scaling)
        return Broadcast(trainable, train_factors="B", known_A=state.seed)

    def spectra(self, state: FfaLoraState) -> dict[str, Spectrum]:
        """Return the decomposed change; nothing of it was discarded."""
        return spectra_of(state.adapter)
