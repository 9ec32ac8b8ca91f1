"""Checks the messages of a round: a broadcast before it is sent, an update when it has arrived."""

from collections.abc import Mapping
from math import isfinite, prod

import torch
from torch import Tensor

from flexlora.errors import FlexLoraError
from flexlora.federation.known_rows import known_rows, mask_of
from flexlora.federation.messages import Broadcast, SparseMask, Update
from flexlora.lora.factors import LoraFactors

MOST_EXAMPLES = 2**53
"""Largest weight of a reply. With a larger one, a single client could make the sum of a round infinite."""


class UpdateError(FlexLoraError, ValueError):
    """An update that is not what its client was asked for."""


class BroadcastError(FlexLoraError, ValueError):
    """A broadcast that its own fields contradict, or that is not what was asked for: a mistake of the method."""


def check_broadcast(broadcast: Broadcast, ranks: Mapping[str, int], *, fewer_directions: bool) -> None:
    """Raise unless a broadcast can be sent to clients of these ranks, and means what its fields say.

    Args:
        broadcast: What the method made.
        ranks: Module path -> rank that was asked for.
        fewer_directions: Whether the method may send lower ranks.

    Raises:
        BroadcastError: Naming the module, the rule and the value.
    """
    if list(broadcast.trainable) != sorted(ranks):
        raise BroadcastError(
            f"the modules of a broadcast must be those asked for, sorted: {sorted(ranks)}; got "
            f"{list(broadcast.trainable)}"
        )
    _check_fields(broadcast)
    for module, factors in broadcast.trainable.items():
        rank, asked = factors.rank, ranks[module]
        if broadcast.mask is None and not (1 <= rank <= asked if fewer_directions else rank == asked):
            rule = f"1..{asked}" if fewer_directions else f"{asked}"
            raise BroadcastError(f"{module}: the rank of a broadcast must be {rule}, as asked for; got {rank}")
        if broadcast.known_A is not None and not torch.equal(
            factors.A, known_rows(broadcast.known_A, module, rank, factors.shape[1])
        ):
            raise BroadcastError(
                f"{module}: A must be known_rows({broadcast.known_A!r}, ...) in float32 where known_A says so; send "
                "these rows or leave known_A out"
            )
        if broadcast.mask is not None and _outside(broadcast.mask, module, factors.B):
            raise BroadcastError(f"{module}: B must be zero outside the mask")
        core = (broadcast.cores or {}).get(module)
        if core is not None and tuple(core.shape) != (rank, rank):
            raise BroadcastError(f"{module}: the core must have shape ({rank}, {rank}); got {tuple(core.shape)}")


def _check_fields(broadcast: Broadcast) -> None:
    """Raise unless the fields of a broadcast suit one another."""
    trains, cores, penalty = broadcast.train_factors, broadcast.cores, broadcast.tail_penalty
    if (trains == "core") != (cores is not None) or (cores is not None and sorted(cores) != list(broadcast.trainable)):
        raise BroadcastError(
            f"cores must be there, one per module, if train_factors is 'core' and only then; got train_factors "
            f"{trains!r} and {'no cores' if cores is None else f'cores of {sorted(cores)}'}"
        )
    if broadcast.mask is not None and trains != "B":
        raise BroadcastError(f"a mask chooses entries of B, so train_factors must be 'B'; got {trains!r}")
    if broadcast.kept is not None and trains != "both":
        raise BroadcastError(
            f"a client that keeps {broadcast.kept} must train both factors, or nothing travels back or nothing new is "
            f"kept; got train_factors {trains!r}"
        )
    if penalty is not None and not (isfinite(penalty.weight) and penalty.weight >= 0 and 0 <= penalty.share <= 1):
        raise BroadcastError(
            f"the tail penalty needs a finite weight of at least 0 and a share in 0..1; got {penalty.weight} and "
            f"{penalty.share}"
        )
    if penalty is not None and trains not in ("both", "A", "B"):
        raise BroadcastError(f"the tail penalty is about A and B, which train_factors {trains!r} does not train")


