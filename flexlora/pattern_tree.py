"""Writes expressions of Python's ``re`` so that the package ``regex`` reads them alike, and measures them first.

To ``regex``, ``{e<=1}`` is an approximate match, ``[[:alpha:]]`` a class and ``(?r)`` a search from the end; to ``re``
these are other text or an error. What ``re`` has understood is therefore written anew, without anything that the two
read differently. Its tree is internal to Python but has kept its shape since 3.7; a part that is not known is an error.
"""

import re
import warnings
from collections.abc import Iterable
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

FLAGS = {re.IGNORECASE: "i", re.MULTILINE: "m", re.DOTALL: "s", re.ASCII: "a", re.UNICODE: "u"}
PLACES = {
    "AT_BEGINNING": "^",
    "AT_BEGINNING_STRING": r"\A",
    "AT_END": "$",
    "AT_END_STRING": r"\Z",
    "AT_BOUNDARY": r"\b",
    "AT_NON_BOUNDARY": r"\B",
}
CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}
REPEATS = {"MAX_REPEAT": "", "MIN_REPEAT": "?", "POSSESSIVE_REPEAT": "+"}
GROUPS = {("ASSERT", 1): "(?=", ("ASSERT", -1): "(?<=", ("ASSERT_NOT", 1): "(?!", ("ASSERT_NOT", -1): "(?<!"}


def parsed(pattern: str) -> Any:
    """Return the tree that ``re`` makes of an expression; it takes time in proportion to its length.

    Raises:
        re.error: If it is none. OverflowError, RecursionError and ValueError occur too.
    """
    with warnings.catch_warnings():
        # Of what a later Python may read differently; this one reads it as text.
        warnings.simplefilter("ignore")
        return _parser.parse(pattern)


def measure(tree: Any) -> tuple[int, int]:
    """Return how many parts a tree has once its repeats are written out, and how many characters its ranges span."""
    parts, spanned = 0, 0
    for kind, value in tree:
        inner = [measure(branch) for branch in _subtrees(str(kind), value)]
        size = sum(own for own, _ in inner)
        if str(kind) in REPEATS:
            low, high, _ = value
            size *= max(1, int(low), 0 if high == _parser.MAXREPEAT else int(high))
        size += 1
        if str(kind) == "IN":
            spanned += sum(high_low[1] - high_low[0] + 1 for part, high_low in value if str(part) == "RANGE")
            size += len(value)
        parts, spanned = parts + size, spanned + sum(own for _, own in inner)
    return parts, spanned


def unambiguous(tree: Any) -> str:
    """Return an expression in the syntax of ``regex`` (version 0) that means what a tree means.

    Raises:
        ValueError: If the tree has a part that is not known here.
    """
    flags = "".join(letter for flag, letter in FLAGS.items() if tree.state.flags & flag)
    return (f"(?{flags})" if flags else "") + _written(tree)


def _subtrees(kind: str, value: Any) -> Iterable[Any]:
    """Return the trees below a node."""
    if kind in REPEATS:
        return [value[2]]
    if kind == "BRANCH":
        return value[1]
    if kind == "SUBPATTERN":
        return [value[3]]
    if kind == "ATOMIC_GROUP":
        return [value]
    if kind in ("ASSERT", "ASSERT_NOT"):
        return [value[1]]
    if kind == "GROUPREF_EXISTS":
        return [branch for branch in value[1:] if branch is not None]
    return []


def _written(tree: Any) -> str:
    return "".join(_node(str(kind), value) for kind, value in tree)


def _node(kind: str, value: Any) -> str:
    """Return one node and what is below it."""
    below = [_written(branch) for branch in _subtrees(kind, value)]
    if kind in REPEATS:
        low, high, _ = value
        return f"(?:{below[0]}){{{low},{'' if high == _parser.MAXREPEAT else high}}}{REPEATS[kind]}"
    if kind == "SUBPATTERN":
        return f"({_opened(*value[:3])}{below[0]})"
    if kind == "GROUPREF_EXISTS":
        return f"(?(g{value[0]}){'|'.join(below)})"
    if (kind, value[0] if kind in ("ASSERT", "ASSERT_NOT") else None) in GROUPS:
        return f"{GROUPS[kind, value[0]]}{below[0]})"
    written = {
        "LITERAL": lambda: _letter(value),
        "NOT_LITERAL": lambda: f"[^{_letter(value)}]",
        "ANY": lambda: ".",
        "AT": lambda: PLACES[str(value)],
        "IN": lambda: f"[{''.join(_member(str(part), own) for part, own in value)}]",
        "BRANCH": lambda: f"(?:{'|'.join(below)})",
        "ATOMIC_GROUP": lambda: f"(?>{below[0]})",
        "GROUPREF": lambda: f"(?P=g{value})",
        "FAILURE": lambda: "(?!)",
    }
    if kind not in written:
        raise ValueError(f"{kind} is not known")
    return written[kind]()


def _opened(group: int | None, added: int, removed: int) -> str:
    """Return how a group begins, after its parenthesis."""
    if group is not None:
        return f"?P<g{group}>"
    if added & re.UNICODE:
        raise ValueError("the flag u for a part of an expression is not known here")
    on, off = ("".join(letter for flag, letter in FLAGS.items() if given & flag) for given in (added, removed))
    return f"?{on}{'-' if off else ''}{off}:"


def _member(kind: str, value: Any) -> str:
    """Return one part of a set of characters."""
    if kind == "NEGATE":
        return "^"
    if kind == "RANGE":
        return f"{_letter(value[0])}-{_letter(value[1])}"
    return CATEGORIES[str(value)] if kind == "CATEGORY" else _letter(value)


def _letter(code: int) -> str:
    return chr(code) if chr(code).isascii() and chr(code).isalnum() else f"\\U{code:08x}"
