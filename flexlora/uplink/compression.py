"""Sends of an update what training changed, rounded at random to 8 or 4 bits.

Both ends know what the client was sent, so only the changes of its factors travel: they are far smaller than the
factors, and so are the steps of the grid. ``A`` is rounded direction by direction (its rows), ``B`` likewise (its
columns). Rounding is independent for ``A`` and ``B`` and right in the mean for each, so the product of what arrives is
right in the mean too: ``E[(B + b)(A + a)] = B A``.

With error feedback a client remembers what of its product has not arrived, ``E = s B A - s B' A'`` (``A'``, ``B'`` as
they arrived), as a change of rank at most twice its own. Next time it adds to ``B`` what ``E`` says in the directions
of the new ``A``: ``B <- B + X / s`` with the ``X`` that minimises ``|E - X A|^2 + d^2 sum_j |X_j|^2 |A_j|^2``, where
``d^2`` is the relative variance of rounding. The second term is the noise that rounding ``X`` will add; without it,
nearly parallel rows of ``A`` make ``X`` so large that the memory grows from round to round. What ``X`` cannot say stays
remembered. The memory is a product, so it does not depend on coordinates, which the server changes between rounds.
"""

# The stubs of torch.linalg are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from flexlora.federation.messages import Broadcast, KeptFactors, Update
from flexlora.lora.factors import AdapterState, LoraFactors
from flexlora.lora.product import ProductSum, add_product, decompose
from flexlora.uplink.blob import Blob, WireError, pack, unpack
from flexlora.uplink.quantise import Bits, Quantised, levels_of, quantised, quantised_shapes, restored
from flexlora.uplink.travelling import (
    Parts,
    masked,
    part_shapes,
    put_back,
    require_update,
    returned_parts,
    unmasked,
)

_MEMORY = "residual/"
"""Before the names under which a client keeps what rounding lost."""

_ROUND = _MEMORY + "round"
"""What a server keeps for a client that has a memory of its own: the round of the update that counted."""

_BITS = "bits"
ROUNDING_VARIANCE = 1.2
"""Variance of a rounded number times ``L^2``, over its mean square: of 128 normal numbers, the largest being 2.7."""

_DIRECTION_FLOOR = 1e-12
"""Directions of ``A A^T`` below this share of the largest are not written to: its inverse would blow them up."""


@dataclass(frozen=True)
class Compression:
    """How updates are made smaller on their way.

    Attributes:
        bits: Of a number.
        error_feedback: Whether clients add what rounding lost to their next update.
    """

    bits: Bits
    error_feedback: bool = False


def compressed(
    update: Update, sent: Broadcast, how: Compression, rng: np.random.Generator, kept: KeptFactors | None = None
) -> tuple[bytes, KeptFactors]:
    """Return what travels of an update, and what its client remembers of it.

    Args:
        update: What the client trained.
        sent: What it was sent, as it arrived there.
        how: Bits, and whether errors are fed back.
        rng: Rounds; of this client and this round alone.
        kept: What it remembers of the last time, among other things that it keeps.

    Raises:
        WireError: If a module is none of those that were sent, or has another shape.
    """
    _check_shapes(update, sent)
    # What is not finite travels as it is, for the server to refuse; nothing can be learnt from it.
    feeds_back = how.error_feedback and _has_feedback(sent) and _is_finite(update)
    memory = _remembered(kept) if feeds_back else {}
    noise = ROUNDING_VARIANCE / levels_of(how.bits) ** 2
    wanted, cores = update.payload, update.cores or {}
    if sent.train_factors == "core":
        cores = {
            module: _core_with_memory(own, cores[module], memory.get(module), noise) for module, own in wanted.items()
        }
    else:
        wanted = {module: _with_memory(own, sent, memory.get(module), noise) for module, own in wanted.items()}
    data = _packed(wanted, cores, sent, how.bits, rng)
    if not feeds_back:
        return data, {}
    arrived = read_compressed(data, update, sent, how)
    remembered = dict(_kept(_errors(update, arrived, memory)))
    return data, remembered if all(bool(one.isfinite().all()) for one in remembered.values()) else {}


