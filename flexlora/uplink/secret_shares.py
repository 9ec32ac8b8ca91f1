"""Splits a secret into shares: any ``threshold`` of them restore it, fewer say nothing about it (Shamir 1979).

The secret is the value at 0 of a random polynomial of degree ``threshold - 1`` over a prime field; member ``x`` gets
its value at ``x``. Random numbers come from the operating system. The arithmetic is that of Python's integers, whose
time depends on their values: it is meant for parties that do not time one another's processes.
"""

import secrets
from collections.abc import Mapping

from flexlora.errors import FlexLoraError

PRIME = 2**256 + 297
"""The smallest prime above every secret of 32 bytes."""
SECRET_BYTES = 32
SHARE_BYTES = 33


class SharesError(FlexLoraError, ValueError):
    """Too few shares, or shares that do not belong together."""


def split(secret: bytes, threshold: int, num_members: int) -> list[int]:
    """Return the shares of members 1 to ``num_members``, in this order, each below ``PRIME``.

    Args:
        secret: ``SECRET_BYTES`` long.
        threshold: How many shares restore it, 1 to ``num_members``.
        num_members: Below ``PRIME``.

    Raises:
        SharesError: If the secret has another length, or no threshold can be met.
    """
    if len(secret) != SECRET_BYTES:
        raise SharesError(f"a secret to share must have {SECRET_BYTES} bytes; got {len(secret)}")
    if not 1 <= threshold <= num_members:
        raise SharesError(f"a threshold must be in 1..{num_members}, the number of members; got {threshold}")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares: list[int] = []
    for member in range(1, num_members + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * member + coefficient) % PRIME
        shares.append(value)
    return shares


def restore(shares: Mapping[int, int], threshold: int) -> bytes:
    """Return the secret from the shares of at least ``threshold`` members, by interpolation at 0.

    Args:
        shares: Member -> its share.
        threshold: With which the secret was split.

    Raises:
        SharesError: If there are fewer, or what they restore cannot have been a secret.
    """
    if len(shares) < threshold:
        raise SharesError(f"a secret needs the shares of {threshold} members to be restored; got {len(shares)}")
    members = sorted(shares)[:threshold]
    value = 0
    for member in members:
        above, below = 1, 1
        for other in members:
            if other != member:
                above = above * other % PRIME
                below = below * (other - member) % PRIME
        value = (value + shares[member] * above * pow(below, -1, PRIME)) % PRIME
    if value >= 2 ** (8 * SECRET_BYTES):
        raise SharesError("the shares do not belong together: what they restore is no secret of 32 bytes")
    return value.to_bytes(SECRET_BYTES, "big")
