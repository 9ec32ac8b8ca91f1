"""Certificates and keys: what they allow is asked of OpenSSL and of the system's own TLS, never of our own reading."""

import socket
import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from flexlora.engines.flower.certificates import (
    CertificateError,
    Certificates,
    make_certificates,
    make_client_key,
    names_in,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates") / "fed"
    make_certificates(folder, ["fed.example.org", "10.1.2.3"], ["alpha", "beta"])
    return folder


def handshake(server: Certificates, authority: Path, name: str) -> str:
    """Return "ok", or why a client that trusts ``authority`` refuses the server under ``name``."""
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.server, server.server_key)

    def serve() -> None:
        try:
            context.wrap_socket(theirs, server_side=True).close()
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    client = ssl.create_default_context(cafile=str(authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        with client.wrap_socket(ours, server_hostname=name):
            return "ok"
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("name", ["fed.example.org", "10.1.2.3", "localhost", "127.0.0.1", "::1"])
def test_a_strict_client_accepts_the_server_under_each_of_its_names(folder: Path, name: str) -> None:
    assert handshake(Certificates(folder), Certificates(folder).authority, name) == "ok"


def test_a_client_refuses_another_name_and_another_authority(folder: Path, tmp_path: Path) -> None:
    files = Certificates(folder)
    assert "mismatch" in handshake(files, files.authority, "other.example.org")
    make_certificates(tmp_path / "other")
    assert "certificate" in handshake(files, tmp_path / "other" / "ca.pem", "localhost")


def test_client_keys_are_what_openssh_reads(folder: Path) -> None:
    key = Certificates(folder).client_key("alpha")
    assert key.read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    shown = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, text=True) if _has_ssh() else None
    public = Certificates(folder).public_key("alpha").read_text()
    assert public.split()[0] == "ecdsa-sha2-nistp384"
    if shown is not None:
        assert shown.stdout.split()[:2] == public.split()[:2]


def _has_ssh() -> bool:
    return subprocess.run("command -v ssh-keygen", shell=True, capture_output=True).returncode == 0


def test_private_files_are_their_owners_alone(folder: Path) -> None:
    files = Certificates(folder)
    for path in (files.authority_key, files.server_key, files.client_key("alpha")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_exists_is_kept_and_what_is_missing_is_added(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    new = make_certificates(folder, [], ["alpha", "gamma"])
    assert [path.name for path in new] == ["gamma.key", "gamma.pub"]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert [path.stem for path in Certificates(folder).public_keys()] == ["alpha", "beta", "gamma"]


def test_a_new_host_needs_a_renewed_certificate_which_old_clients_accept(tmp_path: Path) -> None:
    make_certificates(tmp_path / "fed", ["one.example.org"])
    files = Certificates(tmp_path / "fed")
    authority = files.authority.read_bytes()
    with pytest.raises(CertificateError, match=r"does not name two\.example\.org; add --renew"):
        make_certificates(files.folder, ["two.example.org"])
    make_certificates(files.folder, ["two.example.org"], renew=True)
    assert files.authority.read_bytes() == authority
    assert handshake(files, files.authority, "two.example.org") == "ok"
    assert "two.example.org" in names_in(files.server)


def test_half_a_pair_is_refused_and_nothing_is_written_over(tmp_path: Path) -> None:
    make_certificates(tmp_path / "fed")
    (tmp_path / "fed" / "ca.pem").unlink()
    with pytest.raises(CertificateError, match=r"ca\.key is there without ca\.pem"):
        make_certificates(tmp_path / "fed")
    key = tmp_path / "mine.key"
    make_client_key(key)
    with pytest.raises(CertificateError, match="meanwhile"):
        make_client_key(key)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x", "a\nb", "x" * 65])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CertificateError, match="name of a client must be"):
        make_certificates(tmp_path / "fed", [], [name])
    assert not (tmp_path / "fed").exists()


@pytest.mark.parametrize("host", ["", "https://x", "a b", "host:80"])
def test_hosts_that_are_no_hosts_are_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(CertificateError, match="--host must be"):
        make_certificates(tmp_path / "fed", [host])


def test_files_that_are_no_certificates_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("hello")
    with pytest.raises(CertificateError, match="must be a certificate in PEM format"):
        names_in(tmp_path / "x.pem")


def test_a_server_says_which_file_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"needs ca\.pem .* flexlora certificates"):
        Certificates(tmp_path).check_server_files()
