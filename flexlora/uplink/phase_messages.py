"""Writes and reads the messages of the further phases of a round; what arrives is somebody else's bytes."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from flexlora.uplink.blob import Blob, WireError, pack, unpack

Fields = Mapping[str, Any]
"""Plain JSON values."""


def message(fields: Fields, tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """Return a message as bytes; tensors must be on the CPU and contiguous."""
    return pack(Blob(tensors or {}, {}, fields))


def fields_and_tensors(data: bytes) -> tuple[Fields, Mapping[str, Tensor]]:
    """Return what ``message`` wrote.

    Raises:
        WireError: If it was cut off, altered or written by something else.
    """
    blob = unpack(data)
    return blob.fields, blob.tensors


def bytes_in(fields: Fields, name: str, size: int | None = None) -> bytes:
    """Return a field that holds bytes, written as hexadecimal digits.

    Raises:
        WireError: If there is no such field, or it holds something else.
    """
    return _bytes_of(fields.get(name), name, size)


def bytes_by_client(fields: Fields, name: str, size: int | None = None) -> dict[str, bytes]:
    """Return a field that holds bytes of several clients.

    Raises:
        WireError: If there is no such field, or it holds something else.
    """
    found = fields.get(name)
    if not isinstance(found, dict):
        raise WireError(f"{name}: a message must hold one value per client here; got {type(found).__name__}")
    of_clients = cast("dict[str, object]", found)
    return {client_id: _bytes_of(value, name, size) for client_id, value in of_clients.items()}


def clients_in(fields: Fields, name: str) -> list[str]:
    """Return a field that names clients.

    Raises:
        WireError: If there is no such field, or it holds something else or a client twice.
    """
    found = fields.get(name)
    names = cast("list[object]", found) if isinstance(found, list) else [None]
    if not all(isinstance(one, str) for one in names) or len(set(names)) < len(names):
        raise WireError(f"{name}: a message must name different clients here")
    return [str(one) for one in names]


def number_in(fields: Fields, name: str, least: int, most: int) -> int:
    """Return a field that holds an integer within bounds.

    Raises:
        WireError: If there is no such field, or it holds something else.
    """
    found = fields.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
        raise WireError(f"{name}: a message must hold an integer in {least}..{most} here; got {found!r:.40}")
    return found


def in_hex(values: Mapping[str, bytes]) -> dict[str, str]:
    """Return bytes of several clients as plain JSON values."""
    return {client_id: value.hex() for client_id, value in sorted(values.items())}


def _bytes_of(value: object, name: str, size: int | None) -> bytes:
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        data = None
    if data is None or (size is not None and len(data) != size):
        raise WireError(f"{name}: a message must hold {size or 'some'} bytes as hexadecimal digits here")
    return data
