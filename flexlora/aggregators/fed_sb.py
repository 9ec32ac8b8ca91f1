"""Fed-SB: ``B`` and ``A`` are fixed and orthonormal, only the square core between them is trained, sent and averaged.

With ``C_i`` the core of client ``i`` and ``w_i = n_i / sum n`` (arXiv:2502.15436):

    client i runs   W0 + s_i B C_i A        C+ = sum_i w_i C_i,   so that   B C+ A = sum_i w_i B C_i A   exactly

The paper takes ``B`` and ``A`` from the singular vectors of a first update of full fine-tuning. Clients of this
package train LoRA, so here the first ``warmup_rounds`` are ordinary LoRA with FlexLoRA's mean of products,
``G = U diag(S) Vh``; then ``B = U``, ``A = Vh``, both completed to orthonormal bases of the server's rank where ``G``
has fewer directions, and the core starts at ``diag(S)``: nothing is lost. With ``refresh_every`` such a round of LoRA,
started from ``B C A`` and with FlexLoRA's error compensation, follows every so many rounds of cores.

Clients of smaller ranks (not in the paper) hold leading blocks: ``B[:, :r_i]``, ``A[:r_i]``, ``C[:r_i, :r_i] / s_i``.
An entry of the core is averaged over those who hold it, and entries that nobody held stay:

    C+[j, l] = sum_{i: r_i > max(j, l)} w_i s_i C_i[j, l] / sum_{i: r_i > max(j, l)} w_i

Known flaws: the change can never leave the subspace that the first round chose, and a small rank sees a block of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.aggregators.base import AggregationError, require_rank_within, weighed
from flexlora.aggregators.flexlora import FlexLora, FlexLoraState
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits, option
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum, spectrum_of


@dataclass(frozen=True)
class FixedSubspace:
    """What the change of one module is made of between two choices of bases: ``B @ core @ A``.

    Attributes:
        bases: ``B`` with orthonormal columns and ``A`` with orthonormal rows, as far as there is room for as many;
            float64, scaling 1.
        core: Float64.
    """

    bases: LoraFactors
    core: Float[Tensor, "rank rank"]


@dataclass(frozen=True)
class FedSbState:
    """The global change, decomposed, and the subspaces that it lives in.

    Attributes:
        num_rounds: How many rounds have been aggregated.
        whole: The global change as the state of FlexLoRA, which the LoRA rounds start from.
        subspaces: Per module; empty before a round of LoRA.
    """

    num_rounds: int
    whole: FlexLoraState
    subspaces: Mapping[str, FixedSubspace]


@aggregation_method("fed_sb")
@dataclass(frozen=True)
class FedSb:
    """Orthonormal B and A from a first round of LoRA, then the mean of small cores (arXiv:2502.15436).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling
    warmup_rounds: int = option(1, "Rounds of ordinary LoRA (FlexLoRA) that choose B and A.", ge=1)
    refresh_every: int | None = option(
        None, "Rounds of cores between two rounds of LoRA that choose B and A anew; null keeps the first ones.", ge=1
    )

    @property
    def traits(self) -> Traits:
        """What others must know of this method."""
        return Traits(sends_both_factors=False, takes_own_training=False, least_rounds=self.warmup_rounds + 1)

    def init(self, adapter: AdapterState) -> FedSbState:
        """Return the state before the first LoRA round."""
        return FedSbState(0, self._lora.init(adapter), {})

    def aggregate(self, state: FedSbState, updates: Iterable[Update]) -> FedSbState:
        """Return the mean of products and new bases after a round of LoRA, the mean of cores after any other.

        Raises:
            AggregationError: If a round of cores brings an update without cores or of a larger rank than the server's.
        """
        num_rounds = state.num_rounds + 1
        if self._trains_lora(state.num_rounds):
            whole = self._lora.aggregate(state.whole, updates)
            if self._trains_lora(num_rounds):
                return FedSbState(num_rounds, whole, {})
            return FedSbState(num_rounds, whole, {module: _subspace(whole, module) for module in whole.spectra})
        subspaces = _with_mean_cores(state.subspaces, updates)
        spectra = {module: spectrum_of(_factors(own)) for module, own in subspaces.items()}
        whole = FlexLoraState(spectra, state.whole.initial_rows, state.whole.max_ranks)
        return FedSbState(num_rounds, whole, {} if self._trains_lora(num_rounds) else subspaces)

    def broadcast(self, state: FedSbState, ranks: Mapping[str, int]) -> Broadcast:
        """Return what FlexLoRA sends in a round of LoRA; in any other, leading blocks of the bases and of the core.

        Raises:
            AggregationError: If a rank exceeds the server's in a round of cores.
        """
        if self._trains_lora(state.num_rounds):
            return self._lora.broadcast(state.whole, ranks)
        trainable: dict[str, LoraFactors] = {}
        cores: dict[str, Tensor] = {}
        for module, rank in sorted(ranks.items()):
            own = state.subspaces[module]
            require_rank_within(own.bases, module, rank)
            scaling, block = self.scaling(rank), own.core[:rank, :rank]
            bases = own.bases.truncate(rank)
            trainable[module] = LoraFactors(bases.A, bases.B, scaling).to(torch.float32)
            cores[module] = LoraFactors(bases.A, block, own.bases.scaling).with_scaling(scaling).to(torch.float32).B
        return Broadcast(trainable, train_factors="core", cores=cores)

    def spectra(self, state: FedSbState) -> Mapping[str, Spectrum]:
        """Return the decomposed global change; its tail is what the server's rank cut off a round of LoRA."""
        return state.whole.spectra

    @property
    def _lora(self) -> FlexLora:
        """The method of the LoRA rounds. Before the first there is nothing that error compensation could add back."""
        return FlexLora(self.scaling, error_compensation=True)

    def _trains_lora(self, num_rounds: int) -> bool:
        """Return whether the round after this many is one of ordinary LoRA."""
        since = num_rounds - self.warmup_rounds
        return since < 0 or (self.refresh_every is not None and since % (self.refresh_every + 1) == self.refresh_every)


