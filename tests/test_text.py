"""Numbers, ranks and names as words."""

import math

import pytest

from flexlora import text


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ({"a.q_proj": 8, "b.q_proj": 8}, "8 in every module"),
        (
            {"l.0.q_proj": 30, "l.0.k_proj": 30, "l.0.up_proj": 200, "l.1.q_proj": 30},
            "30 (q, k), 200 (up)",
        ),
        ({"l.0.q_proj": 4, "l.1.q_proj": 8, "l.0.v_proj": 4}, "4 (v), 4–8 (q)"),
        ({}, "no modules"),
    ],
)
def test_ranks_are_described_in_few_words(ranks: dict[str, int], words: str) -> None:
    assert text.describe_ranks(ranks) == words


def test_short_names_stay_different_and_layers_count_upwards() -> None:
    modules = [f"model.layers.{layer}.{leaf}" for layer in (10, 2) for leaf in ("mlp.up_proj", "self_attn.q_proj")]
    ordered = sorted(modules, key=text.layer_order)
    assert text.short_names(ordered) == ["2.q", "2.up", "10.q", "10.up"]
    assert text.short_names(["model.lm_head"]) == ["lm_head"]
    assert text.short_names(["mlp.a", "self_attn.a"]) == ["mlp", "self_attn"]
    assert text.short_names(["a", "a.b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (text.number_text(1234567.0, 0), "1\u202f234\u202f567"),
        (text.number_text(-1.25, 2), "\u22121.25"),
        (text.number_text(math.nan), "–"),
        (text.number_text(None), "–"),
        (text.signed_text(3.04), "+3.0"),
        (text.signed_text(-0.04), "0.0"),
        (text.signed_text(-12.5), "\u221212.5"),
        (text.percent_text(0.1234), "12.3 %"),
        (text.bytes_text(0), "0 B"),
        (text.bytes_text(999), "999 B"),
        (text.bytes_text(1000), "1.0 kB"),
        (text.bytes_text(999_600), "1.0 MB"),
        (text.bytes_text(123_456_789), "123 MB"),
        (text.bytes_text(5.38e9), "5.4 GB"),
        (text.bytes_text(2.5e15), "2\u202f500.0 TB"),
        (text.bytes_text(None), "–"),
        (text.seconds_text(0.0304), "30 ms"),
        (text.seconds_text(59.94), "59.9 s"),
        (text.seconds_text(59.96), "1 min 00 s"),
        (text.seconds_text(3599.6), "1 h 00 min"),
        (text.seconds_text(7384), "2 h 03 min"),
        (text.seconds_text(None), "–"),
        (text.count_text(1, "client"), "1 client"),
        (text.count_text(1613, "client"), "1\u202f613 clients"),
    ],
)
def test_numbers_are_written_with_their_units(text: str, expected: str) -> None:
    assert text == expected
