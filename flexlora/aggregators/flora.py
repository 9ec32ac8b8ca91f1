"""FLoRA: stack the clients' adapters, fold the stack into the model, start every client afresh (arXiv:2409.05976).

With ``P_i = s_i B_i A_i`` and ``w_i = n_i / sum n``

    G+ = G + sum_i w_i P_i,        client i receives G+ and trains from A = fresh rows, B = 0

``[B_1 ... B_n]`` times the stack of ``w_i s_i A_i`` is the sum over the clients, so nothing is lost, and ranks may be
mixed. The paper weighs ``A`` alone and adds the stack to the base weights at one scaling, which is right where all
``s_i`` are equal; here each product has its own.

The base weights never change here: ``G`` is a frozen branch. The paper's clients remember what was folded and receive
the stack of one round, rank ``sum r_i``. Ours remember nothing and receive all that was ever folded, each round: its
rank grows by up to ``sum r_i`` a round and ends at the shorter side of the module, where both factors together are up
to twice as large as the weight. What is sent is what is counted.

The paper draws ``A`` anew each round (``redraw_seed``: from a seed that the client gets in its place, so that ``A``
does not travel); by default each round starts from the initial rows.

Known flaws: the downlink; every client sees the whole round; a fresh ``B`` has to be learned again each round, which
costs where there are few local steps.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from flexlora.aggregators.base import weighed
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits, option
from flexlora.federation.known_rows import known_rows
from flexlora.federation.messages import Broadcast, Update
from flexlora.federation.streams import stream_seed
from flexlora.lora.factors import AdapterState, Scaling
from flexlora.lora.global_change import GlobalChange, branch_factors, folded, global_change_of, sum_products
from flexlora.lora.product import Spectrum


@dataclass(frozen=True)
class FloraState:
    """What was folded so far.

    Attributes:
        change: ``G`` per module, and the rows of the initial ``A``.
        num_rounds: Rounds that were folded.
    """

    change: GlobalChange
    num_rounds: int


@aggregation_method("flora")
@dataclass(frozen=True)
class Flora:
    """Sum of stacked adapters, folded into a frozen branch; clients start afresh (arXiv:2409.05976).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling
    redraw_seed: int | None = option(
        None,
        "Seed from which A is drawn anew for each round after the first; null takes the initial rows each time.",
        ge=0,
    )

    @property
    def traits(self) -> Traits:
        """What others must know of this method."""
        return Traits(
            linear_in_products=True,
            folds_tail=True,
            folds_into_base=True,
            keeps_directions=False,
            sends_both_factors=self.redraw_seed is None,
        )

    def init(self, adapter: AdapterState) -> FloraState:
        """Return the state with the change of ``adapter`` folded, none for PEFT's initial one."""
        return FloraState(global_change_of(adapter), num_rounds=0)

    def aggregate(self, state: FloraState, updates: Iterable[Update]) -> FloraState:
        """Return the state with the mean of products added, every direction of it."""
        change = state.change
        sums, total = sum_products(change.shapes, ((u.payload, u.weight) for u in weighed(change.spectra, updates)))
        folded_change = GlobalChange(folded(change.spectra, sums, total), change.initial_rows)
        return FloraState(folded_change, state.num_rounds + 1)

    def broadcast(self, state: FloraState, ranks: Mapping[str, int]) -> Broadcast:
        """Return fresh factors at these ranks, and all that was folded, also in modules that the client lacks."""
        fresh, branch = state.change.fresh(ranks, self.scaling), branch_factors(state.change.spectra)
        if self.redraw_seed is None or state.num_rounds == 0:
            return Broadcast(fresh, branch)
        known_A = stream_seed(self.redraw_seed, "redrawn_rows", state.num_rounds)
        redrawn = {
            module: replace(factors, A=known_rows(known_A, module, factors.rank, factors.shape[1]))
            for module, factors in fresh.items()
        }
        return Broadcast(redrawn, branch, known_A=known_A)

    def spectra(self, state: FloraState) -> Mapping[str, Spectrum]:
        """Return all that was folded; nothing of it was discarded."""
        return state.change.spectra
