"""Makes the certificates and keys of a deployment: an authority, the server's certificate, and a key for each client.

A folder of certificates holds:

    ca.pem, ca.key            the authority; every client needs ca.pem, nobody but this folder needs ca.key
    server.pem, server.key    what the server shows, for the names and addresses in it
    clients/NAME.key          what a client proves itself with: EC P-384 in OpenSSH format, as Flower reads it
    clients/NAME.pub          what the server knows the client by

Files appear whole, private ones for their owner alone. What exists is kept: a folder can be asked for more clients at
any time, and a running server sees them.
"""

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flexlora.errors import FlexLoraError
from flexlora.files import sync

VALID_DAYS = 825
"""How long a server's certificate is valid: longer ones are refused by some systems."""

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

CLIENT_FOLDER = "clients"

_CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class CertificateError(FlexLoraError, ValueError):
    """Certificates or keys that are missing, cannot be read or cannot be made."""


@dataclass(frozen=True)
class Certificates:
    """The files of a folder of certificates.

    Attributes:
        folder: The folder.
    """

    folder: Path

    @property
    def authority(self) -> Path:
        """The certificate that clients trust."""
        return self.folder / "ca.pem"

    @property
    def authority_key(self) -> Path:
        """The key that server certificates are signed with."""
        return self.folder / "ca.key"

    @property
    def server(self) -> Path:
        """The certificate of the server."""
        return self.folder / "server.pem"

    @property
    def server_key(self) -> Path:
        """The private key of the server."""
        return self.folder / "server.key"

    def client_key(self, name: str) -> Path:
        """Return the private key of a client."""
        return self.folder / CLIENT_FOLDER / f"{name}.key"

    def public_key(self, name: str) -> Path:
        """Return the public key of a client."""
        return self.folder / CLIENT_FOLDER / f"{name}.pub"

    def public_keys(self) -> list[Path]:
        """Return the public keys of all clients, by name."""
        return sorted((self.folder / CLIENT_FOLDER).glob("*.pub"))

    @staticmethod
    def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
        """Return the public key in a file in OpenSSH format.

        Raises:
            CertificateError: If there is none.
        """
        try:
            key = serialization.load_ssh_public_key(path.read_bytes())
        except (ValueError, OSError, UnsupportedAlgorithm) as error:
            raise CertificateError(f"{path} must be a public key in OpenSSH format: {error}") from error
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise CertificateError(f"{path} must be a key on an elliptic curve, as ecdsa-sha2-nistp384")
        return key

    def check_server_files(self) -> None:
        """Refuse a folder that a server cannot start with.

        Raises:
            CertificateError: If a file is missing.
        """
        for path in (self.authority, self.server, self.server_key):
            if not path.is_file():
                raise CertificateError(
                    f"a server needs {path.name} in its folder of certificates, and {path} is not there; "
                    f"make it by: flexlora certificates --out {self.folder} --host HOST --client NAME"
                )


