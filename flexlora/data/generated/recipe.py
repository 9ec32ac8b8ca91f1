"""Defines a generated task before it has a number: what it computes, its wordings, how an instance is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

# A task with fewer different inputs could not be divided into training, validation and test examples.
FEWEST_INPUTS = 10

# Draws one instance: the input text and its answer.
MakeInstance = Callable[[Random], tuple[str, str]]


@dataclass(frozen=True)
class Recipe:
    """One task before it has a number.

    Attributes:
        family: Prefix of the task id.
        category: The family in words, as Natural Instructions names its categories.
        computes: What the task computes, unique among all recipes; the split depends on nothing else.
        phrasings: Alternative definitions, all with the same meaning.
    """

    family: str
    category: str
    computes: str
    phrasings: tuple[str, ...]
    make: MakeInstance = field(compare=False, repr=False)


def capitalised(text: str) -> str:
    """Return the text with its first letter in upper case and the rest as it was."""
    return text[:1].upper() + text[1:]


def either(words: Sequence[str]) -> str:
    """Return two or more words with commas, and ``or`` before the last."""
    return ", ".join(words[:-1]) + " or " + words[-1]


def with_article(noun: str) -> str:
    """Return the noun behind the right indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun
