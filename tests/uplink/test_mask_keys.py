"""Expected bytes are those of the RFCs."""

import sys

import numpy as np
import pytest

from flexlora.uplink.mask_keys import MaskKeyError, agreed_key, mask_of_key, new_key_pair, new_seed, sealed, unsealed


def test_both_ends_agree_on_one_key_per_purpose_and_session():
    ours, theirs = new_key_pair(), new_key_pair()
    key = agreed_key(ours.private, theirs.public, "seal", b"session")
    assert key == agreed_key(theirs.private, ours.public, "seal", b"session") and len(key) == 32
    assert key != agreed_key(ours.private, theirs.public, "mask", b"session")
    assert key != agreed_key(ours.private, theirs.public, "seal", b"another")
    assert key != agreed_key(new_key_pair().private, theirs.public, "seal", b"session")


def test_a_mask_is_the_chacha20_stream_of_its_key():
    # RFC 8439, appendix A.1, test vectors 1 and 2: key and nonce zero, block counters 0 and 1.
    expected = bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert np.array_equal(mask_of_key(bytes(32), 32), np.frombuffer(expected, "<u4"))
    assert np.array_equal(mask_of_key(bytes(32), 5), np.frombuffer(expected[:20], "<u4"))


def test_what_is_sealed_can_be_read_with_its_key_in_its_context_alone():
    key, package = new_seed(), b"shares"
    data = sealed(key, package, b"from a to b")
    assert unsealed(key, data, b"from a to b") == package
    assert package not in data and data != sealed(key, package, b"from a to b")
    for wrong in (
        (new_seed(), data, b"from a to b"),
        (key, data, b"from b to a"),
        (key, data[:-1] + bytes([data[-1] ^ 1]), b"from a to b"),
        (key, b"", b"from a to b"),
    ):
        with pytest.raises(MaskKeyError, match="altered on its way, or is for somebody else"):
            unsealed(*wrong)


@pytest.mark.parametrize("public", [b"short", bytes(32)], ids=["short", "of small order"])
def test_what_is_no_key_is_refused(public):
    with pytest.raises(MaskKeyError, match="must be an X25519 key"):
        agreed_key(new_key_pair().private, public, "seal", b"session")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MaskKeyError, match=r"pip install 'flexlora\[privacy\]'"):
        new_key_pair()
