"""Puts the factor that a client keeps between rounds where it trains, and takes it out of what the client sends."""

from typing import Literal

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Broadcast, KeptFactors
from flexlora.lora.factors import AdapterState, LoraFactors


class KeptFactorsError(FlexLoraError, ValueError):
    """A kept factor that does not fit what its client is sent."""


def with_kept(sent: Broadcast, kept: KeptFactors | None) -> Broadcast:
    """Return what a client starts from: the broadcast with the factor that it kept in place.

    Args:
        sent: As it arrived.
        kept: None if the client has kept nothing yet. Modules that are missing start from the broadcast.

    Raises:
        KeptFactorsError: If a kept factor has another shape than the one that was sent.
    """
    if sent.kept is None or not kept:
        return sent
    trainable = {
        module: _in_place(module, own, sent.kept, kept) if module in kept else own
        for module, own in sent.trainable.items()
    }
    return Broadcast(**{**vars(sent), "trainable": trainable})


def kept_of(trained: AdapterState, name: Literal["A", "B"] | None) -> KeptFactors | None:
    """Return the factor of each module that a client keeps, None if it keeps none."""
    return None if name is None else {module: getattr(own, name) for module, own in trained.items()}


def without_kept(trained: AdapterState, sent: Broadcast) -> AdapterState:
    """Return what a client shows of what it trained: the factor that it keeps has the value that was sent."""
    if sent.kept is None:
        return trained
    return {
        module: _in_place(module, own, sent.kept, {module: getattr(sent.trainable[module], sent.kept).to(own.A.dtype)})
        for module, own in trained.items()
    }


def _in_place(module: str, own: LoraFactors, name: Literal["A", "B"], kept: KeptFactors) -> LoraFactors:
    """Return factors of which one is the kept one."""
    factor, current = kept[module], getattr(own, name)
    if factor.shape != current.shape:
        raise KeptFactorsError(
            f"{module}: a kept {name} must have the shape of the one that is sent, {tuple(current.shape)}; the client "
            f"kept {tuple(factor.shape)}. Keep the ranks of a client the same in all rounds"
        )
    return LoraFactors(*((factor, own.B) if name == "A" else (own.A, factor)), own.scaling)
