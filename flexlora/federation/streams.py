"""Derives random streams from a seed, a purpose and what they are drawn for."""

import hashlib
import json

import numpy as np


def stream_seed(seed: int, purpose: str, *parts: int | str) -> int:
    """Return 63 bits that depend on every argument and on nothing else, whatever the process or Python version.

    Args:
        purpose: What the numbers are for, so that two uses never share a stream.
        parts: Usually the server round and the client id. ``1`` and ``"1"`` differ.
    """
    text = json.dumps([int(seed), purpose, *(part if isinstance(part, str) else int(part) for part in parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, purpose: str, *parts: int | str) -> np.random.Generator:
    """Return the random stream of ``stream_seed``; every call starts at its beginning."""
    return np.random.default_rng(stream_seed(seed, purpose, *parts))
