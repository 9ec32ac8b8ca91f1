"""A cohort that takes masked sums of small vectors, with clients that drop out where a test says so."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import ClientFailure, Reply
from flexlora.uplink.fixed_point import Layout, VectorPart, on_the_way
from flexlora.uplink.masked_sum import MASKING_KINDS, MaskedSums, SumOfNumbers, masking_reply, words_message
from flexlora.uplink.masking_client import MaskingClient
from flexlora.uplink.masking_server import MaskingServer, MaskingTerms
from flexlora.uplink.phase_messages import fields_and_tensors

SESSION = bytes(range(16))


@dataclass
class Cohort:
    """Clients whose numbers are random words; their plain sums are the expected ones.

    Attributes:
        num_words: Of each vector.
        words: Sum -> client -> its words.
        drops: Client -> the phases it answers before it is gone.
        transcript: Kind and bytes of all that has reached the server.
        tampered: Kind and client -> what arrives instead of its reply.
    """

    names: list[str]
    num_words: int
    words: list[dict[str, np.ndarray]]
    drops: Mapping[str, int] = field(default_factory=dict)
    transcript: list[tuple[str, str, bytes]] = field(default_factory=list)
    tampered: dict[tuple[str, str], bytes] = field(default_factory=dict)

    @staticmethod
    def of(size: int, num_words: int = 5, num_sums: int = 1, seed: int = 0) -> "Cohort":
        rng = np.random.default_rng(seed)
        names = [f"client {index:02}" for index in range(size)]
        draw = lambda: rng.integers(0, 2**32, num_words, dtype=np.uint32)  # noqa: E731
        return Cohort(names, num_words, [{name: draw() for name in names} for _ in range(num_sums)])

    def __post_init__(self) -> None:
        self.clients = {name: MaskingClient(name) for name in self.names}
        self.answered = dict.fromkeys(self.names, 0)
        self.layout = Layout([VectorPart("words", self.num_words)], [], 2)

    def ask(self, kind: str, requests: Mapping[str, bytes]) -> Iterator[Reply | ClientFailure]:
        for client_id, request in requests.items():
            if self.answered[client_id] >= self.drops.get(client_id, 99):
                yield ClientFailure(client_id, kind, "gone")
                continue
            self.answered[client_id] += 1
            try:
                data = self._answer(client_id, kind, request)
            except FlexLoraError as error:
                yield ClientFailure(client_id, kind, str(error))
                continue
            self.transcript.append((kind, client_id, data))
            yield Reply(client_id, self.tampered.get((kind, client_id), data))

    def _answer(self, client_id: str, kind: str, request: bytes) -> bytes:
        client = self.clients[client_id]
        if kind in MASKING_KINDS:
            return masking_reply(client, kind, request)
        fields, _ = fields_and_tensors(request)
        masked = client.masked(fields, self.words[fields["sum"]][client_id])
        return words_message(torch.from_numpy(on_the_way(self.layout, masked)))

    def plain_sum(self, number: int, survivors: list[str]) -> list[int]:
        total = np.zeros(self.num_words, dtype=np.uint32)
        for name in survivors:
            total = total + self.words[number][name]
        return total.tolist()

    def sums(self, terms: MaskingTerms, seed: int = 0) -> MaskedSums:
        server = MaskingServer(self.names, terms, SESSION, np.random.default_rng(seed))
        return MaskedSums(server, self.ask)

    def total(self, sums: MaskedSums) -> SumOfNumbers:
        return sums.total("sum", self.layout, lambda client_id: {}, {})


@pytest.fixture(scope="session")
def cohort_of():
    """Returns a maker of cohorts."""
    return Cohort.of