def make_certificates(
    folder: Path, hosts: Sequence[str] = (), clients: Sequence[str] = (), *, renew: bool = False
) -> list[Path]:
    """Make what is missing in a folder of certificates, and return the files that are new.

    Args:
        folder: Made where it is missing, for its owner alone.
        hosts: Names and addresses that clients call the server by, besides those of loopback.
        clients: Names of the clients that get a key.
        renew: Whether the server gets a new certificate from the same authority; clients need nothing new.

    Raises:
        CertificateError: If a name cannot be used, the folder holds only a part of a pair of files, or ``hosts`` are
            given for a certificate that exists and does not name them.
    """
    hosts = list(dict.fromkeys((*hosts, *LOOPBACK_NAMES)))
    for host in hosts:
        _check_host(host)
    for name in clients:
        check_client_name(name)
    files = Certificates(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    new: list[Path] = []
    if _is_missing(files.authority, files.authority_key):
        new += _make_authority(files)
    if renew or _is_missing(files.server, files.server_key):
        new += _make_server(files, hosts)
    elif lacking := [host for host in hosts if host not in names_in(files.server)]:
        raise CertificateError(
            f"{files.server} exists and does not name {', '.join(lacking)}; add --renew to make a new one from the "
            "same authority, which clients accept without new files"
        )
    (folder / CLIENT_FOLDER).mkdir(exist_ok=True, mode=0o700)
    for name in clients:
        if _is_missing(files.client_key(name), files.public_key(name)):
            new += make_client_key(files.client_key(name))
    return new


def make_client_key(path: Path) -> list[Path]:
    """Make the pair of keys of a client, ``path`` and the same name ending in ``.pub``; return both paths."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write_new(path, private, private=True)
    _write_new(path.with_suffix(".pub"), public + b" " + path.stem.encode() + b"\n")
    return [path, path.with_suffix(".pub")]


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the private key of a client.

    Raises:
        CertificateError: If there is none, or others may read it.
    """
    try:
        content, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise CertificateError(
            f"--key must be the private key of this client; {path}: {error.strerror}. The owner of the server makes "
            "one by: flexlora certificates --client NAME"
        ) from error
    try:
        key = serialization.load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(
            f"--key must be a private key in OpenSSH format without a password, as flexlora certificates makes it; "
            f"{path}: {error}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"--key must be a key on an elliptic curve, as ecdsa-sha2-nistp384; {path} is another")
    if os.name == "posix" and mode & 0o077:
        raise CertificateError(f"{path} must be readable for its owner alone; run: chmod 600 {path}")
    return key


def check_client_name(name: str) -> None:
    """Refuse the name of a client that cannot be the name of a file.

    Raises:
        CertificateError: If it cannot.
    """
    if not _CLIENT_NAME.fullmatch(name):
        raise CertificateError(
            f"the name of a client must be 1 to 64 letters, digits, dots, dashes and underscores, the first a letter "
            f"or digit; got {name!r}"
        )


def names_in(certificate: Path) -> list[str]:
    """Return the names and addresses that a certificate is for.

    Raises:
        CertificateError: If the file is no certificate.
    """
    try:
        read = x509.load_pem_x509_certificate(certificate.read_bytes())
        names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise CertificateError(
            f"{certificate} must be a certificate in PEM format that names hosts: {error}"
        ) from error
    return [str(name.value) for name in names]


def _check_host(host: str) -> None:
    if _address(host) is None and not re.fullmatch(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", host):
        raise CertificateError(f"--host must be the name or address of a machine, as fed.example.org; got {host!r}")


def _address(host: str) -> "ipaddress.IPv4Address | ipaddress.IPv6Address | None":
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_missing(first: Path, second: Path) -> bool:
    """Return whether a pair of files is missing; half a pair is refused."""
    there = [path for path in (first, second) if path.exists()]
    if len(there) == 1:
        lacking = second if there[0] == first else first
        raise CertificateError(
            f"{there[0]} is there without {lacking.name}; move it away, or put the other one back, and start again"
        )
    return not there


def _make_authority(files: Certificates) -> list[Path]:
    """Make the authority: it signs certificates of servers and nothing else."""
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _builder("flexlora federation", key.public_key(), days=3650)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    certificate = builder.issuer_name(_name("flexlora federation")).sign(key, hashes.SHA384())
    return _write_pair(files.authority, files.authority_key, certificate, key)


def _make_server(files: Certificates, hosts: Sequence[str]) -> list[Path]:
    """Make the certificate of a server, signed by the authority in the folder."""
    try:
        authority_key = serialization.load_pem_private_key(files.authority_key.read_bytes(), None)
        authority = x509.load_pem_x509_certificate(files.authority.read_bytes())
    except (ValueError, TypeError) as error:
        raise CertificateError(f"{files.authority} and ca.key must be those that flexlora made: {error}") from error
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{files.authority_key} must hold an elliptic curve key")
    key = ec.generate_private_key(ec.SECP384R1())
    addresses = {host: _address(host) for host in hosts}
    names = [x509.DNSName(host) if value is None else x509.IPAddress(value) for host, value in addresses.items()]
    builder = _builder(hosts[0], key.public_key(), VALID_DAYS)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
    )
    certificate = builder.issuer_name(authority.subject).sign(authority_key, hashes.SHA384())
    return _write_pair(files.server, files.server_key, certificate, key, replace=True)


def _builder(common_name: str, public_key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        # Clocks of machines differ a little.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name[:64])])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_pair(
    path: Path, key_path: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, *, replace: bool = False
) -> list[Path]:
    """Write a certificate and its key, the key first: a certificate without its key would look complete."""
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_new(key_path, secret, private=True, replace=replace)
    _write_new(path, certificate.public_bytes(pem), replace=replace)
    return [path, key_path]


def _write_new(path: Path, content: bytes, *, private: bool = False, replace: bool = False) -> None:
    """Write a file that appears whole; unless ``replace``, one that has appeared meanwhile stays and is an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        else:
            try:
                os.link(partial, path)
            except FileExistsError:
                raise CertificateError(f"{path} has been made by another process meanwhile; start again") from None
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)
