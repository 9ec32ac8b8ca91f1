"""FLoRIST: fold the leading directions of the mean of products, start every client afresh (arXiv:2506.09199).

With ``P_i = s_i B_i A_i``, ``w_i = n_i / sum n`` and per module

    sum_i w_i P_i = U diag(sigma) Vh,   p = min{p: sum_{j <= p} sigma_j^2 >= tau sum_j sigma_j^2}
    G+ = G + U[:, :p] diag(sigma[:p]) Vh[:p],    client i receives G+ and trains from A = initial rows, B = 0

The paper decomposes both stacks of factors and the small core between them; the kernel here finds the same numbers by
the cheapest way that it can certify. With ``tau`` 1 nothing is left out, and after the first round the model is that of
FlexLoRA before it is cut to the clients' ranks. The paper offers ``tau`` as the way from accurate to small; the default
here is ours.

The base weights never change here: ``G`` is a frozen branch. The paper's clients remember what was folded and receive
rank ``p``. Ours remember nothing and receive all that was ever folded, each round, at most the shorter side of the
module. What is sent is what is counted.

Known flaws: what is left out is gone, up to ``sqrt(1 - tau)`` of the norm of a round's mean, also if there is but one
client; a fresh ``B`` has to be learned again each round.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from flexlora.aggregators.base import weighed
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits, option
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, Scaling
from flexlora.lora.global_change import (
    GlobalChange,
    branch_factors,
    folded,
    global_change_of,
    sum_products,
    truncated,
)
from flexlora.lora.product import ProductSum, Spectrum, add_spectrum
from flexlora.lora.spectrum import directions_holding


@dataclass(frozen=True)
class FloristState:
    """What was folded so far.

    Attributes:
        change: ``G`` per module with the norm of what the last round left out as its tail, and the rows that clients
            start from.
    """

    change: GlobalChange


@aggregation_method("florist")
@dataclass(frozen=True)
class Florist:
    """Leading directions of the mean of products, folded; clients start afresh (arXiv:2506.09199).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling
    tau: float = option(
        0.99, "Share of the squared norm of a round's mean that is folded in each module; 1 is all.", gt=0, le=1
    )

    traits = Traits(linear_in_products=True, folds_tail=True, folds_into_base=True, keeps_directions=False)

    def init(self, adapter: AdapterState) -> FloristState:
        """Return the state with the change of ``adapter`` folded, none for PEFT's initial one."""
        return FloristState(global_change_of(adapter))

    def aggregate(self, state: FloristState, updates: Iterable[Update]) -> FloristState:
        """Return the state with the leading directions of the mean of products added."""
        change = state.change
        sums, total = sum_products(change.shapes, ((u.payload, u.weight) for u in weighed(change.spectra, updates)))
        kept = {
            module: mean.truncate(directions_holding(mean, self.tau))
            for module, mean in truncated(sums, None, total).items()
        }
        steps = {module: add_spectrum(ProductSum(*one.shape), one, one.S) for module, one in kept.items()}
        spectra = {
            module: replace(spectrum, tail=kept[module].tail)
            for module, spectrum in folded(change.spectra, steps).items()
        }
        return FloristState(GlobalChange(spectra, change.initial_rows))

    def broadcast(self, state: FloristState, ranks: Mapping[str, int]) -> Broadcast:
        """Return fresh factors at these ranks, and all that was folded, also in modules that the client lacks."""
        return Broadcast(state.change.fresh(ranks, self.scaling), branch_factors(state.change.spectra))

    def spectra(self, state: FloristState) -> Mapping[str, Spectrum]:
        """Return all that was folded, with the norm of what the last round left out."""
        return state.change.spectra
