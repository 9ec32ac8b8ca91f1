import dataclasses

import numpy as np
import pytest

from flexlora.uplink.blob import WireError
from flexlora.uplink.mask_keys import MaskKeyError
from flexlora.uplink.masking_client import MaskingClient
from flexlora.uplink.phases import PhaseError

NAMES = ["ann", "bob", "cyd", "dan"]
WORDS = np.arange(3, dtype=np.uint32)


@dataclasses.dataclass
class Four:
    """Four clients and what they have said."""

    clients: dict
    keys: dict
    shares: dict

    def sum_request(self, name, **changes):
        sealed = {other: self.shares[other]["sealed"][name] for other in NAMES if other != name}
        return {"sum": 0, "participants": NAMES, "sealed": sealed, **changes}


def keys_request(**changes):
    return {"session": "00" * 16, "sums": 1, **changes}


def shares_request(keys, **changes):
    fields = {name: {one: keys[one][name[:-1]] for one in keys} for name in ("seals",)}
    return {**fields, "masks": {one: keys[one]["masks"] for one in keys}, "threshold": 3, **changes}


@pytest.fixture
def four():
    clients = {name: MaskingClient(name) for name in NAMES}
    keys = {name: client.keys(keys_request()) for name, client in clients.items()}
    shares = {name: client.shares(shares_request(keys)) for name, client in clients.items()}
    return Four(clients, keys, shares)


def unmask_request(**changes):
    return {"sum": 0, "survivors": NAMES[:3], "dropped": NAMES[3:], **changes}


def test_masks_of_all_cancel_in_the_sum_but_for_the_seeds(four):
    total = sum(four.clients[name].masked(four.sum_request(name), WORDS).astype(np.int64) for name in NAMES)
    assert not np.array_equal(total % 2**32, 4 * WORDS)
    from flexlora.uplink.mask_keys import mask_of_key

    seeds = sum(mask_of_key(four.clients[name]._seeds[0], 3).astype(np.int64) for name in NAMES)
    assert np.array_equal((total - seeds) % 2**32, 4 * WORDS)


def test_each_phase_is_answered_once_and_in_order(four):
    ann = four.clients["ann"]
    with pytest.raises(PhaseError, match="it gives no others"):
        ann.keys(keys_request())
    with pytest.raises(PhaseError, match="given once, after the keys"):
        ann.shares(shares_request(four.keys))
    with pytest.raises(PhaseError, match="has not given it"):
        ann.unmask(unmask_request())
    ann.masked(four.sum_request("ann"), WORDS)
    with pytest.raises(PhaseError, match="sum 0 is not due"):
        ann.masked(four.sum_request("ann"), WORDS)
    ann.unmask(unmask_request())
    # Shares of dan's key were shown: with those of its seed, the server could read what dan sent.
    with pytest.raises(PhaseError, match="has unmasked it"):
        ann.unmask(unmask_request(survivors=NAMES, dropped=[]))
    with pytest.raises(PhaseError, match="after the keys"):
        MaskingClient("eve").shares(shares_request(four.keys))


def test_never_both_shares_of_one_client_are_shown(four):
    ann = four.clients["ann"]
    ann.masked(four.sum_request("ann"), WORDS)
    with pytest.raises(PhaseError, match="has survived or has dropped out"):
        ann.unmask(unmask_request(survivors=NAMES, dropped=["dan"]))
    with pytest.raises(PhaseError, match="has survived or has dropped out"):
        ann.unmask(unmask_request(survivors=["bob", "cyd", "dan"], dropped=["ann"]))
    shown = ann.unmask(unmask_request())
    assert shown["seeds"].keys() == {"ann", "bob", "cyd"} and shown["keys"].keys() == {"dan"}


def test_a_sum_over_fewer_than_the_threshold_is_refused(four):
    ann = four.clients["ann"]
    with pytest.raises(PhaseError, match="at least 3 of 4 neighbours must take part; got 2"):
        ann.masked(four.sum_request("ann", participants=["ann", "bob"]), WORDS)
    four.clients["bob"].masked(four.sum_request("bob"), WORDS)
    with pytest.raises(PhaseError, match="at least 3 of 4 neighbours must have survived; got 2"):
        four.clients["bob"].unmask(unmask_request(survivors=["ann", "bob"], dropped=["cyd", "dan"]))


@pytest.mark.parametrize("threshold", [2, 1, 5, True, "3"])
def test_a_threshold_of_half_or_beyond_all_is_refused(threshold):
    clients = {name: MaskingClient(name) for name in NAMES}
    keys = {name: client.keys(keys_request()) for name, client in clients.items()}
    with pytest.raises((PhaseError, WireError), match="threshold"):
        clients["ann"].shares(shares_request(keys, threshold=threshold))


def test_keys_that_are_not_ones_own_or_not_all_different_are_refused(four):
    ann = MaskingClient("ann")
    mine = ann.keys(keys_request())
    with pytest.raises(PhaseError, match="must hold this client's own as it gave them"):
        ann.shares(shares_request(four.keys))
    with pytest.raises(PhaseError, match="must differ"):
        ann.shares(shares_request({**four.keys, "ann": mine, "bob": four.keys["cyd"]}))


def test_shares_that_were_altered_or_come_from_strangers_are_refused(four):
    ann, request = four.clients["ann"], four.sum_request("ann")
    with pytest.raises(MaskKeyError, match="altered on its way"):
        ann.masked({**request, "sealed": {"bob": request["sealed"]["cyd"]}}, WORDS)
    with pytest.raises(PhaseError, match="shares of 'eve' are not expected"):
        ann.masked({**request, "sealed": {"eve": "00"}}, WORDS)
    with pytest.raises(PhaseError, match="neighbours whose shares it has"):
        ann.masked({**request, "sealed": {}}, WORDS)


@pytest.mark.parametrize(
    "changes", [{"session": "00"}, {"session": 7}, {"session": "zz" * 16}, {"sums": 0}, {"sums": 99}, {"sums": None}]
)
def test_requests_that_make_no_sense_are_refused(changes):
    with pytest.raises(WireError):
        MaskingClient("ann").keys(keys_request(**changes))