def _outside(mask: SparseMask, module: str, B: Tensor) -> bool:
    """Return whether a ``B`` has values outside the mask."""
    return bool(B[~mask_of(mask, module, (B.shape[0], B.shape[1]))].any())


def check_update(
    update: Update, sent: Broadcast, shapes: Mapping[str, tuple[int, int]], dtype: str = "float32"
) -> None:
    """Raise unless an update is what a client that was sent this had to return, and small enough to be sent on.

    The Frobenius norm of each factor and core must stay below the square root of the largest float32 (1.8e19) and that
    of each change below the square root of the largest ``dtype`` (256 for float16). One finite but huge update would
    otherwise make every later broadcast infinite; the root leaves as much room again for what the change is multiplied
    by on its way out, such as ``1 / scaling``. The limit is what numbers can hold, not what is plausible.

    Args:
        update: What arrived, whole again.
        sent: Its modules, ranks and scalings must come back.
        shapes: ``(out_features, in_features)`` of each of these modules.
        dtype: Name of the type in which the server will send what it makes of the update.

    Raises:
        UpdateError: Naming the module, the rule and the value.
    """
    adapter, expected = update.payload, sent.trainable
    cores = {} if sent.train_factors != "core" else update.cores or {}
    for module in sorted(expected.keys() - adapter.keys()):
        raise UpdateError(f"{module}: every module of the broadcast must be returned; this one is missing")
    for module in sorted(adapter.keys() - expected.keys()):
        raise UpdateError(f"{module}: only modules of the broadcast may be returned; this one is surplus")
    for module, own in sorted(expected.items()):
        factors, rank = adapter[module], own.rank
        if factors.rank != rank:
            raise UpdateError(f"{module}: rank must be {rank}, as it was sent; got {factors.rank}")
        if factors.B.shape[1] != rank or factors.shape != shapes[module]:
            raise UpdateError(
                f"{module}: B @ A must have shape {shapes[module]}; got B {tuple(factors.B.shape)}, "
                f"A {tuple(factors.A.shape)}"
            )
        if factors.scaling != own.scaling:
            raise UpdateError(f"{module}: scaling must be {own.scaling}, as it was sent; got {factors.scaling}")
        parts = {"A": factors.A, "B": factors.B}
        if sent.train_factors == "core":
            core = cores.get(module)
            if core is None or tuple(core.shape) != (rank, rank):
                raise UpdateError(
                    f"{module}: a core of shape ({rank}, {rank}) must be returned; got "
                    f"{'none' if core is None else tuple(core.shape)}"
                )
            parts["core"] = core
        _check_finite(module, parts)
        _check_norms(module, factors, parts, dtype)


def _check_finite(module: str, parts: Mapping[str, Tensor]) -> None:
    for name, part in parts.items():
        num_bad = int((~part.isfinite()).sum())
        if num_bad:
            raise UpdateError(
                f"{module}: {name} must be finite; got {num_bad} NaN or infinite values of {part.numel()}"
            )


def _check_norms(module: str, factors: LoraFactors, parts: Mapping[str, Tensor], dtype: str) -> None:
    """Raise unless finite factors and their change are below the norms that ``check_update`` allows."""
    norms = {name: float(part.to(torch.float64).square().sum().sqrt()) for name, part in parts.items()}
    limit = torch.finfo(torch.float32).max ** 0.5
    for name, norm in norms.items():
        if norm >= limit:
            raise UpdateError(
                f"{module}: the norm of {name} must be below {limit:.4g}, the root of the largest float32; "
                f"got {norm:.4g}"
            )
    limit = torch.finfo(getattr(torch, dtype)).max ** 0.5
    # The product of norms bounds the norm of the product; only where that does not settle it is the QR worth its time.
    if abs(factors.scaling) * prod(norms.values()) >= limit:
        whole = factors if "core" not in parts else factors.to(torch.float64).with_core(parts["core"])
        if (norm := whole.norm()) >= limit:
            raise UpdateError(
                f"{module}: the norm of the change must be below {limit:.4g}, the root of the largest {dtype}; "
                f"got {norm:.4g}"
            )
