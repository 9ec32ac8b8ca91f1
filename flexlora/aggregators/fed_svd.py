"""FedSVD: clients train ``B`` alone, the server decomposes ``B A`` to give ``A`` orthonormal rows (arXiv:2505.12805).

All clients hold the same ``A``, so the mean of ``B`` gives the exact mean of the products. With ``w_i = n_i / sum n``

    G+ = s (sum_i w_i B_i) A = U diag(sigma) Vh,        client receives A = Vh[:r], B = U[:, :r] diag(sigma[:r]) / s

Products are added up here, not ``B``: the same for an ``A`` that all share, and right at any precision of the wire.

Ranks may be mixed, which the paper does not have: a client of rank ``r_i`` receives the first ``r_i`` directions, and

    G+ = sum_i w_i s_i B_i Vh[:r_i]

Without training, direction ``j`` then decays by its coverage ``c_j = sum_{i: r_i >= j} w_i`` a round, as in FlexLoRA.

Before anything has been learned clients receive the first rows of the initial ``A`` and a zero ``B``; a direction whose
``sigma`` is 0 gets a fresh row orthogonal to the others.

Known flaw: the rows of ``B A`` are sums of those of ``A``, so while no ``sigma`` is 0 the decomposition turns ``A``
within the span of the initial rows, and the model never learns a direction outside it. It is FFA-LoRA
(arXiv:2403.12313) with a better conditioned ``A``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flexlora.aggregators.base import weighed
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, Scaling
from flexlora.lora.global_change import GlobalChange, global_change_of, sum_products, truncated
from flexlora.lora.product import Spectrum


@dataclass(frozen=True)
class FedSvdState:
    """The decomposed global adapter.

    Attributes:
        change: ``G`` per module at the server's ranks, and the rows of the initial ``A``.
    """

    change: GlobalChange


@aggregation_method("fed_svd")
@dataclass(frozen=True)
class FedSvd:
    """Mean of B over one A, decomposed so that A has orthonormal rows (arXiv:2505.12805).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling

    traits = Traits(linear_in_products=True, sends_both_factors=False)

    def init(self, adapter: AdapterState) -> FedSvdState:
        """Return the change of ``adapter``, none for PEFT's initial one."""
        return FedSvdState(global_change_of(adapter))

    def aggregate(self, state: FedSvdState, updates: Iterable[Update]) -> FedSvdState:
        """Return the decomposed mean of products, cut to the server's ranks, which it exceeds only in foreign ``A``."""
        change = state.change
        sums, total = sum_products(change.shapes, ((u.payload, u.weight) for u in weighed(change.spectra, updates)))
        return FedSvdState(GlobalChange(truncated(sums, change.server_ranks, total), change.initial_rows))

    def broadcast(self, state: FedSvdState, ranks: Mapping[str, int]) -> Broadcast:
        """Return ``T_r(G)`` with orthonormal rows in ``A``, of which the client trains ``B``."""
        return Broadcast(state.change.slices(ranks, self.scaling), train_factors="B")

    def spectra(self, state: FedSvdState) -> Mapping[str, Spectrum]:
        """Return ``G`` per module; nothing of it was discarded."""
        return state.change.spectra
