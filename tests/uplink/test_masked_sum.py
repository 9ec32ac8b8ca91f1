"""Expected sums are plain sums of the survivors' words modulo 2^32, by numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flexlora.uplink.masking_server import MaskedSumError, MaskingTerms
from flexlora.uplink.phase_messages import fields_and_tensors, message

STAGES = 4
"""Phases of one sum: keys, shares, the sum, unmask."""


def survivors_of(drops, names, phase):
    """Returns who answered this phase, the first being 1, and all before it."""
    return [name for name in names if drops.get(name, 99) >= phase]


def test_without_dropouts_the_sum_is_the_plain_sum(cohort_of):
    cohort = cohort_of(6)
    sums = cohort.sums(MaskingTerms())
    sums.open()
    total = cohort.total(sums)
    assert total.counts["words"] == cohort.plain_sum(0, cohort.names)
    assert total.survivors == cohort.names and not sums.traffic.failures
    assert [(cost.kind, cost.num_asked, cost.num_answered) for cost in sums.traffic.costs] == [
        (kind, 6, 6) for kind in ("keys", "shares", "sum", "unmask")
    ]
    assert sum(cost.up_bytes for cost in sums.traffic.costs) == sum(sums.traffic.up_bytes.values())


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_with_permitted_dropouts_at_any_stage_the_sum_is_that_of_the_survivors(cohort_of, data):
    size = data.draw(st.integers(4, 11))
    num_neighbours = data.draw(st.sampled_from([None, None, 6, 8]))
    terms = MaskingTerms(num_sums=2, threshold=0.6, num_neighbours=num_neighbours)
    cohort = cohort_of(size, num_sums=2, seed=data.draw(st.integers(0, 99)))
    neighbours = size if num_neighbours is None else min(size, num_neighbours + 1)
    most = neighbours - terms.needed_of(neighbours, size)
    dropping = data.draw(st.lists(st.sampled_from(cohort.names), unique=True, max_size=most))
    cohort.drops = {name: data.draw(st.integers(0, 2 + 2 * 2)) for name in dropping}
    # Who is gone before the shares makes the neighbourhoods smaller, and the bound with them.
    late = [name for name in dropping if cohort.drops[name] >= 1]
    first = size - (len(dropping) - len(late))
    smaller = first if num_neighbours is None else min(first, num_neighbours + 1)
    if first < 3 or len(late) > smaller - terms.needed_of(smaller, first):
        return
    if size - len(dropping) < 3:
        return
    sums = cohort.sums(terms, seed=data.draw(st.integers(0, 99)))
    sums.open()
    for number in range(2):
        total = cohort.total(sums)
        expected = survivors_of(cohort.drops, cohort.names, 3 + 2 * number)
        assert total.survivors == expected
        assert total.counts["words"] == cohort.plain_sum(number, expected)
    assert set(sums.traffic.failures) == {name for name in dropping if cohort.drops[name] < 6}


@pytest.mark.parametrize("stage", range(STAGES))
def test_one_share_fewer_than_the_threshold_is_an_error_and_nothing_else(cohort_of, stage):
    cohort, terms = cohort_of(9), MaskingTerms(threshold=2 / 3)
    # 6 of 9 are needed, and 5 are left; where some never gave keys, 6 of the others are not.
    num_gone = {0: 7, 1: 4, 2: 4, 3: 4}[stage]
    cohort.drops = {name: stage for name in cohort.names[:num_gone]}
    sums = cohort.sums(terms)
    with pytest.raises(MaskedSumError, match=r"at least 3 clients|cannot be restored"):
        sums.open()
        cohort.total(sums)
    cohort = cohort_of(9)
    cohort.drops = {name: stage for name in cohort.names[: num_gone - 1]}
    if stage:
        sums = cohort.sums(terms)
        sums.open()
        survivors = survivors_of(cohort.drops, cohort.names, 3)
        assert cohort.total(sums).counts["words"] == cohort.plain_sum(0, survivors)


def test_a_masked_message_passes_a_test_of_uniformity(cohort_of):
    # 2^16 words that are all 7: of one message, the counts of each of its 256 byte values are compared with uniform.
    cohort = cohort_of(4, num_words=2**16)
    for words in cohort.words[0].values():
        words[:] = 7
    sums = cohort.sums(MaskingTerms())
    sums.open()
    cohort.total(sums)
    for kind, _, data in cohort.transcript:
        if kind == "sum":
            words = fields_and_tensors(data)[1]["words"].numpy()
            assert stats.chisquare(np.bincount(words, minlength=256)).pvalue > 1e-4
            assert stats.chisquare(np.bincount(words.view("<u2"), minlength=2**16)).pvalue > 1e-4


def test_the_servers_transcript_never_contains_an_unmasked_value(cohort_of):
    cohort = cohort_of(7, num_words=64)
    cohort.drops = {"client 01": 2, "client 04": 3}
    sums = cohort.sums(MaskingTerms(threshold=0.55))
    sums.open()
    cohort.total(sums)
    everything = b"".join(data for _, _, data in cohort.transcript)
    assert len(everything) > 7 * 256
    for name, words in cohort.words[0].items():
        for word in words:
            assert word.tobytes() not in everything, name
    client = cohort.clients["client 00"]
    secrets = [client._pairs[0].private, client._seeds[0]]
    assert not any(secret in everything or secret.hex().encode() in everything for secret in secrets)


def test_a_reply_that_is_damaged_or_wrong_costs_its_client_alone(cohort_of):
    cohort = cohort_of(10)
    cohort.tampered = {
        ("keys", "client 00"): b"\x00damaged",
        ("shares", "client 01"): message({"sealed": {"client 02": "ff"}}),
        ("sum", "client 02"): message({}),
        ("sum", "client 03"): message({}, {"words": torch.zeros(20, dtype=torch.bfloat16)}),
    }
    sums = cohort.sums(MaskingTerms(threshold=0.55))
    sums.open()
    total = cohort.total(sums)
    assert total.survivors == cohort.names[4:]
    assert total.counts["words"] == cohort.plain_sum(0, cohort.names[4:])
    assert {name: failure.stage for name, failure in sums.traffic.failures.items()} == {
        "client 00": "keys",
        "client 01": "shares",
        "client 02": "sum",
        "client 03": "sum",
    }


@pytest.mark.integration
@pytest.mark.parametrize(("num_neighbours", "num_rounds"), [(None, 4), (20, 25)])
def test_with_a_third_dropping_at_random_stages_no_sum_is_wrong(cohort_of, num_neighbours, num_rounds):
    rng, num_lost = np.random.default_rng(5), 0
    for server_round in range(num_rounds):
        cohort = cohort_of(32, num_words=3, seed=server_round)
        cohort.drops = {
            name: int(rng.integers(0, STAGES)) for name in rng.choice(cohort.names, size=round(0.3 * 32), replace=False)
        }
        sums = cohort.sums(MaskingTerms(threshold=0.55, num_neighbours=num_neighbours), seed=server_round)
        try:
            sums.open()
            total = cohort.total(sums)
        except MaskedSumError:
            num_lost += 1
            continue
        survivors = survivors_of(cohort.drops, cohort.names, 3)
        assert total.survivors == survivors
        assert total.counts["words"] == cohort.plain_sum(0, survivors)
    # 10 of 32 are never too many; of the 21 neighbours of one client 9 may be gone, and all 10 hardly ever are.
    assert num_lost == 0 if num_neighbours is None else num_lost <= 1
