"""What server and clients exchange: broadcasts, updates, changes and failures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flexlora.lora.factors import AdapterState


@dataclass(frozen=True)
class Broadcast:
    """What the server hands to a client for one round.

    Attributes:
        trainable: Factors the client starts from, at exactly its ranks.
        frozen: Low-rank branch added to the base and not trained (tail folding, stacking, residual methods).
        train_factors: Which factors are trained; methods that freeze or alternate say so here.
    """

    trainable: AdapterState
    frozen: AdapterState | None = None
    train_factors: Literal["both", "A", "B"] = "both"


@dataclass(frozen=True)
class Update:
    """What the server gets back.

    Attributes:
        client_id: The sender, or None once a cohort has been folded into one (secure sum).
        payload: The trained factors.
        weight: Weight in the mean before normalisation, usually the number of training examples.
        metrics: What the client measured: at least ``loss`` (mean over its steps) and ``steps``.
        up_bytes: Size of the serialised payload.
        down_bytes: Size of the serialised broadcast the client received.
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
    """An update that is to count by what it changed against what its client was sent.

    Attributes:
        update: What came back.
        start: What the client was sent and trained from, at the same ranks.
        discount: Factor on the change, 0 to 1; less than 1 for what comes late.
    """

    update: Update
    start: AdapterState
    discount: float = 1.0


@dataclass(frozen=True)
class ClientFailure:
    """A client that was left out of a round.

    Attributes:
        client_id: Who failed.
        stage: ``broadcast``, ``train``, ``upload`` or ``validate``; ``stale`` for an update that came too late.
        reason: One line for a person.
        down_bytes: Bytes it had received by then.
        up_bytes: Bytes of its update that travelled before it was refused.
    """

    client_id: str
    stage: str
    reason: str
    down_bytes: int = 0
    up_bytes: int = 0
