"""Tokenises the training examples of a client once, when they are first asked for, and then reads them from files.

A file holds one record a client: a header, three numbers per example (length, tokens without loss at its start, whether
it was cut) and the tokens of all. Each record carries a checksum, and a file is good up to its last complete record: a
run that is killed loses at most the record it was writing. Every process writes a file of its own and reads all files.
"""

import hashlib
import json
import logging
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from flexlora.data.examples import Example
from flexlora.data.mapped_file import MappedFile
from flexlora.data.prompt_templates import Template
from flexlora.data.prompts import IGNORED, EncodedExample, LossOn, encode_many
from flexlora.federation.streams import stream

# Magic, client, examples, tokens, bytes of a token, checksum of those and of what follows.
_HEADER = struct.Struct("<4sIIIII")
_MAGIC = b"FLT2"
_CHECKSUM_BYTES = 4
_SUFFIX = ".tokens"

_log = logging.getLogger(__name__)


class EncodedClients:
    """Client id -> its training sequences.

    Args:
        client_ids: All clients, always in the same order.
        encode: Tokenises the examples of one client.
        folder: Where files are kept for later runs; what is there belongs to the same clients and the same ``encode``.
            None takes files that are deleted when the process ends.
    """

    def __init__(
        self,
        client_ids: Iterable[str],
        encode: Callable[[str], Sequence[EncodedExample]],
        folder: Path | None = None,
    ) -> None:
        self._numbers = {client_id: number for number, client_id in enumerate(client_ids)}
        self._encode, self._folder = encode, folder
        self._files: list[MappedFile] = []
        # Of each client: which file, and where in it. Arrays, because there is an entry for every client.
        self._file_of = np.full(len(self._numbers), -1, np.int32)
        self._start_of = np.zeros(len(self._numbers), np.int64)
        self._own: tuple[int, int] | None = None
        if folder is not None and folder.is_dir():
            # The newest last: a record that is there twice has replaced a damaged one.
            for path in sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns):
                self._read_places(path)

    def __call__(self, client_id: str) -> Sequence[EncodedExample]:
        """Return the sequences of a client."""
        number = self._numbers[client_id]
        if self._file_of[number] >= 0:
            examples = self._read(number)
            if examples is not None:
                return examples
            _log.warning("Kept tokens of client %s are damaged; the client is tokenised again.", client_id)
        examples = self._encode(client_id)
        content = _to_record(number, examples)
        index, file = self._own_file()
        self._file_of[number], self._start_of[number] = index, file.append(content)
        # At once, so that a process forked from this one does not write it a second time.
        file.flush()
        return examples

    def _read(self, number: int) -> list[EncodedExample] | None:
        file, start = self._files[self._file_of[number]], int(self._start_of[number])
        try:
            header = file.view(start, _HEADER.size)
            content = file.view(start, _HEADER.size + _payload_size(header))
        except (OSError, ValueError, struct.error):
            return None
        return _from_record(number, content)

    def _read_places(self, path: Path) -> None:
        """Note where the complete records of a file are."""
        try:
            file = MappedFile(path, writable=False)
            start, index = 0, len(self._files)
            while start + _HEADER.size <= file.size:
                header = file.view(start, _HEADER.size)
                magic, number, *_ = _HEADER.unpack(header)
                size = _HEADER.size + _payload_size(header)
                if magic != _MAGIC or number >= len(self._numbers) or start + size > file.size:
                    break
                self._file_of[number], self._start_of[number] = index, start
                start += size
        except (OSError, ValueError) as error:
            _log.warning("Kept tokens in %s cannot be read: %s.", path, error)
            return
        self._files.append(file)

    def _own_file(self) -> tuple[int, MappedFile]:
        """Return the file that this very process writes to, and its number."""
        if self._own is None or self._own[0] != os.getpid():
            self._own = os.getpid(), len(self._files)
            self._files.append(self._new_file())
        return self._own[1], self._files[self._own[1]]

    def _new_file(self) -> MappedFile:
        if self._folder is not None:
            try:
                self._folder.mkdir(exist_ok=True)
                handle, name = tempfile.mkstemp(_SUFFIX, dir=self._folder)
                os.close(handle)
                return MappedFile(Path(name))
            except OSError as error:
                _log.warning("Tokens are not kept for later runs: %s.", error)
        return MappedFile()


def encode_client(
    client_id: str,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    template: Template,
    max_length: int,
    loss_on: LossOn,
) -> list[EncodedExample]:
    """Return the training examples of a client as tokens; ``seed`` picks among their accepted answers."""
    rng = stream(seed, "answers", client_id)
    return encode_many(
        examples,
        tokenizer,
        template,
        max_length,
        loss_on=loss_on,
        answer_indices=[int(rng.integers(len(example.outputs))) for example in examples],
    )


def encoding_name(tokenizer: PreTrainedTokenizerBase, settings: Sequence[object]) -> str | None:
    """Return a name that differs whenever tokens could, None for tokenizers that cannot be serialised.

    Args:
        tokenizer: What makes tokens of texts.
        settings: All else that decides tokens, as plain values.
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(inner, tokenizers.Tokenizer):
        return None
    versions = [transformers.__version__, tokenizers.__version__]
    known = [versions, inner.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map, settings]
    return f"tokens-{hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()[:32]}"


def _to_record(number: int, examples: Sequence[EncodedExample]) -> bytes:
    hidden = [_num_hidden(example) for example in examples]
    facts = [
        (len(example.input_ids), start, example.truncated) for example, start in zip(examples, hidden, strict=True)
    ]
    tokens = [token for example in examples for token in example.input_ids]
    width = 2 if max(tokens, default=0) < 1 << 16 else 4
    payload = np.array(facts, "<u4").tobytes() + np.array(tokens, f"<u{width}").tobytes()
    header = _HEADER.pack(_MAGIC, number, len(examples), len(tokens), width, 0)
    return _HEADER.pack(_MAGIC, number, len(examples), len(tokens), width, _checksum(header, payload)) + payload


def _checksum(header: bytes | memoryview, payload: bytes | memoryview) -> int:
    """Return the CRC-32 of a record: its header, which ends in the checksum, without that, and what follows."""
    return zlib.crc32(payload, zlib.crc32(header[:-_CHECKSUM_BYTES]))


def _num_hidden(example: EncodedExample) -> int:
    """Return how many labels at the start are hidden; all others are the tokens themselves."""
    start = next((place for place, label in enumerate(example.labels) if label != IGNORED), len(example.labels))
    assert example.labels[start:] == example.input_ids[start:], "labels hide a prompt or nothing"
    return start


def _payload_size(header: memoryview) -> int:
    _, _, num_examples, num_tokens, width, _ = _HEADER.unpack(header)
    return 12 * num_examples + width * num_tokens


def _from_record(number: int, content: memoryview) -> list[EncodedExample] | None:
    """Return the sequences in a record, None if it is damaged or belongs to another client."""
    header, payload = content[: _HEADER.size], content[_HEADER.size :]
    magic, owner, num_examples, _, width, checksum = _HEADER.unpack(header)
    if magic != _MAGIC or owner != number or _checksum(header, payload) != checksum:
        return None
    facts = np.frombuffer(payload, "<u4", 3 * num_examples).reshape(num_examples, 3).tolist()
    tokens = np.frombuffer(payload, f"<u{width}", offset=12 * num_examples).tolist()
    examples, start = [], 0
    for length, hidden, truncated in facts:
        own = tuple(tokens[start : start + length])
        examples.append(EncodedExample(own, (IGNORED,) * hidden + own[hidden:], bool(truncated)))
        start += length
    return examples
