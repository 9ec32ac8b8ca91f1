"""Turns factors into one safetensors blob and back, and checks what arrived.

Tensors are named ``<branch>/<module>.A`` and ``.B``. The one metadata entry is JSON with the scalings (written so that
they read back exactly) and a checksum over everything, because safetensors itself notices a cut blob but not a flipped
bit. Equal content gives equal bytes.
"""

import json
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

WireDtype = Literal["float32", "bfloat16", "float16"]

_DTYPES: dict[WireDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_METADATA_KEY = "flexlora"
_VERSION = 1


class WireError(FlexLoraError, ValueError):
    """Bytes that are not what ``encode`` wrote."""


class UpdateError(FlexLoraError, ValueError):
    """An update that is not what its client was asked for."""


def encode(adapter: AdapterState, dtype: WireDtype) -> bytes:
    """Return ``adapter`` as bytes with both factors in ``dtype``; beyond 65504 a float16 becomes infinite."""
    return _pack({"adapter": adapter}, dtype, {})


def encoded_size(adapter: AdapterState, dtype: WireDtype) -> int:
    """Return the number of bytes that ``encode`` takes: they depend on modules, shapes and scalings, not on values."""
    return _size_of(tuple((name, *one.shape, one.rank, one.scaling) for name, one in sorted(adapter.items())), dtype)


@lru_cache
def _size_of(modules: tuple[tuple[str, int, int, int, float], ...], dtype: WireDtype) -> int:
    adapter = {
        name: LoraFactors(torch.zeros(rank, in_features), torch.zeros(out_features, rank), scaling)
        for name, out_features, in_features, rank, scaling in modules
    }
    return len(encode(adapter, dtype))


def received(adapter: AdapterState, dtype: WireDtype) -> AdapterState:
    """Return what ``decode`` makes of what ``encode`` makes of ``adapter``, without the bytes in between."""
    return {
        name: LoraFactors(_on_wire(one.A, dtype), _on_wire(one.B, dtype), float(one.scaling))
        for name, one in sorted(adapter.items())
    }


def decode(data: bytes) -> AdapterState:
    """Return the adapter that ``encode`` wrote, in the dtype that travelled.

    Raises:
        WireError: If ``data`` was cut off, altered or written by something else.
    """
    branches, _ = _unpack(data)
    if branches.keys() != {"adapter"}:
        raise WireError(f"an adapter was expected, but the payload holds {sorted(branches)}; it is another message")
    return branches["adapter"]


def encode_broadcast(broadcast: Broadcast, dtype: WireDtype) -> bytes:
    """Return what the server sends to one client as bytes, every factor in ``dtype``."""
    branches = {"trainable": broadcast.trainable}
    if broadcast.frozen is not None:
        branches["frozen"] = broadcast.frozen
    return _pack(branches, dtype, {"train_factors": broadcast.train_factors})


def decode_broadcast(data: bytes) -> Broadcast:
    """Return the broadcast that ``encode_broadcast`` wrote, in the dtype that travelled.

    Raises:
        WireError: If ``data`` was cut off, altered or written by something else.
    """
    branches, fields = _unpack(data)
    train_factors = fields.get("train_factors")
    if "trainable" not in branches or train_factors not in ("both", "A", "B"):
        raise WireError(f"a broadcast was expected, but the payload holds {sorted(branches)}; it is another message")
    return Broadcast(branches["trainable"], branches.get("frozen"), train_factors)


def check_update(
    adapter: AdapterState,
    expected_ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    scaling: Scaling,
    dtype: WireDtype = "float32",
) -> None:
    """Raise unless ``adapter`` is what a client of these ranks had to return, and small enough to be sent on.

    The Frobenius norm of each factor must stay below the square root of the largest float32 (1.8e19) and that of each
    change below the square root of the largest ``dtype`` (256 for float16). One finite but huge update would otherwise
    make every later broadcast infinite; the root leaves as much room again for what the change is multiplied by on its
    way out, such as ``1 / scaling``. The limit is what numbers can hold, not what is plausible.

    Args:
        adapter: What arrived.
        expected_ranks: Rank per module; the modules must be exactly these.
        shapes: ``(out_features, in_features)`` of each of these modules.
        scaling: The rule that gives the scaling for a rank.
        dtype: Type in which the server will send what it makes of the update.

    Raises:
        UpdateError: Naming the module, the rule and the value.
    """
    for module in sorted(expected_ranks.keys() - adapter.keys()):
        raise UpdateError(f"{module}: every module of the rank plan must be returned; this one is missing")
    for module in sorted(adapter.keys() - expected_ranks.keys()):
        raise UpdateError(f"{module}: only modules of the rank plan may be returned; this one is surplus")
    for module, rank in sorted(expected_ranks.items()):
        factors = adapter[module]
        if factors.rank != rank:
            raise UpdateError(f"{module}: rank must be {rank}, as in the rank plan; got {factors.rank}")
        if factors.B.shape[1] != rank or factors.shape != shapes[module]:
            raise UpdateError(
                f"{module}: B @ A must have shape {shapes[module]}; got B {tuple(factors.B.shape)}, "
                f"A {tuple(factors.A.shape)}"
            )
        if factors.scaling != scaling(rank):
            raise UpdateError(
                f"{module}: scaling must be {scaling(rank)} ({scaling.policy} at rank {rank}); got {factors.scaling}"
            )
        for name, factor in (("A", factors.A), ("B", factors.B)):
            num_bad = int((~factor.isfinite()).sum())
            if num_bad:
                raise UpdateError(
                    f"{module}: {name} must be finite; got {num_bad} NaN or infinite values of {factor.numel()}"
                )
        _check_norms(module, factors, dtype)


def _check_norms(module: str, factors: LoraFactors, dtype: WireDtype) -> None:
    """Raise unless finite factors and their change are below the norms that ``check_update`` allows."""
    norms = {
        name: float(factor.to(torch.float64).square().sum().sqrt())
        for name, factor in (("A", factors.A), ("B", factors.B))
    }
    limit = torch.finfo(torch.float32).max ** 0.5
    for name, norm in norms.items():
        if norm >= limit:
            raise UpdateError(
                f"{module}: the norm of {name} must be below {limit:.4g}, the root of the largest float32; "
                f"got {norm:.4g}"
            )
    limit = torch.finfo(_DTYPES[dtype]).max ** 0.5
    # The product of norms bounds the norm of the product; only where that does not settle it is the QR worth its time.
    if abs(factors.scaling) * norms["A"] * norms["B"] >= limit and (norm := factors.norm()) >= limit:
        raise UpdateError(
            f"{module}: the norm of the change must be below {limit:.4g}, the root of the largest {dtype}; "
            f"got {norm:.4g}"
        )


def _pack(branches: Mapping[str, AdapterState], dtype: WireDtype, fields: Mapping[str, str]) -> bytes:
    """Return named adapters and text fields as one safetensors blob."""
    tensors: dict[str, Tensor] = {}
    scalings: dict[str, dict[str, float]] = {}
    for branch, adapter in sorted(branches.items()):
        scalings[branch] = {module: float(adapter[module].scaling) for module in sorted(adapter)}
        for module in sorted(adapter):
            for name, factor in (("A", adapter[module].A), ("B", adapter[module].B)):
                tensors[f"{branch}/{module}.{name}"] = _on_wire(factor, dtype)
    content: dict[str, object] = {"version": _VERSION, "scalings": scalings, "fields": dict(sorted(fields.items()))}
    content["checksum"] = _checksum(content, tensors)
    # One entry only: safetensors writes several metadata entries in an order that changes from run to run.
    return safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps(content, sort_keys=True)})


