"""Whatever is wrong with a text of somebody else is one error that says where, and takes no time to find."""

import time

import pytest
import yaml

from flexlora.foreign import ForeignError, read_json, read_yaml

NESTED_ANCHORS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9)
)
NESTED_MERGES = "a0: &a0 {k: v}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("seed: 2024-13-45", "line 1, column 7.*2024-13-45.* is no timestamp"),
        ("a: 1\nb: !!int foo", "line 2, column 4.*foo.* is no int"),
        ("a: !!float x", "is no float"),
        ("a: !!bool maybe", "is no bool"),
        ("a: !!timestamp never", "is no timestamp"),
        ("a: !!binary '\u00fc'", "binary|base64"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        (f"a: {'9' * 5000}", "is no int"),
        ("? [a]\n: 1", "unhashable|hashable"),
        ("a: [1", "expected ',' or ']'"),
        ("a: \x07", r"U\+0007"),
        ("a: &a [*a]", "must not hold its own alias"),
        ("&a {b: *a}", "must not hold its own alias"),
        ("[" * 5000, "nested 100 deep"),
        ("[" * 120 + "]" * 120, "nested 100 deep"),
        ("a: 1\n---\nb: 2", "document"),
        (NESTED_ANCHORS, "aliases .* stand for"),
        (NESTED_MERGES, "aliases .* stand for"),
        ("a: *b", "undefined alias"),
        ("rank: 1\nalpha: 2\nrank: 3", "'rank' is there twice, in lines 1 and 3"),
        ('a: "\\ud800"', "half of a surrogate pair"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else value,
)
def test_what_is_wrong_with_yaml_is_one_error_at_once(text: str, why: str) -> None:
    start = time.process_time()
    with pytest.raises(ForeignError, match=f"(?s)place.yaml: .*({why})"):
        read_yaml(text, "place.yaml")
    assert time.process_time() - start < 5


def test_bytes_that_are_no_text_are_one_error_too() -> None:
    with pytest.raises(ForeignError, match=r"place: not valid YAML: .*utf-8"):
        read_yaml(b"a: \xff", "place")
    with pytest.raises(ForeignError, match=r"place: not valid JSON: .*utf-8"):
        read_json(b'{"a": "\xff"}', "place")


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [x, 2.5, null, true, 2024-01-02]\n",
        "base: &base {rank: 8, alpha: 16}\nbig: {<<: *base, rank: 30}\nsame: *base\n",
        "",
        "# nothing",
        "\ufeffa: ü",
        "&x a: *x",
    ],
)
def test_what_is_right_reads_as_yaml_reads_it(text: str) -> None:
    assert read_yaml(text, "here") == yaml.safe_load(text)
    assert read_yaml(text.encode(), "here") == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text", ["{", "", "[" * 100_000, '{"a":' * 200 + "1" + "}" * 200, "1" * 5000, '{"a": 1} x', "\x00"]
)
def test_what_is_wrong_with_json_is_one_error(text: str) -> None:
    with pytest.raises(ForeignError, match=r"rows.jsonl, line 3: not valid JSON"):
        read_json(text, "rows.jsonl, line 3")


def test_json_reads_with_and_without_a_mark_at_its_start() -> None:
    assert read_json(b'\xef\xbb\xbf{"a": [1, "\xc3\xbc"]}', "here") == {"a": [1, "ü"]}
    assert read_json('{"a": [[[]]]}', "here") == {"a": [[[]]]}


def test_control_characters_of_a_text_are_escaped_in_its_error() -> None:
    with pytest.raises(ForeignError) as caught:
        read_yaml('a: !!int "\\e[31mred"', "here")
    assert "\x1b" not in str(caught.value) and "red" in str(caught.value)
