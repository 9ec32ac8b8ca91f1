"""Signatures are those of the key that is trusted, of this manifest, and of nothing else."""

import stat
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from flexlora.engines.exchange_keys import check_signature, make_keys, private_key, public_key, sign
from flexlora.engines.exchange_manifest import ExchangeError

MANIFEST = b'{"kind": "reply"}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "reply"
    place.mkdir()
    (place / "round.json").write_bytes(MANIFEST)
    return place


def test_a_signature_holds_for_its_key_and_its_bytes_alone(folder: Path, tmp_path: Path) -> None:
    own, other = make_keys(tmp_path / "north"), make_keys(tmp_path / "south")
    with pytest.raises(ExchangeError, match=r"it has no round.sig"):
        check_signature(folder, MANIFEST, own)
    sign(folder, tmp_path / "north")
    check_signature(folder, MANIFEST, own)
    for manifest, key in ((MANIFEST, other), (MANIFEST + b" ", own)):
        with pytest.raises(ExchangeError, match="that of another key, or of another manifest"):
            check_signature(folder, manifest, key)
    for broken in ("", "zz", "ab" * 63, "é"):
        (folder / "round.sig").write_text(broken)
        with pytest.raises(ExchangeError, match="that of another key"):
            check_signature(folder, MANIFEST, own)


def test_openssl_verifies_what_was_signed(folder: Path, tmp_path: Path) -> None:
    public = make_keys(tmp_path / "north")
    sign(folder, tmp_path / "north")
    (tmp_path / "sig").write_bytes(bytes.fromhex((folder / "round.sig").read_text()))
    (tmp_path / "signed").write_bytes(b"flexlora file-based round 1\n" + MANIFEST)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin", "-inkey", public, "-in", tmp_path / "signed"]
    try:
        done = subprocess.run([*command, "-sigfile", tmp_path / "sig"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no openssl here")
    assert "Verified Successfully" in done.stdout


def test_a_new_private_key_is_its_owners_alone_and_replaces_nothing(tmp_path: Path) -> None:
    public = make_keys(tmp_path / "keys" / "north")
    assert public.name == "north.pub"
    assert stat.S_IMODE((tmp_path / "keys" / "north").stat().st_mode) == 0o600
    with pytest.raises(ExchangeError, match="exists"):
        make_keys(tmp_path / "keys" / "north")


def test_files_that_are_no_keys_are_refused(tmp_path: Path) -> None:
    public = make_keys(tmp_path / "north")
    (tmp_path / "text").write_text("no key")
    for path in (public, tmp_path / "text", tmp_path / "nowhere"):
        with pytest.raises(ExchangeError):
            private_key(path)
    for path in (tmp_path / "north", tmp_path / "text"):
        with pytest.raises(ExchangeError, match="public Ed25519 key"):
            public_key(path)
