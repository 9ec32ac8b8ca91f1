"""Signs the folders of a file-based round with Ed25519 keys, and checks their signatures.

A signature covers the manifest, which holds the hash of every other file. It says who has made a folder; the hashes
alone only say that it has not changed since.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from flexlora.engines.exchange_manifest import MANIFEST_FILE, SIGNATURE_FILE, ExchangeError, read_regular, write_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC_SUFFIX = ".pub"
_MOST_KEY_BYTES = 10_000
_CONTEXT = b"flexlora file-based round 1\n"
"""Stands before what is signed, so that a signature made for something else is none here."""


def make_keys(path: Path) -> Path:
    """Write a new private key to ``path``, readable by its owner alone, and return where its public half lies.

    Raises:
        ExchangeError: If one of the two files exists, or the extra ``flexlora[deploy]`` is missing.
    """
    private, public = _ed25519()[0].generate(), path.with_name(path.name + PUBLIC_SUFFIX)
    for taken in (path, public):
        if os.path.lexists(taken):
            raise ExchangeError(f"a new key needs a name that is free; {taken} exists")
    from cryptography.hazmat.primitives import serialization

    content = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    format = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(private.public_key().public_bytes(serialization.Encoding.PEM, format))
    return public


def sign(folder: Path, key: Path) -> None:
    """Write the signature of a folder's manifest beside it.

    Raises:
        ExchangeError: If ``key`` holds no private key.
    """
    signature = private_key(key).sign(_CONTEXT + (folder / MANIFEST_FILE).read_bytes())
    write_text(folder / SIGNATURE_FILE, signature.hex() + "\n")


def check_signature(folder: Path, manifest: bytes, key: Path) -> None:
    """Raise unless the owner of a public key has signed these bytes, which are the manifest of ``folder``.

    Raises:
        ExchangeError: Saying whether the signature is missing, or is that of another key or other bytes.
    """
    from cryptography.exceptions import InvalidSignature

    public, path = public_key(key), folder / SIGNATURE_FILE
    if not os.path.lexists(path):
        raise ExchangeError(f"{folder} must be signed with the key of {key.name}; it has no {SIGNATURE_FILE}")
    try:
        public.verify(bytes.fromhex(read_regular(path, 1000).decode("ascii").strip()), _CONTEXT + manifest)
    except (InvalidSignature, ValueError) as error:
        raise ExchangeError(
            f"{folder} must be signed with the key of {key.name}; its signature is that of another key, or of another "
            "manifest"
        ) from error


def private_key(path: Path) -> "Ed25519PrivateKey":
    """Return the private key in a PEM file.

    Raises:
        ExchangeError: If there is none.
    """
    kind, _ = _ed25519()
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key(read_regular(path, _MOST_KEY_BYTES), password=None)
    except (ValueError, TypeError) as error:
        raise ExchangeError(f"{path} must hold a private Ed25519 key as PEM, without a password; {error}") from error
    if not isinstance(key, kind):
        raise ExchangeError(f"{path} must hold a private Ed25519 key; it holds a {type(key).__name__}")
    return key


def public_key(path: Path) -> "Ed25519PublicKey":
    """Return the public key in a PEM file.

    Raises:
        ExchangeError: If there is none.
    """
    _, kind = _ed25519()
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_public_key(read_regular(path, _MOST_KEY_BYTES))
    except ValueError as error:
        raise ExchangeError(f"{path} must hold a public Ed25519 key as PEM; {error}") from error
    if not isinstance(key, kind):
        raise ExchangeError(f"{path} must hold a public Ed25519 key; it holds a {type(key).__name__}")
    return key


def _ed25519() -> "tuple[type[Ed25519PrivateKey], type[Ed25519PublicKey]]":
    """Return the classes of private and public keys.

    Raises:
        ExchangeError: If the package that has them is missing.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    except ImportError as error:
        raise ExchangeError("keys need the package cryptography; pip install 'flexlora[deploy]'") from error
    return Ed25519PrivateKey, Ed25519PublicKey
