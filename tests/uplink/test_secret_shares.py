"""Primality and interpolation are sympy's, an implementation of its own."""

import itertools

import pytest
import sympy

from flexlora.uplink.secret_shares import PRIME, SharesError, restore, split

SECRET = bytes(range(100, 132))


def test_the_field_is_the_smallest_that_holds_every_secret():
    assert sympy.nextprime(2**256) == PRIME


@pytest.mark.parametrize(("threshold", "num_members"), [(1, 1), (2, 2), (3, 5), (5, 5)])
def test_any_threshold_of_shares_restores_the_secret(threshold, num_members):
    shares = dict(enumerate(split(SECRET, threshold, num_members), 1))
    for chosen in itertools.combinations(shares, threshold):
        assert restore({member: shares[member] for member in chosen}, threshold) == SECRET
    assert restore(shares, threshold) == SECRET


def test_shares_lie_on_one_polynomial_whose_value_at_0_is_the_secret():
    x = sympy.Symbol("x")
    shares = split(SECRET, 4, 7)
    through_four = sympy.polys.polyfuncs.interpolate([(member, shares[member - 1]) for member in (1, 3, 4, 7)], x)
    for member in (0, 2, 5, 6):
        value = sympy.Rational(through_four.subs(x, member))
        expected = int.from_bytes(SECRET, "big") if member == 0 else shares[member - 1]
        assert value.p * pow(int(value.q), -1, PRIME) % PRIME == expected


def test_fewer_shares_restore_nothing():
    shares = dict(enumerate(split(SECRET, 3, 5), 1))
    del shares[1], shares[2], shares[5]
    with pytest.raises(SharesError, match="needs the shares of 3 members to be restored; got 2"):
        restore(shares, 3)


def test_the_same_secret_is_split_differently_each_time():
    assert split(SECRET, 2, 3) != split(SECRET, 2, 3)


def test_what_cannot_be_split_or_restored_is_refused():
    with pytest.raises(SharesError, match="must have 32 bytes; got 3"):
        split(b"abc", 2, 3)
    for threshold in (0, 4):
        with pytest.raises(SharesError, match=rf"in 1\.\.3, the number of members; got {threshold}"):
            split(SECRET, threshold, 3)
    with pytest.raises(SharesError, match="do not belong together"):
        restore({1: PRIME - 1}, 1)
