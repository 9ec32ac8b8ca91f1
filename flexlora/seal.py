"""Seals JSON texts with a digest of themselves, so that a single flipped bit is noticed when they are read back.

A sealed text is the same JSON object with one more entry at its end, ``"digest"``: the SHA-256 of all bytes before that
entry. Texts of earlier versions have no seal and are taken as they are.
"""

import hashlib
import re

from flexlora.errors import FlexLoraError

_SEAL = re.compile(rb',"digest":"([0-9a-f]{64})"\}\s*\Z')


class SealError(FlexLoraError, ValueError):
    """A text is not the one that was sealed."""


def sealed(text: str) -> str:
    """Return a JSON object, which must not be empty, with its digest as the last entry; white space at its end goes."""
    head = text.rstrip().removesuffix("}").rstrip()
    return f'{head},"digest":"{hashlib.sha256(head.encode()).hexdigest()}"}}'


def unsealed(content: bytes) -> tuple[bytes, bool]:
    """Return the JSON object without its seal, and whether it had one.

    Raises:
        SealError: If it is not what was sealed.
    """
    seal = _SEAL.search(content, max(0, len(content) - 100))
    if seal is None:
        return content, False
    head = content[: seal.start()]
    if hashlib.sha256(head).hexdigest().encode() != seal[1]:
        raise SealError("it does not have the digest at its own end; it is damaged")
    return head + b"}", True