def read_compressed(data: bytes, update: Update, sent: Broadcast, how: Compression) -> Update:
    """Return ``update`` with the payload and cores that travelled, in float32, whole again.

    Raises:
        WireError: If ``data`` was cut off, altered or written by something else, or does not fit ``sent``.
    """
    blob, parts = unpack(data), returned_parts(sent)
    require_update(blob)
    got = blob.fields.get(_BITS)
    if type(got) is not int or got != how.bits:
        told = "whole numbers" if got is None else f"{got!r:.20}"
        raise WireError(f"an update of {how.bits} bits a number was expected; got {told}")
    payload: dict[str, LoraFactors] = {}
    cores: dict[str, Tensor] = {}
    for module, scaling in sorted(blob.scalings["adapter"].items()):
        own = sent.trainable.get(module)
        if own is None:
            raise WireError(f"{module}: only modules of the broadcast may be returned; this one is surplus")
        base = {"A": own.A, "B": own.B} | ({"core": sent.cores[module]} if sent.cores else {})
        found: dict[str, Tensor] = {}
        for name, shape in part_shapes(own, parts).items():
            change = _read_part(blob, module, name, shape, how.bits)
            if name == "B" and parts.mask is not None:
                change = unmasked(change, parts.mask, module, own.B)
            found[name] = base[name].to("cpu", torch.float32) + change
        payload[module] = put_back(found, own, scaling).to(torch.float32)
        if "core" in found:
            cores[module] = found["core"]
    return replace(update, payload=payload, cores=cores or None, up_bytes=len(data))


def memory_of_round(server_round: int) -> KeptFactors:
    """Return what a server keeps of a client that has its memory itself: the round that counted."""
    return {_ROUND: torch.tensor([server_round])}


def remembered_round(kept: KeptFactors | None) -> int | None:
    """Return the round whose memory a client shall use, by what a server keeps of it; None is no memory."""
    return None if kept is None or _ROUND not in kept else int(kept[_ROUND])


def without_memory(kept: KeptFactors) -> KeptFactors:
    """Return what else a client keeps: where an update did not count, the memory before it holds."""
    return {name: one for name, one in kept.items() if not name.startswith(_MEMORY)}


def compressed_size(sent: Broadcast, how: Compression) -> int:
    """Return the number of bytes that ``compressed`` takes for an update of what was sent."""
    parts = returned_parts(sent)
    modules = tuple((name, *one.shape, one.rank, one.scaling) for name, one in sorted(sent.trainable.items()))
    return _size_of(modules, parts, how.bits)


@lru_cache
def _size_of(modules: tuple[tuple[str, int, int, int, float], ...], parts: Parts, bits: Bits) -> int:
    tensors: dict[str, Tensor] = {}
    for module, height, width, rank, scaling in modules:
        own = LoraFactors(torch.empty(rank, width), torch.empty(height, rank), scaling)
        for name, shape in part_shapes(own, parts).items():
            codes, scales = quantised_shapes(*_rows_and_width(name, shape), bits)
            tensors |= _named(module, name, Quantised(torch.zeros(codes, dtype=torch.uint8), torch.zeros(scales)))
    return len(pack(Blob(tensors, {"adapter": {name: scaling for name, *_, scaling in modules}}, {_BITS: bits})))


def _packed(
    adapter: AdapterState, cores: Mapping[str, Tensor], sent: Broadcast, bits: Bits, rng: np.random.Generator
) -> bytes:
    parts = returned_parts(sent)
    tensors: dict[str, Tensor] = {}
    for module, own in sorted(adapter.items()):
        start = sent.trainable[module]
        pairs = {"A": (own.A, start.A), "B": (own.B, start.B)}
        if sent.cores is not None:
            pairs["core"] = (cores[module], sent.cores[module])
        for name in parts.names:
            after, before = (one.detach().to("cpu", torch.float32) for one in pairs[name])
            change = masked(after - before, parts.mask, module) if name == "B" else after - before
            tensors |= _named(module, name, quantised(_as_rows(name, change), bits, rng))
    scalings = {module: float(own.scaling) for module, own in adapter.items()}
    return pack(Blob(tensors, {"adapter": scalings}, {_BITS: bits}))


def _named(module: str, name: str, found: Quantised) -> dict[str, Tensor]:
    return {f"adapter/{module}.{name}.codes": found.codes, f"adapter/{module}.{name}.scales": found.scales}


def _read_part(blob: Blob, module: str, name: str, shape: tuple[int, ...], bits: Bits) -> Tensor:
    """Return the change of a part in the shape in which it travels."""
    codes, scales = (blob.tensors.get(f"adapter/{module}.{name}.{what}") for what in ("codes", "scales"))
    rows, width = _rows_and_width(name, shape)
    expected = quantised_shapes(rows, width, bits)
    if codes is None or scales is None or (tuple(codes.shape), tuple(scales.shape)) != expected:
        raise WireError(f"{module}: the payload must hold codes and scales of {name} in the shapes {expected}")
    if codes.dtype != torch.uint8 or scales.dtype != torch.float32:
        raise WireError(f"{module}: codes of {name} must be uint8 and scales float32")
    numbers = restored(Quantised(codes, scales), rows, width, bits)
    return numbers.T if name == "B" and len(shape) == 2 else numbers.reshape(shape)