def _with_mean_cores(subspaces: Mapping[str, FixedSubspace], updates: Iterable[Update]) -> dict[str, FixedSubspace]:
    """Return the subspaces with every entry of a core averaged over those who held it."""
    sums = {module: torch.zeros_like(own.core) for module, own in subspaces.items()}
    weights = {module: torch.zeros_like(own.core) for module, own in subspaces.items()}
    for update in weighed(subspaces, updates):
        if update.cores is None or update.cores.keys() != update.payload.keys():
            raise AggregationError(
                f"a round of cores needs one for each module of an update; client {update.client_id!r} sent "
                f"{sorted(update.cores or ())} with {sorted(update.payload)}"
            )
        for module, core in update.cores.items():
            sent = update.payload[module]
            require_rank_within(subspaces[module].bases, module, core.shape[0])
            block = LoraFactors(sent.A, core, sent.scaling).to(torch.float64).with_scaling(1.0).B
            sums[module][: sent.rank, : sent.rank] += update.weight * block
            weights[module][: sent.rank, : sent.rank] += update.weight
    return {
        module: FixedSubspace(own.bases, torch.where(weights[module] > 0, sums[module] / weights[module], own.core))
        for module, own in subspaces.items()
    }


def _subspace(whole: FlexLoraState, module: str) -> FixedSubspace:
    """Return the singular vectors of the global change as bases, and its singular values as the core."""
    spectrum, rank = whole.spectra[module], whole.max_ranks[module]
    values = torch.nn.functional.pad(spectrum.S, (0, rank - len(spectrum.S)))
    A = _completed(spectrum.Vh, rank, whole.initial_rows[module])
    B = _completed(spectrum.U.T, rank, None).T.contiguous()
    return FixedSubspace(LoraFactors(A, B, 1.0), torch.diag(values))


def _completed(
    rows: Float[Tensor, "k features"], rank: int, spare: Float[Tensor, "spare features"] | None
) -> Float[Tensor, "{rank} features"]:
    """Return ``rank`` rows that begin with the orthonormal ``rows``, orthonormal as long as there is room."""
    if rows.shape[0] == 0:  # There is no direction to complete from.
        row = rows.new_ones(1, rows.shape[1]) if spare is None else spare[:1].to(rows)
        rows = torch.nn.functional.normalize(row)
    ones = torch.ones(rows.shape[0], dtype=rows.dtype)
    return Spectrum(rows.T, ones, rows).factors(rank, 1.0, spare=spare).A.contiguous()


def _factors(subspace: FixedSubspace) -> LoraFactors:
    """Return the change as two factors, the core multiplied into ``B``."""
    bases = subspace.bases
    return LoraFactors(bases.A, bases.B @ subspace.core, bases.scaling)
