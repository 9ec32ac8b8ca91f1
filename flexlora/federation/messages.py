"""Defines what server and clients exchange: broadcasts, updates, changes, replies and failures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from flexlora.lora.factors import AdapterState

KeptFactors = Mapping[str, Tensor]
"""What one client keeps between rounds: module path -> the factor, ``A`` or ``B``; other keepers use other names."""


TrainedFactors = Literal["both", "A", "B", "core"]
"""Names what of a broadcast local training moves; see ``Broadcast``."""


@dataclass(frozen=True)
class SparseMask:
    """A random choice of the entries of each ``B``, the same for everyone who draws it (``known_rows.mask_of``).

    Attributes:
        density: Share of the entries that are chosen, above 0 and at most 1; at least one entry of each module is.
        seed: What the choice is drawn from, together with the module's name.
    """

    density: float
    seed: int


@dataclass(frozen=True)
class TailPenalty:
    """A term of the local loss that shrinks the last directions of every module (HetLoRA, arXiv:2401.06432, sec. 3).

    ``weight * sum over modules of ||B[:, k:]||_F * ||A[k:]||_F`` with ``k = max(1, floor(share * rank))``: the first
    direction is never in it.

    Attributes:
        weight: Of the term beside the loss in nats, at least 0 (the paper's lambda).
        share: Of the directions that are left alone, 0 to 1 (the paper's gamma); at least one is.
    """

    weight: float
    share: float


@dataclass(frozen=True)
class Broadcast:
    """What the server hands to a client for one round.

    The client's model is its base plus ``scaling * B @ A`` of ``trainable`` (``scaling * B @ core @ A`` where there are
    ``cores``) plus, where there is one, that of ``frozen``. The weights of the base never change. Local training moves
    what ``train_factors`` names, with a new optimiser each round. Of a broadcast, what the client cannot make itself
    travels to it; of an update, what was trained and does not stay with the client.

    Attributes:
        trainable: Where the client starts. Modules and ranks are those of its rank plan; ranks may be lower if the
            method has the trait ``fewer_directions``, and higher only under ``mask``. What the client returns has the
            same modules, ranks and scalings.
        frozen: Low-rank branch that the client adds to its base during the round and does not train (tail folding,
            stacking, residual methods). Its modules and ranks are free, and it may name modules that ``trainable`` does
            not. It shapes activations and gradients, and scores too: it is part of the model. None adds nothing.
        train_factors: What the optimiser moves. ``both`` is ordinary LoRA. ``A`` moves every ``A`` and leaves every
            ``B`` as it was sent; ``B`` is the reverse (FFA-LoRA). Methods that alternate say ``A`` in one round and
            ``B`` in the next. ``core`` moves ``cores`` and leaves both factors (Fed-SB). What is not trained has no
            gradient and no weight decay; it does not travel back, and the server puts it in from what it sent, so that
            an update always arrives whole. Beware of training ``A`` while ``B`` is zero: its gradient is zero too.
        cores: Module -> ``[rank, rank]``, for exactly the modules of ``trainable``; there if, and only if,
            ``train_factors`` is ``core``.
        kept: A factor that is the client's own (FedSA-LoRA keeps ``B``). Both are trained; this one stays with the
            client between rounds and does not travel back. The client starts from what it kept last time; the factor of
            ``trainable`` is for those that have kept nothing yet. On arrival an update has the broadcast's value in its
            place.
        known_A: Says that ``A`` need not be sent because the client can make it: in every module it is
            ``known_rows.known_rows(known_A, module, rank, in_features)``, drawn from this seed, or the ``identity``.
            ``trainable`` holds ``A`` all the same, in float32, and these very values. None sends ``A``.
        mask: Only the chosen entries of ``B`` are sent, trained and returned; all others must be zero. It needs
            ``train_factors="B"``. With ``known_A="identity"`` and ``rank = in_features``, ``B`` is a sparse change of
            the whole weight (SLoRA's first stage).
        tail_penalty: A term that is added to the local loss; None adds nothing.
    """

    trainable: AdapterState
    frozen: AdapterState | None = None
    train_factors: TrainedFactors = "both"
    cores: Mapping[str, Float[Tensor, "rank rank"]] | None = None
    kept: Literal["A", "B"] | None = None
    known_A: int | Literal["identity"] | None = None
    mask: SparseMask | None = None
    tail_penalty: TailPenalty | None = None

    @property
    def adapter(self) -> AdapterState:
        """The trainable part as a plain adapter: cores are multiplied into ``B``."""
        if self.cores is None:
            return self.trainable
        return {module: own.with_core(self.cores[module]) for module, own in self.trainable.items()}


@dataclass(frozen=True)
class Update:
    """What a client returns after training, or one step of the uplink makes of a whole cohort.

    Attributes:
        client_id: The sender; None once an uplink step has folded a cohort into one update (secure sum).
        payload: The factors, in the types that travelled. What was not trained, or stays with the client, has the value
            that the broadcast had.
        weight: Weight in the mean, not yet normalised; usually the number of training examples.
        metrics: What the client measured: at least ``loss`` (mean over its steps) and ``steps``.
        up_bytes: Size of the serialised payload.
        down_bytes: Size of the serialised broadcast that the client received.
        train_seconds: Wall time of local training.
        cores: The trained cores, if ``train_factors`` was ``core``.
        kept: Module -> the factor that the client keeps for its next round (``Broadcast.kept``). It never reaches a
            server: whoever simulates clients stores it for them. Not part of ``up_bytes``.
        packet: The payload as it travels, where it is compressed and cannot be written again from what it says.
        is_held: Whether the client holds what it trained for the further phases of the round, and has sent only word of
            it: ``payload`` and ``metrics`` are empty.
    """

    client_id: str | None
    payload: AdapterState
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    up_bytes: int = 0
    down_bytes: int = 0
    train_seconds: float = 0.0
    cores: Mapping[str, Float[Tensor, "rank rank"]] | None = None
    kept: KeptFactors | None = None
    packet: bytes | None = None
    is_held: bool = False


@dataclass(frozen=True)
class Reply:
    """What a client answers in a further phase of a round.

    Attributes:
        client_id: The sender.
        data: What travelled.
    """

    client_id: str
    data: bytes


@dataclass(frozen=True)
class CohortFactors:
    """All that a secure sum says of a cohort whose factors were added up, direction by direction.

    Attributes:
        weight: Sum of the weights ``w_i``.
        sums: Module -> ``A``: ``sum_i w_i A_i``, ``B``: ``sum_i w_i s_i B_i``, scaling 1, float64; what a client's rank
            does not reach counts as zero.
        weight_by_rank: Module -> rank -> weight of the clients that have this rank there.
    """

    weight: float
    sums: AdapterState
    weight_by_rank: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class CohortProducts:
    """All that a secure sum says of a cohort whose products were added up.

    Attributes:
        weight: Sum of the weights ``w_i``.
        sums: Module -> factors of ``sum_i w_i s_i B_i A_i``, or of what a sketch tells of it, float64.
        weight_by_rank: Module -> rank -> weight of the clients that have this rank there.
    """

    weight: float
    sums: AdapterState
    weight_by_rank: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Change:
    """An update together with what its client started from, so that only the difference counts.

    Servers that do not wait for all clients use it: a late update was trained from an older state of the server, and
    what it adds to the state of today is how far the client moved.

    Attributes:
        update: What the client returned.
        start: What the client was sent and trained from, at the same ranks.
        discount: What the difference is multiplied by, 0 to 1; below 1 for late updates.
    """

    update: Update
    start: AdapterState
    discount: float = 1.0


@dataclass(frozen=True)
class ClientFailure:
    """A client that a round goes on without.

    Attributes:
        client_id: The client that failed.
        stage: Where it failed: ``broadcast``, ``train``, ``upload`` or ``validate``; ``stale`` if its update came too
            late to count; the kind of a further phase that it did not answer.
        reason: One line for a person.
        down_bytes: Bytes that it had received by then.
        up_bytes: Bytes of its update that had travelled before it was refused.
    """

    client_id: str
    stage: str
    reason: str
    down_bytes: int = 0
    up_bytes: int = 0
