"""Expressions of others match what Python's own match, and none of them takes for ever."""

import re
import time
import warnings

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


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj{e<=1}",
        "(?:q_proj){e<=1}",
        "[[:alpha:]]+",
        "[a&&b]+",
        "[a||b]+",
        "[a~~b]+",
        r"(?i)Q_PROJ+",
        r"(?i:Q)_pro+j",
        r"(?i)a(?-i:B)+c",
        r"(?a:\w)\w*é",
        r"(a)?(?(1)b|c)",
        r"(?P<n>a)(?P=n)\1*",
        r"(?<=\.)q_proj|(?<!b)c",
        r"(?>a+)b|a++!|a{2}?b",
        r"(?x) a b * # a comment",
        r"(?m)^b+$",
        r"a.b*|(?s:c.d*)",
        r"[\]\-^]+",
        r"[^\W\d]{2}",
        "{e<=1}|x{,3}y|a{e}+",
        "(|a)+b",
        r"\Aq|\bb\B|j\Z|\x41+",
        "ſ|(?i:s+)",
    ],
)
def test_an_expression_is_read_as_by_python_where_other_readers_differ(pattern: str) -> None:
    texts = [
        *PATHS,
        "q_projj",
        "q_pro",
        "q_proj{e<=1}",
        "{e<=1}",
        "x{,3}y",
        "xxy",
        "A",
        "a]",
        ":]",
        "&",
        "&]",
        "|",
        "~",
    ]
    texts += [
        "b]",
        "aé",
        "éé",
        "ab",
        "aab",
        "aBc",
        "abc",
        "ABC",
        "aa",
        "a\nb",
        "c\nd",
        "c",
        "b",
        "_1",
        "-",
        "s",
        "S",
        "",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [re.search(pattern, text) is not None for text in texts]
    assert [bounded_pattern(pattern).found_in(text) for text in texts] == expected


@pytest.mark.parametrize(
    "pattern", [r"\p{L}+", r"\L<words>", "(?r)a*", "(?b:a)*", "(?|a|b)+", r"\K*", "(?e)(?:a){e<=1}"]
)
def test_what_only_other_readers_take_is_refused(pattern: str) -> None:
    with pytest.raises(re.error):
        re.compile(pattern)
    with pytest.raises(PatternError, match="must be a regular expression"):
        bounded_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:(?:(?:q{999}){999}){999}){999}_proj",
        "(?:x{65535}){65535}",
        "((a{99,}){99,}){99,}",
        "(?=(?:(?:ab){999}?){999})|c",
        "(?i:" + "[\x00-\U0010ffff]" * 600 + ")",
    ],
)
def test_an_expression_that_would_compile_for_ever_is_refused_at_once(pattern: str) -> None:
    start = time.process_time()
    with pytest.raises(PatternError, match="without counted repeats inside repeats"):
        bounded_pattern(pattern)
    assert time.process_time() - start < 1


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