def _as_rows(name: str, part: Tensor) -> Tensor:
    """Return a part with one direction a row; chosen values of a masked ``B`` are one row."""
    if part.ndim == 1:
        return part[None]
    return part.T if name == "B" else part


def _rows_and_width(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) == 1:
        return 1, shape[0]
    return (shape[1], shape[0]) if name == "B" else (shape[0], shape[1])


def _has_feedback(sent: Broadcast) -> bool:
    """Return whether the product of an update is the client's alone to correct: not if it shows a part of it."""
    return sent.kept is None and sent.mask is None


def _remembered(kept: KeptFactors | None) -> dict[str, LoraFactors]:
    """Return module -> what a client remembers that rounding lost."""
    found = {name.removeprefix(_MEMORY): one for name, one in (kept or {}).items() if name.startswith(_MEMORY)}
    if not all(bool(one.isfinite().all()) for one in found.values()):
        return {}
    modules = sorted({name.removesuffix(".A") for name in found if name.endswith(".A")})
    return {module: LoraFactors(found[f"{module}.A"], found[f"{module}.B"], 1.0) for module in modules}


def _kept(errors: Mapping[str, LoraFactors]) -> Iterator[tuple[str, Tensor]]:
    for module, own in errors.items():
        yield f"{_MEMORY}{module}.A", own.A
        yield f"{_MEMORY}{module}.B", own.B


def _with_memory(own: LoraFactors, sent: Broadcast, memory: LoraFactors | None, noise: float) -> LoraFactors:
    """Return factors with what is remembered added to the one that travels: ``B``, or ``A`` where it alone does."""
    if memory is None:
        return own
    A, B = own.A.to("cpu", torch.float64), own.B.to("cpu", torch.float64)
    left, right = memory.B.to(torch.float64), memory.A.to(torch.float64)
    if sent.train_factors == "A":
        more = _inverse(B.T @ B, noise) @ (B.T @ left) @ right / own.scaling
        return LoraFactors((A + more).to(own.A.dtype), own.B, own.scaling)
    more = left @ (right @ A.T) @ _inverse(A @ A.T, noise) / own.scaling
    return LoraFactors(own.A, (B + more).to(own.B.dtype), own.scaling)


def _core_with_memory(own: LoraFactors, core: Tensor, memory: LoraFactors | None, noise: float) -> Tensor:
    if memory is None:
        return core
    A, B = own.A.to("cpu", torch.float64), own.B.to("cpu", torch.float64)
    left, right = memory.B.to(torch.float64), memory.A.to(torch.float64)
    more = _inverse(B.T @ B, noise) @ (B.T @ left) @ (right @ A.T) @ _inverse(A @ A.T, noise) / own.scaling
    return core + more.to(core.dtype)


def _inverse(inner: Tensor, noise: float) -> Tensor:
    """Return the inverse of a Gram matrix whose diagonal is raised by the share that rounding adds."""
    return torch.linalg.pinv(inner + noise * torch.diag(inner.diagonal()), rtol=_DIRECTION_FLOOR, hermitian=True)


def _errors(trained: Update, arrived: Update, memory: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Return module -> what of the product, and of the memory, has not arrived; rank at most twice the client's."""
    errors: dict[str, LoraFactors] = {}
    for module, own in sorted(trained.payload.items()):
        other = arrived.payload[module]
        if trained.cores is not None and arrived.cores is not None:
            own, other = own.with_core(trained.cores[module]), other.with_core(arrived.cores[module])
        total = add_product(ProductSum(*own.shape), own, 1.0)
        if module in memory:
            total = add_product(total, memory[module], 1.0)
        spectrum = decompose(add_product(total, other, -1.0), 2 * own.rank)
        if len(spectrum.S):
            errors[module] = spectrum.factors(len(spectrum.S), 1.0).to(torch.float32)
    return errors


def _check_shapes(update: Update, sent: Broadcast) -> None:
    for module, own in sorted(update.payload.items()):
        start = sent.trainable.get(module)
        core = (update.cores or {}).get(module) if sent.cores is not None else None
        if start is None or (own.A.shape, own.B.shape) != (start.A.shape, start.B.shape):
            expected = "no such module" if start is None else f"A {tuple(start.A.shape)}, B {tuple(start.B.shape)}"
            raise WireError(
                f"{module}: factors must return in the shapes that were sent, {expected}; got A {tuple(own.A.shape)}, "
                f"B {tuple(own.B.shape)}"
            )
        if sent.cores is not None and (core is None or core.shape != sent.cores[module].shape):
            raise WireError(f"{module}: a core of shape {tuple(sent.cores[module].shape)} must be returned")


def _is_finite(update: Update) -> bool:
    parts = [part for own in update.payload.values() for part in (own.A, own.B)]
    return all(bool(part.isfinite().all()) for part in (*parts, *(update.cores or {}).values()))
