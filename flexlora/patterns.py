"""Matches regular expressions of others in bounded time: ten characters can keep Python's own busy for ever."""

import re
import time
from functools import lru_cache

import regex

from flexlora.errors import FlexLoraError

MOST_SECONDS = 2.0
"""CPU time of all slow matches of one expression together."""

LONGEST = 10_000

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
            PatternError: If it is none, or too long.
        """
        if len(pattern) > LONGEST:
            raise PatternError(f"a regular expression may have {LONGEST} characters; got {len(pattern)}: {pattern:.60}")
        self.pattern = pattern
        try:
            self._plain = re.compile(pattern)
            self._bounded = None if _LINEAR.fullmatch(pattern) else regex.compile(pattern, regex.VERSION0)
        except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
            raise PatternError(f"{pattern!r:.80} must be a regular expression ({error})") from error
        self._seconds = 0.0

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


@lru_cache(maxsize=4096)
def bounded_pattern(pattern: str) -> BoundedPattern:
    """Return a compiled expression, from an earlier call if there was one.

    Raises:
        PatternError: If it is none, or too long.
    """
    return BoundedPattern(pattern)
