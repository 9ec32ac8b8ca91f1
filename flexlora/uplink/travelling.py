"""Says which parts of each module travel in one direction, and makes them whole again at the other end."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.federation.known_rows import mask_of, num_chosen
from flexlora.federation.messages import Broadcast, SparseMask
from flexlora.lora.factors import LoraFactors
from flexlora.uplink.blob import Blob, WireError


@dataclass(frozen=True)
class Parts:
    """Which parts of each module travel in one direction.

    Attributes:
        names: Of ``A``, ``B`` and ``core``.
        mask: The entries of ``B`` that travel; None is all.
    """

    names: tuple[str, ...] = ("A", "B")
    mask: SparseMask | None = None


def returned_parts(sent: Broadcast) -> Parts:
    """Return what travels back of a broadcast: what was trained, without what its client keeps."""
    trained = {"both": ("A", "B"), "A": ("A",), "B": ("B",), "core": ("core",)}[sent.train_factors]
    return Parts(tuple(name for name in trained if name != sent.kept), sent.mask)


def dispatched_parts(broadcast: Broadcast) -> Parts:
    """Return what travels of the trainable branch of a broadcast."""
    names = ("B",) if broadcast.known_A is not None else ("A", "B")
    return Parts((*names, "core") if broadcast.train_factors == "core" else names, broadcast.mask)


def masked(B: Tensor, mask: SparseMask | None, module: str) -> Tensor:
    """Return what travels of a ``B``: all of it, or the chosen values as a list, row by row."""
    return B if mask is None else B[mask_of(mask, module, (B.shape[0], B.shape[1]))]


def unmasked(values: Tensor, mask: SparseMask, module: str, like: Tensor) -> Tensor:
    """Return a ``B`` that is zero but for the values at the chosen entries.

    Raises:
        WireError: Unless there is one value for each.
    """
    chosen = mask_of(mask, module, (like.shape[0], like.shape[1]))
    if values.ndim != 1 or values.shape[0] != int(chosen.sum()):
        raise WireError(f"{module}: a masked B must hold {int(chosen.sum())} values; got {tuple(values.shape)}")
    B = torch.zeros(like.shape, dtype=values.dtype)
    B[chosen] = values
    return B


def part_shapes(sent: LoraFactors, parts: Parts) -> dict[str, tuple[int, ...]]:
    """Return part -> the shape in which it travels of a module that was sent so."""
    shapes: dict[str, tuple[int, ...]] = {
        "A": tuple(sent.A.shape),
        "B": tuple(sent.B.shape),
        "core": (sent.rank, sent.rank),
    }
    if parts.mask is not None:
        shapes["B"] = (num_chosen(parts.mask, (sent.B.shape[0], sent.B.shape[1])),)
    return {name: shapes[name] for name in parts.names}


def put_back(found: Mapping[str, Tensor | None], sent: LoraFactors, scaling: float) -> LoraFactors:
    """Return factors with what did not travel as it was sent."""
    A, B = found.get("A"), found.get("B")
    return LoraFactors(sent.A if A is None else A, sent.B if B is None else B, scaling)


def require_update(blob: Blob) -> None:
    """Raise unless a payload is that of an update."""
    if set(blob.scalings) != {"adapter"}:
        raise WireError(
            f"an adapter was expected, but the payload holds {sorted(blob.scalings)}; it is another message"
        )
