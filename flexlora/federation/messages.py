"""Defines what server and clients exchange: broadcasts, updates, changes and failures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flexlora.lora.factors import AdapterState


@dataclass(frozen=True)
class Broadcast:
    """What the server hands to a client for one round.

    The client's model is its base plus ``scaling * B @ A`` of ``trainable`` plus, where there is one, that of
    ``frozen``. The weights of the base never change. Local training moves the factors that ``train_factors`` names,
    with a new optimiser each round; the client then returns ``trainable`` as it is by then, both factors of every
    module. All of a broadcast travels to the client, and only ``trainable`` travels back.

    Attributes:
        trainable: Where the client starts. Modules, ranks and scalings are exactly those of its rank plan, and what it
            returns must have the same.
        frozen: Low-rank branch that the client adds to its base during the round and does not train (tail folding,
            stacking, residual methods). Its modules and ranks are free, and it may name modules that ``trainable`` does
            not. It shapes activations and gradients, and scores too: it is part of the model. None adds nothing.
        train_factors: Which factors of ``trainable`` the optimiser moves. ``both`` is ordinary LoRA. ``A`` moves every
            ``A`` and leaves every ``B`` as it was sent; ``B`` is the reverse (FFA-LoRA). Methods that alternate say
            ``A`` in one round and ``B`` in the next. A factor that is not trained has no gradient and no weight decay
            and travels back as it came, so payloads have one size whatever is trained. Beware of training ``A`` while
            ``B`` is zero: the gradient of ``A`` is zero too.
    """

    trainable: AdapterState
    frozen: AdapterState | None = None
    train_factors: Literal["both", "A", "B"] = "both"


@dataclass(frozen=True)
class Update:
    """What a client returns after training, or one step of the uplink makes of a whole cohort.

    Attributes:
        client_id: The sender; None once an uplink step has folded a cohort into one update (secure sum).
        payload: The trained factors, in the types that travelled.
        weight: Weight in the mean, not yet normalised; usually the number of training examples.
        metrics: What the client measured: at least ``loss`` (mean over its steps) and ``steps``.
        up_bytes: Size of the serialised payload.
        down_bytes: Size of the serialised broadcast that the client received.
        train_seconds: Wall time of local training.
    """

    client_id: str | None
    payload: AdapterState
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    up_bytes: int = 0
    down_bytes: int = 0
    train_seconds: float = 0.0


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
            late to count.
        reason: One line for a person.
        down_bytes: Bytes that it had received by then.
        up_bytes: Bytes of its update that had travelled before it was refused.
    """

    client_id: str
    stage: str
    reason: str
    down_bytes: int = 0
    up_bytes: int = 0
