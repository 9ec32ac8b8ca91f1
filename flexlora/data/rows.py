"""Keeps the rows of a data set in a file while they are read, and finds those that share a prompt.

In memory are a hash for each prompt and where its examples are; texts are not.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from flexlora.data.corpus_file import ExampleFile, Record
from flexlora.data.examples import Example

_HASH_BYTES = 16


@dataclass(frozen=True)
class Row:
    """One row of the data.

    Attributes:
        examples: One, or one per answer of a conversation; they always stay in the same part. None at all if the
            prompt or the answer is empty.
        label: Value of the label column, empty without one.
        client: Value of the client column, empty without one.
    """

    examples: tuple[Example, ...]
    label: str = ""
    client: str = ""


class StoredRows:
    """Rows with examples, numbered as they come, in groups of rows with the same prompts.

    Every row is trained on; rows of a group stay on one side of every split.

    Args:
        within_clients: Whether equal prompts of two clients make two groups.

    Attributes:
        labels: Row number -> label.
        clients: Row number -> client.
        num_read: Rows added, empty ones included.
        num_empty: Rows without examples; they are not kept.
        num_groups: Groups so far, numbered in the order in which their prompts first occur.
    """

    def __init__(self, *, within_clients: bool) -> None:
        self.labels: list[str] = []
        self.clients: list[str] = []
        self.num_read = self.num_empty = 0
        self._within_clients = within_clients
        self._file = ExampleFile()
        self._groups: dict[bytes, int] = {}
        self._names: dict[str, str] = {}
        # By row number: its group, where its record is, and where the hashes of its prompts begin and end.
        self._group_of, self._starts, self._sizes = array("Q"), array("Q"), array("Q")
        self._prompts, self._bounds = bytearray(), array("Q", [0])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_groups(self) -> int:
        """Number of groups of rows with the same prompts."""
        return len(self._groups)

    @property
    def num_repeated(self) -> int:
        """Rows whose prompts an earlier one has, too."""
        return len(self) - self.num_groups

    def add(self, row: Row) -> None:
        """Keep one more row."""
        self.num_read += 1
        if not row.examples:
            self.num_empty += 1
            return
        prompts = [prompt_hash(example) for example in row.examples]
        key = _hash(row.client if self._within_clients else "", *(prompt.hex() for prompt in prompts))
        self._group_of.append(self._groups.setdefault(key, len(self._groups)))
        record = self._file.append(row.examples)
        # One text for all rows of a client or a label.
        self.labels.append(self._names.setdefault(row.label, row.label))
        self.clients.append(self._names.setdefault(row.client, row.client))
        self._starts.append(record.start)
        self._sizes.append(record.size)
        self._prompts += b"".join(prompts)
        self._bounds.append(len(self._prompts))

    def groups(self, numbers: Iterable[int]) -> list[list[int]]:
        """Return these rows in groups with the same prompts, in the order in which they come."""
        groups: dict[int, list[int]] = {}
        for number in numbers:
            groups.setdefault(self._group_of[number], []).append(number)
        return list(groups.values())

    def examples(self, number: int) -> tuple[Example, ...]:
        """Return the examples of a row."""
        record = Record(self._starts[number], self._sizes[number], len(self.prompts(number)))
        return self._file.read(record)

    def merged(self, numbers: Sequence[int]) -> tuple[Example, ...]:
        """Return the examples of rows of one group as those of one row, which accepts the answers of all."""
        examples = self.examples(numbers[0])
        for number in numbers[1:]:
            examples = tuple(
                replace(ours, outputs=tuple(dict.fromkeys(ours.outputs + theirs.outputs)))
                for ours, theirs in zip(examples, self.examples(number), strict=True)
            )
        return examples

    def prompts(self, number: int) -> list[bytes]:
        """Return ``prompt_hash`` of every example of a row, without reading it."""
        start, stop = self._bounds[number], self._bounds[number + 1]
        return [bytes(self._prompts[place : place + _HASH_BYTES]) for place in range(start, stop, _HASH_BYTES)]


def prompt_hash(example: Example) -> bytes:
    """Return 16 bytes that identify everything an answer is generated from; a text that stands alone is its own.

    White space at the ends does not count: a prompt that differs in nothing else is no new one to be tested on.
    """
    if example.is_text_alone:
        return _hash(example.outputs)
    history = tuple((turn[0], turn[1].strip(), *turn[2:]) for turn in example.history)
    return _hash(history, example.instruction.strip(), example.input.strip(), *filter(None, [example.tools]))


def _hash(*parts: object) -> bytes:
    # ``repr`` also escapes halves of surrogate pairs, which scraped texts may hold.
    return blake2b(repr(parts).encode(), digest_size=_HASH_BYTES).digest()
