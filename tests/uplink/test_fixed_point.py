"""Expected integers are Python's, which have no modulus."""

import numpy as np
import pytest
from scipy import stats

from flexlora.uplink.fixed_point import (
    FixedPointError,
    Layout,
    VectorPart,
    arrived,
    decoded,
    encoded,
    num_clipped,
    on_the_way,
)


def layout_of(num_clients=5, word_bits=32):
    counts = [VectorPart("examples", 2)]
    return Layout(counts, [VectorPart("A", 6, 0.5), VectorPart("B", 4, 20.0)], num_clients, word_bits)


def numbers_of(client, size=(6, 4)):
    rng = np.random.default_rng(client)
    return {"A": rng.uniform(-0.5, 0.5, size[0]), "B": rng.uniform(-20, 20, size[1])}


@pytest.mark.parametrize("word_bits", [16, 24, 32])
def test_the_sum_of_words_stands_for_the_sum_of_numbers(word_bits):
    layout, total, expected = layout_of(word_bits=word_bits), None, {"A": 0.0, "B": 0.0}
    for client in range(5):
        words = encoded(layout, {"examples": [client, 10]}, numbers_of(client), np.random.default_rng(100 + client))
        data = on_the_way(layout, words)
        assert num_clipped(layout, numbers_of(client)) == 0 and len(data) == layout.num_bytes == 8 + 10 * word_bits // 8
        words = arrived(layout, data)
        total = words if total is None else total + words
        expected = {name: expected[name] + values for name, values in numbers_of(client).items()}
    counts, values = decoded(layout, total)
    assert counts == {"examples": [10, 50]}
    for part in layout.values:
        step = part.largest / ((2 ** (word_bits - 1) - 1) // 5)
        assert np.abs(values[part.name] - expected[part.name]).max() <= 5 * step
        assert np.allclose(values[part.name] / step, np.round(values[part.name] / step), atol=1e-6)


@pytest.mark.parametrize("word_bits", [16, 24, 32])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_sum_leaves_the_modulus_however_large_its_terms(word_bits, sign):
    layout = Layout([VectorPart("examples", 1)], [VectorPart("A", 3, 0.25)], 1000, word_bits)
    huge, rng = {"A": np.full(3, sign * 1e30)}, np.random.default_rng(0)
    total = np.zeros(4, dtype=np.uint32)
    for _ in range(1000):
        words = encoded(layout, {"examples": [layout.most_counted]}, huge, rng)
        total = total + words
        assert num_clipped(layout, huge) == 3
    counts, values = decoded(layout, arrived(layout, on_the_way(layout, total)))
    assert counts == {"examples": [1000 * layout.most_counted]}
    assert values["A"] == pytest.approx(np.full(3, sign * 250.0))


def test_rounding_is_unbiased_and_rounds_to_a_neighbour():
    layout = Layout([], [VectorPart("A", 20_000, 1.0)], 3, 16)
    step, value = 1 / ((2**15 - 1) // 3), 0.123456
    words = encoded(layout, {}, {"A": np.full(20_000, value)}, np.random.default_rng(1))
    found = decoded(layout, words)[1]["A"]
    low = np.floor(value / step)
    assert set(np.round(found / step)) == {low, low + 1}
    ups = int((np.round(found / step) > low).sum())
    assert stats.binomtest(ups, 20_000, value / step - low).pvalue > 1e-3


@pytest.mark.parametrize(
    ("counts", "values", "message"),
    [
        ({"examples": [1, 2**31 // 5 + 1]}, {}, "have room in a sum of 5 clients"),
        ({"examples": [1, -1]}, {}, "0 to 429496729 have room"),
        ({"examples": [1]}, {}, "2 counts of 0"),
        ({}, {"A": np.array([1.0, 0, 0, 0, 0, np.nan])}, "A: 6 finite numbers"),
        ({}, {"B": np.zeros(3)}, "B: 4 finite numbers are needed; got 3"),
    ],
)
def test_what_has_no_place_is_refused(counts, values, message):
    with pytest.raises(FixedPointError, match=message):
        encoded(layout_of(), {"examples": [1, 2], **counts}, {**numbers_of(0), **values}, np.random.default_rng(0))


def test_layouts_without_room_are_refused():
    with pytest.raises(FixedPointError, match=r"16 bits must hold the sum of 40000 clients.*word_bits=32"):
        layout_of(40_000, 16)
    for bound in (None, 0.0, float("inf")):
        with pytest.raises(FixedPointError, match="A: a bound must be positive and finite"):
            Layout([], [VectorPart("A", 1, bound)], 5)


def test_a_vector_of_another_size_is_refused():
    with pytest.raises(FixedPointError, match="has 48 bytes; got 47"):
        arrived(layout_of(), np.zeros(47, dtype=np.uint8))
