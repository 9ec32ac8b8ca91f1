"""Expressions of others match what Python's own match, and none of them takes for ever."""

import re
import time

import pytest

from flexlora.patterns import MOST_SECONDS, PatternError, bounded_pattern

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "a" * 60 + "!")


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"layers\.\d+\.mlp",
        r"(.*\.)?(layers\.[0-9]+\.self_attn\.(q|k)_proj)$",
        "^model",
        "(?i)LM_HEAD",
        r"\.(?:1[0-9]|2)\.",
        "",
        "[ab]{3,}",
    ],
)
def test_an_expression_matches_where_pythons_own_does(pattern: str) -> None:
    assert [bounded_pattern(pattern).found_in(path) for path in PATHS] == [
        re.search(pattern, path) is not None for path in PATHS
    ]


@pytest.mark.parametrize("pattern", ["(a|aa)+$", "(a+)+$", "(a*)*!x", "(.*.*.*.*.*.*.*.*.*)x$", "(a|a)" * 40 + "$"])
def test_an_expression_that_would_backtrack_for_ever_is_refused_or_answered_in_time(pattern: str) -> None:
    start = time.process_time()
    try:
        assert not bounded_pattern(pattern).found_in("a" * 60 + "!")
    except PatternError as error:
        assert "takes more than 2 s to match" in str(error)
    assert time.process_time() - start < 3 * MOST_SECONDS


def test_slow_matches_add_up() -> None:
    pattern, start = bounded_pattern("(a|aa)+b"), time.process_time()
    with pytest.raises(PatternError, match="takes more than"):
        for length in range(20, 60):
            pattern.found_in("a" * length)
    assert time.process_time() - start < 4 * MOST_SECONDS


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "a" * 20_000, "(?P<n>a)(?P<n>b)", "a{99999999999999999999}", "*"])
def test_what_is_no_expression_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError, match="regular expression"):
        bounded_pattern(pattern)