def _on_wire(factor: Tensor, dtype: WireDtype) -> Tensor:
    return factor.detach().to(device="cpu", dtype=_DTYPES[dtype]).contiguous()


def _unpack(data: bytes) -> tuple[dict[str, dict[str, LoraFactors]], dict[str, str]]:
    """Return the adapters and text fields of a blob after checking it."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        content = json.loads(header["__metadata__"][_METADATA_KEY])
        checksum = content.pop("checksum")
        intact = content["version"] == _VERSION and checksum == _checksum(content, tensors)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise WireError(
            f"the payload of {len(data)} bytes cannot be read; it was cut off, altered or not written by flexlora "
            f"({type(error).__name__}: {error})"
        ) from error
    if not intact:
        raise WireError(
            f"the payload of {len(data)} bytes does not match its checksum or version; it was altered on the way or "
            "written by another version of flexlora"
        )
    return _branches(tensors, content["scalings"]), cast("dict[str, str]", content["fields"])


def _branches(
    tensors: Mapping[str, Tensor], scalings: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, LoraFactors]]:
    """Return the adapters that the tensors belong to, checked to be whole."""
    branches: dict[str, dict[str, LoraFactors]] = {}
    for branch, by_module in scalings.items():
        branches[branch] = {}
        for module, scaling in sorted(by_module.items()):
            A, B = tensors.get(f"{branch}/{module}.A"), tensors.get(f"{branch}/{module}.B")
            if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
                raise WireError(f"{module}: the payload must hold A [rank, in_features] and B [out_features, rank]")
            branches[branch][module] = LoraFactors(A, B, scaling)
    return branches


def _checksum(content: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of the metadata and of name, dtype, shape and bytes of every tensor."""
    checksum = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), checksum)
    # Of fixed width, so that the size of a message depends on its shapes alone.
    return f"{checksum:08x}"
