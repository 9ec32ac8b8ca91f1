"""Turns broadcasts and updates into bytes and back.

Tensors are named ``<branch>/<module>.A``, ``.B`` and ``.core``. Only what the other end does not have travels. A known
``A`` stays at home; a masked ``B`` travels as a list of its chosen values, row by row; an update holds what its client
trained and does not keep, and the server puts the rest in from what it sent.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from flexlora.errors import FlexLoraError
from flexlora.federation.known_rows import known_rows, mask_of
from flexlora.federation.messages import Broadcast, SparseMask, TailPenalty, Update
from flexlora.lora.factors import AdapterState, LoraFactors
from flexlora.uplink.blob import Blob, WireError, pack, unpack
from flexlora.uplink.travelling import (
    Parts,
    dispatched_parts,
    masked,
    part_shapes,
    put_back,
    require_update,
    returned_parts,
    unmasked,
)

__all__ = [
    "WireDtype",
    "WireError",
    "decode",
    "decode_broadcast",
    "decode_update",
    "encode",
    "encode_broadcast",
    "encode_update",
    "received_update",
    "update_size",
]

WireDtype = Literal["float32", "bfloat16", "float16"]

_DTYPES: dict[WireDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SHAPES = "shapes"
"""Field of a broadcast: module -> ``[out_features, rank, in_features]``, where the tensors do not tell."""


def encode(adapter: AdapterState, dtype: WireDtype) -> bytes:
    """Return ``adapter`` as bytes with both factors in ``dtype``; beyond 65504 a float16 becomes infinite."""
    return _packed(adapter, {}, Parts(), dtype)


def decode(data: bytes) -> AdapterState:
    """Return the adapter that ``encode`` wrote, in the dtype that travelled.

    Raises:
        WireError: If ``data`` was cut off, altered or written by something else.
    """
    blob = unpack(data)
    require_update(blob)
    return _whole_branch(blob, "adapter")


def encode_update(update: Update, sent: Broadcast, dtype: WireDtype) -> bytes:
    """Return what travels of an update, every tensor in ``dtype``: what its client trained and does not keep.

    Args:
        update: Of the client; what it may have changed besides is left out.
        sent: What the client was sent, as it arrived there.
        dtype: Of the tensors on their way.
    """
    return _packed(update.payload, update.cores or {}, returned_parts(sent), dtype)


def decode_update(data: bytes, update: Update, sent: Broadcast) -> Update:
    """Return ``update`` with the payload and cores that ``encode_update`` wrote, whole again.

    Args:
        data: What arrived.
        update: Everything else that is known of it.
        sent: What the client was sent, as it arrived there.

    Raises:
        WireError: If ``data`` was cut off, altered or written by something else, or does not fit ``sent``.
    """
    blob, parts = unpack(data), returned_parts(sent)
    require_update(blob)
    if parts == Parts():
        return replace(update, payload=_whole_branch(blob, "adapter"), up_bytes=len(data))
    payload: dict[str, LoraFactors] = {}
    cores: dict[str, Tensor] = {}
    for module, scaling in sorted(blob.scalings["adapter"].items()):
        found = {name: blob.tensors.get(f"adapter/{module}.{name}") for name in parts.names}
        if module not in sent.trainable or not _fits(module, found, sent, parts):
            raise WireError(
                f"{module}: the payload must hold {' and '.join(parts.names)} in the shapes that the client was sent"
            )
        B = found.get("B")
        if parts.mask is not None and B is not None:
            found["B"] = unmasked(B, parts.mask, module, sent.trainable[module].B)
        payload[module] = put_back(found, sent.trainable[module], scaling)
        if (core := found.get("core")) is not None:
            cores[module] = core
    return replace(update, payload=payload, cores=cores or None, up_bytes=len(data))


def received_update(update: Update, sent: Broadcast, dtype: WireDtype) -> Update:
    """Return what ``decode_update`` makes of what ``encode_update`` makes of it, without the bytes in between.

    A module that does not fit what was sent is passed on as it is, for ``check_update`` to name.
    """
    parts = returned_parts(sent)
    payload: dict[str, LoraFactors] = {}
    for module, one in sorted(update.payload.items()):
        own = sent.trainable.get(module)
        if parts == Parts() or own is None or (one.A.shape, one.B.shape) != (own.A.shape, own.B.shape):
            payload[module] = LoraFactors(_on_wire(one.A, dtype), _on_wire(one.B, dtype), float(one.scaling))
            continue
        found = {name: _on_wire(getattr(one, name), dtype) for name in parts.names if name != "core"}
        if parts.mask is not None and "B" in found:
            chosen = mask_of(parts.mask, module, (own.B.shape[0], own.B.shape[1]))
            found["B"] = found["B"] * chosen
        payload[module] = put_back(found, own, float(one.scaling))
    cores = None
    if "core" in parts.names:
        cores = {module: _on_wire(core, dtype) for module, core in sorted((update.cores or {}).items())}
    return replace(update, payload=payload, cores=cores, up_bytes=update_size(update, sent, dtype))


def update_size(update: Update | None, sent: Broadcast, dtype: WireDtype) -> int:
    """Return the number of bytes that ``encode_update`` takes: they depend on names, shapes and scalings alone.

    Args:
        update: None is one as it should be, in the shapes that were sent.
        sent: What the client was sent.
        dtype: Of the tensors on their way.
    """
    payload = sent.trainable if update is None else update.payload
    cores = (sent.cores if update is None else update.cores) or {}
    modules = tuple((name, *one.shape, one.rank, one.scaling) for name, one in sorted(payload.items()))
    sizes = tuple((name, *core.shape) for name, core in sorted(cores.items()))
    return _size_of(modules, sizes, returned_parts(sent), dtype)


@lru_cache
def _size_of(
    modules: tuple[tuple[str, int, int, int, float], ...],
    cores: tuple[tuple[str, int, int], ...],
    parts: Parts,
    dtype: WireDtype,
) -> int:
    adapter = {
        name: LoraFactors(torch.zeros(rank, in_features), torch.zeros(out_features, rank), scaling)
        for name, out_features, in_features, rank, scaling in modules
    }
    return len(_packed(adapter, {name: torch.zeros(height, width) for name, height, width in cores}, parts, dtype))


def encode_broadcast(broadcast: Broadcast, dtype: WireDtype) -> bytes:
    """Return what the server sends to one client as bytes, every tensor in ``dtype``."""
    parts = dispatched_parts(broadcast)
    tensors = dict(_tensors("trainable", broadcast.trainable, broadcast.cores or {}, parts, dtype))
    scalings = {"trainable": _scalings(broadcast.trainable)}
    if broadcast.frozen is not None:
        tensors = {**dict(_tensors("frozen", broadcast.frozen, {}, Parts(), dtype)), **tensors}
        scalings["frozen"] = _scalings(broadcast.frozen)
    return pack(Blob(tensors, scalings, _fields(broadcast)))


def decode_broadcast(data: bytes) -> Broadcast:
    """Return the broadcast that ``encode_broadcast`` wrote, in the dtype that travelled; a known ``A`` in float32.

    Raises:
        WireError: If ``data`` was cut off, altered or written by something else.
    """
    blob = unpack(data)
    if "trainable" not in blob.scalings or blob.fields.get("train_factors") not in ("both", "A", "B", "core"):
        raise WireError(
            f"a broadcast was expected, but the payload holds {sorted(blob.scalings)}; it is another message"
        )
    try:
        return _broadcast(blob)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, FlexLoraError):
            raise
        raise WireError(
            f"the payload of {len(data)} bytes is no broadcast that this version of flexlora knows; "
            f"{type(error).__name__}: {error}"
        ) from error


def _broadcast(blob: Blob) -> Broadcast:
    fields, mask, penalty = blob.fields, blob.fields.get("mask"), blob.fields.get("tail_penalty")
    broadcast = Broadcast(
        trainable={},
        frozen=_whole_branch(blob, "frozen") if "frozen" in blob.scalings else None,
        train_factors=fields["train_factors"],
        kept=fields.get("kept"),
        known_A=fields.get("known_A"),
        mask=None if mask is None else SparseMask(float(mask[0]), int(mask[1])),
        tail_penalty=None if penalty is None else TailPenalty(float(penalty[0]), float(penalty[1])),
    )
    if broadcast.known_A is None and broadcast.mask is None:
        trainable = _whole_branch(blob, "trainable")
    else:
        trainable = {
            module: _made(module, blob, broadcast, scaling)
            for module, scaling in sorted(blob.scalings["trainable"].items())
        }
    cores = None
    if broadcast.train_factors == "core":
        cores = {module: blob.tensors[f"trainable/{module}.core"] for module in trainable}
    return replace(broadcast, trainable=trainable, cores=cores)


def _made(module: str, blob: Blob, broadcast: Broadcast, scaling: float) -> LoraFactors:
    """Return the factors of a module of which not all travelled."""
    out_features, rank, in_features = blob.fields[_SHAPES][module]
    known, mask, travelled = broadcast.known_A, broadcast.mask, blob.tensors[f"trainable/{module}.B"]
    whole = torch.zeros(out_features, rank, dtype=travelled.dtype)
    A = blob.tensors[f"trainable/{module}.A"] if known is None else known_rows(known, module, rank, in_features)
    B = travelled if mask is None else unmasked(travelled, mask, module, whole)
    if tuple(A.shape) != (rank, in_features) or tuple(B.shape) != (out_features, rank):
        raise WireError(f"{module}: the payload must hold A [rank, in_features] and B [out_features, rank]")
    return LoraFactors(A, B, scaling)


def _fields(broadcast: Broadcast) -> dict[str, Any]:
    """Return what is no tensor; fields that have their default are left out."""
    fields: dict[str, Any] = {"train_factors": broadcast.train_factors}
    for name in ("kept", "known_A"):
        if (value := getattr(broadcast, name)) is not None:
            fields[name] = value
    if broadcast.mask is not None:
        fields["mask"] = [broadcast.mask.density, broadcast.mask.seed]
    if broadcast.tail_penalty is not None:
        fields["tail_penalty"] = [broadcast.tail_penalty.weight, broadcast.tail_penalty.share]
    if broadcast.known_A is not None or broadcast.mask is not None:
        fields[_SHAPES] = {
            module: [one.shape[0], one.rank, one.shape[1]] for module, one in sorted(broadcast.trainable.items())
        }
    return fields


def _packed(adapter: AdapterState, cores: Mapping[str, Tensor], parts: Parts, dtype: WireDtype) -> bytes:
    tensors = dict(_tensors("adapter", adapter, cores, parts, dtype))
    return pack(Blob(tensors, {"adapter": _scalings(adapter)}, {}))


def _tensors(
    branch: str, adapter: AdapterState, cores: Mapping[str, Tensor], parts: Parts, dtype: WireDtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every tensor of a branch that travels."""
    for module, factors in sorted(adapter.items()):
        found = {"A": factors.A, "B": factors.B} | ({"core": cores[module]} if module in cores else {})
        for name in parts.names:
            if name not in found:
                continue
            tensor = _on_wire(found[name], dtype)
            yield f"{branch}/{module}.{name}", masked(tensor, parts.mask, module) if name == "B" else tensor


def _scalings(adapter: AdapterState) -> dict[str, float]:
    return {module: float(factors.scaling) for module, factors in adapter.items()}


def _on_wire(factor: Tensor, dtype: WireDtype) -> Tensor:
    return factor.detach().to(device="cpu", dtype=_DTYPES[dtype]).contiguous()


def _fits(module: str, found: Mapping[str, Tensor | None], sent: Broadcast, parts: Parts) -> bool:
    """Return whether what travelled of a module has the shapes that were sent."""
    shapes = part_shapes(sent.trainable[module], parts)
    return all(tensor is not None and tuple(tensor.shape) == shapes[name] for name, tensor in found.items())


def _whole_branch(blob: Blob, branch: str) -> dict[str, LoraFactors]:
    """Return an adapter of which both factors travelled."""
    adapter: dict[str, LoraFactors] = {}
    for module, scaling in sorted(blob.scalings[branch].items()):
        A, B = blob.tensors.get(f"{branch}/{module}.A"), blob.tensors.get(f"{branch}/{module}.B")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise WireError(f"{module}: the payload must hold A [rank, in_features] and B [out_features, rank]")
        adapter[module] = LoraFactors(A, B, scaling)
    return adapter
