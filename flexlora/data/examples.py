"""Defines training examples and corpora, the same for all sources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """One instruction with its accepted answers.

    Attributes:
        instruction: The task definition or the user's request.
        input: The instance the instruction is applied to; may be empty.
        outputs: Accepted answers, at least one; training picks one, ROUGE-L takes the best over all.
        history: Earlier turns of a chat as (role, content) pairs; empty for single turns.
    """

    instruction: str
    input: str
    outputs: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ExampleSplits:
    """The examples of one owner (a client's task, or an unseen task).

    The parts know their lengths; where they are stored in a file, examples are read from it when they are used.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    category: str = ""


@dataclass(frozen=True)
class FederatedCorpus:
    """Everything the experiment reads: data of clients, and tasks no client has.

    Attributes:
        clients: client id -> its examples.
        unseen: task id -> examples for zero-shot evaluation (their ``test`` part is scored).
        hashes: SHA-256 of all that ``clients`` and ``unseen`` hold, by these names; empty when it is not stored.
        folder: Where it is kept for later runs; None when it is not.
    """

    clients: Mapping[str, ExampleSplits]
    unseen: Mapping[str, ExampleSplits]
    hashes: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
