"""Keeps the rows of a data set in a file while they are read, and merges rows that repeat a prompt.

In memory are a hash for each prompt and where its examples are; texts are not.
"""

from array import array
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
    """Rows with different prompts, numbered in the order in which their prompts first occur.

    A row with the prompts of an earlier one is merged into it: the earlier one accepts the answers of both and keeps
    its label and client.

    Args:
        within_clients: Whether equal rows of two clients stay apart, each with its own client.

    Attributes:
        labels: Row number -> label.
        clients: Row number -> client.
        num_read: Rows added, merged and empty ones included.
        num_empty: Rows without examples; they are not kept.
    """

    def __init__(self, *, within_clients: bool) -> None:
        self.labels: list[str] = []
        self.clients: list[str] = []
        self.num_read = self.num_empty = 0
        self._within_clients = within_clients
        self._file = ExampleFile()
        self._numbers: dict[bytes, int] = {}
        self._names: dict[str, str] = {}
        # By row number: where its record is, and where the hashes of its prompts begin and end.
        self._starts, self._sizes = array("Q"), array("Q")
        self._prompts, self._bounds = bytearray(), array("Q", [0])
        self._repeats: dict[int, list[Record]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_repeated(self) -> int:
        """Rows that were merged into an earlier one."""
        return self.num_read - self.num_empty - len(self)

    def add(self, row: Row) -> None:
        """Keep one more row, or merge it with the one that has the same prompts."""
        self.num_read += 1
        if not row.examples:
            self.num_empty += 1
            return
        prompts = [prompt_hash(example) for example in row.examples]
        key = _hash(row.client if self._within_clients else "", *(prompt.hex() for prompt in prompts))
        number = self._numbers.setdefault(key, len(self))
        record = self._file.append(row.examples)
        if number < len(self):
            self._repeats.setdefault(number, []).append(record)
            return
        # One text for all rows of a client or a label.
        self.labels.append(self._names.setdefault(row.label, row.label))
        self.clients.append(self._names.setdefault(row.client, row.client))
        self._starts.append(record.start)
        self._sizes.append(record.size)
        self._prompts += b"".join(prompts)
        self._bounds.append(len(self._prompts))

    def examples(self, number: int) -> tuple[Example, ...]:
        """Return the examples of a row, each with the answers of all rows merged into it."""
        record = Record(self._starts[number], self._sizes[number], len(self.prompts(number)))
        examples = self._file.read(record)
        for repeat in self._repeats.get(number, ()):
            examples = tuple(
                replace(ours, outputs=tuple(dict.fromkeys(ours.outputs + theirs.outputs)))
                for ours, theirs in zip(examples, self._file.read(repeat), strict=True)
            )
        return examples

    def prompts(self, number: int) -> list[bytes]:
        """Return ``prompt_hash`` of every example of a row, without reading it."""
        start, stop = self._bounds[number], self._bounds[number + 1]
        return [bytes(self._prompts[place : place + _HASH_BYTES]) for place in range(start, stop, _HASH_BYTES)]


def prompt_hash(example: Example) -> bytes:
    """Return 16 bytes that identify everything an answer is generated from."""
    return _hash(example.history, example.instruction, example.input)


def _hash(*parts: object) -> bytes:
    # ``repr`` also escapes halves of surrogate pairs, which scraped texts may hold.
    return blake2b(repr(parts).encode(), digest_size=_HASH_BYTES).digest()
