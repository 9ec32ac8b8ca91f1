"""Matches regular expressions of others in bounded time: ten characters can keep Python's own busy for ever."""

import re
import time
import warnings
from functools import lru_cache

import regex

from flexlora.errors import FlexLoraError
from flexlora.pattern_tree import measure, parsed, unambiguous

MOST_SECONDS = 2.0
"""CPU time of all slow matches of one expression together."""

LONGEST = 10_000

MOST_PARTS = 100_000
"""Of an expression whose repeats are written out: ``(ab){3}`` has about six. To compile more can take for ever."""

WIDEST = 2_500_000
"""Characters in all ranges of an expression together, ``[a-z]`` having 26; compiling lists them."""

SLOW = 0.01
"""CPU seconds from which on a match counts as slow."""

_LINEAR = re.compile(r"[^*+?{(|]*")
"""Expressions without repeats and alternatives, which cannot backtrack."""


class PatternError(FlexLoraError, ValueError):
    """A text that is no regular expression, or one that takes too long."""


class BoundedPattern:
    """A regular expression, read as Python's ``re`` reads it, whose matches end in bounded time."""

    def __init__(self, pattern: str) -> None:
        """Compile an expression.

        Raises:
            PatternError: If it is none, too long, or repeats too much within repeats.
        """
        if len(pattern) > LONGEST:
            raise PatternError(f"a regular expression may have {LONGEST} characters; got {len(pattern)}: {pattern:.60}")
        self.pattern = pattern
        try:
            tree = parsed(pattern)
            self._check_size(*measure(tree))
            self._plain = _compiled(pattern)
            linear = _LINEAR.fullmatch(pattern)
            self._bounded = None if linear else regex.compile(unambiguous(tree), regex.VERSION0)
        except PatternError:
            raise
        except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
            raise PatternError(f"{pattern!r:.80} must be a regular expression ({error})") from error
        self._seconds = 0.0

    def _check_size(self, num_parts: int, spanned: int) -> None:
        if num_parts > MOST_PARTS or spanned > WIDEST:
            raise PatternError(
                f"a regular expression may stand for {MOST_PARTS} characters with its repeats written out, and its "
                f"ranges for {WIDEST}; {self.pattern!r:.80} stands for {num_parts:.3g} and {spanned:.3g}: write it "
                "without counted repeats inside repeats"
            )

    def found_in(self, text: str) -> bool:
        """Return whether the expression matches anywhere in a text, as with ``re.search``.

        Raises:
            PatternError: If its slow matches have taken too long together.
        """
        if self._bounded is None:
            return self._plain.search(text) is not None
        start = time.process_time()
        try:
            found = self._bounded.search(text, timeout=max(MOST_SECONDS - self._seconds, SLOW)) is not None
        except TimeoutError:
            raise PatternError(
                f"the regular expression {self.pattern!r:.80} takes more than {MOST_SECONDS:g} s to match; write it "
                "without repeats inside repeats"
            ) from None
        if (seconds := time.process_time() - start) > SLOW:
            self._seconds += seconds
        return found


def _compiled(pattern: str) -> "re.Pattern[str]":
    with warnings.catch_warnings():
        # What a later Python may read differently is text to this one.
        warnings.simplefilter("ignore")
        return re.compile(pattern)


@lru_cache(maxsize=4096)
def bounded_pattern(pattern: str) -> BoundedPattern:
    """Return a compiled expression, from an earlier call if there was one.

    Raises:
        PatternError: If it is none, too long, or repeats too much within repeats.
    """
    return BoundedPattern(pattern)
