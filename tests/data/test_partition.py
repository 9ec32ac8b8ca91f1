"""Partitions: every row exactly once, the minimum kept, and the Dirichlet draw against its law."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flexlora.data.partition import PartitionError, by_id, dirichlet, fixed_validation, iid, train_validation_test


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_every_row_once(parts, num_rows):
    dealt = np.concatenate([np.asarray(part) for part in parts]) if len(parts) else np.array([])
    assert sorted(dealt.tolist()) == list(range(num_rows))


@given(num_clients=st.integers(1, 40), extra=st.integers(0, 200), min_rows=st.integers(1, 8), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_iid_deals_every_row_once_and_evenly(num_clients, extra, min_rows, seed):
    num_rows = num_clients * min_rows + extra
    parts = iid(num_rows, num_clients, rng(seed), min_rows)
    assert_every_row_once(parts, num_rows)
    sizes = [len(part) for part in parts]
    assert min(sizes) >= min_rows
    assert max(sizes) - min(sizes) <= 1


@given(
    num_clients=st.integers(1, 30),
    extra=st.integers(0, 200),
    min_rows=st.integers(0, 8),
    alpha=st.sampled_from([1e-8, 0.01, 0.5, 5.0, 1e4]),
    num_labels=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_dirichlet_deals_every_row_once_and_keeps_the_minimum(num_clients, extra, min_rows, alpha, num_labels, seed):
    num_rows = num_clients * min_rows + extra
    labels = rng(seed).integers(num_labels, size=num_rows).tolist()
    parts = dirichlet(labels, num_clients, alpha, rng(seed), min_rows)
    assert len(parts) == num_clients
    assert_every_row_once(parts, num_rows)
    assert min(len(part) for part in parts) >= min_rows


@pytest.mark.parametrize("alpha", [0.6, 2.0])
def test_the_share_of_a_client_in_a_label_follows_the_beta_law_of_a_dirichlet_draw(alpha):
    # One coordinate of Dirichlet(alpha, ..., alpha) over K clients is Beta(alpha, (K - 1) alpha).
    num_clients, num_rows = 5, 2000
    shares = [
        len(dirichlet(["same"] * num_rows, num_clients, alpha, rng(seed), 0)[2]) / num_rows for seed in range(400)
    ]
    assert stats.kstest(shares, stats.beta(alpha, (num_clients - 1) * alpha).cdf).pvalue > 1e-3


def test_labels_are_spread_independently_of_each_other():
    # The correlation of one client's shares in two labels is 0; 400 draws put it within 4 / sqrt(400).
    shares = []
    for seed in range(400):
        parts = dirichlet(["a", "b"] * 500, 4, 0.5, rng(seed), 0)
        shares.append([np.sum(parts[0] % 2 == 0), np.sum(parts[0] % 2 == 1)])
    assert abs(np.corrcoef(np.array(shares).T)[0, 1]) < 0.2


def test_a_large_alpha_approaches_an_even_deal():
    parts = dirichlet(["a", "b"] * 1000, 10, 1e6, rng(), 1)
    assert all(abs(len(part) - 200) <= 4 for part in parts)


def test_the_minimum_changes_only_clients_below_it_and_the_largest_ones():
    labels = rng().integers(4, size=400).tolist()
    free, filled = dirichlet(labels, 20, 0.2, rng(7), 0), dirichlet(labels, 20, 0.2, rng(7), 10)
    unchanged = sum(np.array_equal(a, b) for a, b in zip(free, filled, strict=True) if len(a) >= 10)
    assert min(map(len, free)) < 10
    assert unchanged > 0
    for before, after in zip(free, filled, strict=True):
        assert len(after) == 10 if len(before) < 10 else len(after) <= len(before)


def test_the_same_stream_gives_the_same_deal():
    labels = rng().integers(4, size=300).tolist()
    for first, second in zip(dirichlet(labels, 12, 0.5, rng(3), 5), dirichlet(labels, 12, 0.5, rng(3), 5), strict=True):
        np.testing.assert_array_equal(first, second)
    for first, second in zip(iid(300, 12, rng(3)), iid(300, 12, rng(3)), strict=True):
        np.testing.assert_array_equal(first, second)
    assert any(not np.array_equal(a, b) for a, b in zip(iid(300, 12, rng(3)), iid(300, 12, rng(4)), strict=True))


@given(ids=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=80))
def test_natural_ids_own_exactly_their_rows(ids):
    parts = by_id(ids)
    assert list(parts) == sorted(set(ids))
    assert_every_row_once(list(parts.values()), len(ids))
    assert all(ids[row] == name for name, part in parts.items() for row in part)


def test_too_few_rows_say_how_many_clients_are_possible():
    with pytest.raises(PartitionError, match="200 clients with at least 10 rows each need 2000 rows; got 150, enough"):
        iid(150, 200, rng(), 10)
    with pytest.raises(PartitionError, match=r"got 150, enough for 15: lower data.num_clients or data.min_examples"):
        dirichlet(["a"] * 150, 200, 0.5, rng(), 10)
    with pytest.raises(PartitionError, match=r"1 of 2 have fewer, for example 'b' with 1: 1 clients are possible"):
        by_id(["a", "a", "b"], min_rows=2)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_must_be_above_zero(alpha):
    with pytest.raises(PartitionError, match=r"data.dirichlet_alpha must be above 0; got"):
        dirichlet(["a"] * 10, 2, alpha, rng())


def test_a_partition_needs_a_client():
    with pytest.raises(PartitionError, match=r"data.num_clients must be 1 or more; got 0"):
        iid(10, 0, rng())


@given(num_rows=st.integers(0, 400), seed=st.integers(0, 9))
def test_splits_are_disjoint_and_four_fifths_are_for_training(num_rows, seed):
    train, validation, test = train_validation_test(num_rows, rng(seed))
    assert_every_row_once([train, validation, test], num_rows)
    assert len(validation) == len(test)
    if num_rows >= 3:
        assert len(test) == max(1, round(num_rows / 10))
        assert len(train) >= 1
    else:
        assert len(test) == 0


@dataclass(frozen=True)
class Owner:
    validation: tuple[str, ...]


def test_the_fixed_validation_set_takes_one_example_of_every_client_before_a_second_one():
    clients = {name: Owner(tuple(f"{name}{i}" for i in range(5))) for name in "abcd"}
    drawn = fixed_validation(clients, 6, rng(1))
    assert len(set(drawn)) == 6
    assert sorted(example[0] for example in drawn[:4]) == list("abcd")
    assert fixed_validation(dict(reversed(clients.items())), 6, rng(1)) == drawn


def test_the_fixed_validation_set_is_whatever_there_is_when_more_is_asked_for():
    clients = {"a": Owner(("a0",)), "b": Owner(()), "c": Owner(("c0", "c1"))}
    assert sorted(fixed_validation(clients, 99, rng())) == ["a0", "c0", "c1"]
    assert fixed_validation(clients, 0, rng()) == ()
    assert fixed_validation({}, 5, rng()) == ()


def test_items_of_several_rows_are_dealt_as_evenly_as_they_allow():
    num_rows = [20] * 10 + [1] * 40
    for parts in (
        iid(50, 4, np.random.default_rng(0), 10, num_rows),
        dirichlet([n % 3 for n in range(50)], 4, 0.05, np.random.default_rng(0), 10, num_rows),
    ):
        assert sorted(np.concatenate(parts).tolist()) == list(range(50))
        sizes = [sum(num_rows[item] for item in part) for part in parts]
        assert sum(sizes) == 240 and min(sizes) >= 10
    # No client can be further from the mean than the largest item.
    assert all(40 <= sum(num_rows[i] for i in part) <= 80 for part in iid(50, 4, np.random.default_rng(0), 1, num_rows))


def test_items_of_one_row_are_dealt_as_without_weights():
    labels = [n % 3 for n in range(100)]
    for own, weighted in (
        (iid(100, 7, np.random.default_rng(1), 3), iid(100, 7, np.random.default_rng(1), 3, [1] * 100)),
        (
            dirichlet(labels, 7, 0.1, np.random.default_rng(1), 3),
            dirichlet(labels, 7, 0.1, np.random.default_rng(1), 3, [1] * 100),
        ),
    ):
        assert all(np.array_equal(one, other) for one, other in zip(own, weighted, strict=True))


def test_too_few_prompts_for_so_many_clients_are_refused():
    with pytest.raises(PartitionError, match="4 clients with at least 10 rows each are not possible with 2 different"):
        iid(2, 4, np.random.default_rng(0), 10, [50, 50])
