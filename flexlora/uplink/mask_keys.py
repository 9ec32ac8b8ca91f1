"""Agrees on keys between two clients, seals what one sends the other, and expands a key into a mask.

X25519 agreement (RFC 7748), HKDF with SHA-256 (RFC 5869), ChaCha20 as generator and ChaCha20-Poly1305 for sealing (RFC
8439), all of the package ``cryptography``; nothing of it is made here. Needs the extra ``flexlora[privacy]``.
"""

# cryptography is an optional extra, so its types may be missing.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import os
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexlora.errors import FlexLoraError

KEY_BYTES = 32
_NONCE_BYTES = 12

Words = npt.NDArray[np.uint32]
"""Numbers modulo 2^32."""


class MaskKeyError(FlexLoraError, RuntimeError):
    """A key that cannot be used, something sealed that was altered, or the library for both is missing."""


@dataclass(frozen=True)
class KeyPair:
    """A private key and what belongs to it in public, as raw bytes."""

    private: bytes
    public: bytes


def require_cryptography() -> None:
    """Raise unless the library can be imported.

    Raises:
        MaskKeyError: Naming the extra that brings it.
    """
    try:
        import cryptography  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise MaskKeyError(
            "secure sums need the package cryptography; install it with: pip install 'flexlora[privacy]'"
        ) from error


def new_key_pair() -> KeyPair:
    """Return a fresh X25519 key pair, drawn from the operating system."""
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    private = X25519PrivateKey.generate()
    return KeyPair(private.private_bytes_raw(), private.public_key().public_bytes_raw())


def new_seed() -> bytes:
    """Return a fresh key for a mask of one's own, drawn from the operating system."""
    return os.urandom(KEY_BYTES)


def agreed_key(private: bytes, public: bytes, purpose: str, session: bytes) -> bytes:
    """Return the key that the owners of two key pairs share, the same whichever end computes it.

    Args:
        private: Of one end.
        public: Of the other.
        purpose: What the key is for; another purpose gives another key.
        session: Of the round, so that no key serves twice.

    Raises:
        MaskKeyError: If one of them is no key.
    """
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    try:
        ours, theirs = X25519PrivateKey.from_private_bytes(private), X25519PublicKey.from_public_bytes(public)
        shared = ours.exchange(theirs)
    except ValueError as error:
        raise MaskKeyError(f"a key must be an X25519 key of {KEY_BYTES} bytes; {error or 'got another'}") from error
    return HKDF(SHA256(), KEY_BYTES, salt=session, info=f"flexlora {purpose}".encode()).derive(shared)


def mask_of_key(key: bytes, num_words: int) -> Words:
    """Return the first numbers of the ChaCha20 stream of a key; no key is expanded for two purposes."""
    require_cryptography()
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    words = np.frombuffer(encryptor.update(bytes(4 * num_words)), dtype="<u4")
    return words if sys.byteorder == "little" else words.astype(np.uint32)


def sealed(key: bytes, secret: bytes, context: bytes) -> bytes:
    """Return a secret that only owners of the key can read, and only as part of this context."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, secret, context)


def unsealed(key: bytes, data: bytes, context: bytes) -> bytes:
    """Return the secret that ``sealed`` hid.

    Raises:
        MaskKeyError: If it was altered, or sealed with another key or for another context.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], context)
    except (InvalidTag, ValueError) as error:
        raise MaskKeyError("what was sealed was altered on its way, or is for somebody else") from error
