"""Defines training examples and corpora, the same for all sources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

# Role and content; the third, if any, is a JSON object of what else a chat template is given for the turn.
Turn: TypeAlias = tuple[str, str] | tuple[str, str, str]


@dataclass(frozen=True)
class Example:
    """One instruction with its accepted answers.

    Without instruction and input, the answer follows the last turn of ``history``; without any, it is a text that
    stands alone, in no template.

    Attributes:
        instruction: The task definition or the user's request.
        input: The instance the instruction is applied to; may be empty.
        outputs: Accepted answers, at least one; training picks one, ROUGE-L takes the best over all.
        history: Earlier turns of a chat as (role, content) pairs; empty for single turns.
        tools: JSON list of the tools that the assistant may call; empty for none.
        answer_fields: JSON object of what else a chat template is given for the answer, such as its tool calls.
    """

    instruction: str
    input: str
    outputs: tuple[str, ...]
    history: tuple[Turn, ...] = ()
    tools: str = ""
    answer_fields: str = ""

    @property
    def is_text_alone(self) -> bool:
        """Whether there is nothing that the answer answers."""
        return not (self.instruction or self.input or self.history)


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
