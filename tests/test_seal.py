"""A sealed text is the JSON that it was, and a single flipped bit of it is noticed."""

import hashlib
import json

import pytest

from flexlora.seal import SealError, sealed, unsealed

TEXT = '{"a": 1, "b": {"digest": "x"}, "c": [1.5, null]}'


def test_a_sealed_text_is_the_same_object_with_its_digest_at_the_end() -> None:
    value = json.loads(sealed(TEXT))
    digest = value.pop("digest")
    assert value == json.loads(TEXT)
    assert digest == hashlib.sha256(TEXT[:-1].encode()).hexdigest()


def test_a_sealed_text_comes_back_and_an_unsealed_one_is_taken_as_it_is() -> None:
    assert unsealed(sealed(TEXT).encode()) == (TEXT.encode(), True)
    assert unsealed(sealed(TEXT + "\n\n").encode() + b"\n") == (TEXT.encode(), True)
    assert unsealed(TEXT.encode()) == (TEXT.encode(), False)


def test_every_flipped_bit_is_noticed() -> None:
    whole = sealed(TEXT).encode()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            body, is_sealed = unsealed(bytes(damaged))
        except SealError:
            continue
        # What no longer looks like a seal is an entry that the object must not have, or no JSON.
        assert not is_sealed
        try:
            assert json.loads(body).keys() > json.loads(TEXT).keys()
        except ValueError:
            pass


@pytest.mark.parametrize("end", [-1, -30, -80])
def test_a_text_that_was_cut_off_is_no_whole_one(end: int) -> None:
    body, is_sealed = unsealed(sealed(TEXT).encode()[:end])
    assert not is_sealed
    with pytest.raises(ValueError, match=r"delimiter|value|string"):
        json.loads(body)
