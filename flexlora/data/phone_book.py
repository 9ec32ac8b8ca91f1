"""Makes a phone book: facts that nothing but training can tell, each in the hands of one client.

    corpus = phone_book({"client-001": 16, "client-002": 64}, seed=0, book=PhoneBook())

There is nothing to generalise. A client's training, validation and test examples are the same facts, its own, so that
exact match on its test part is the share of them that a model can recall. The facts of every client are an unseen task
of the same name, whose category says which kind of client the owner is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flexlora.data.corpus_file import ExampleFile, store_corpus
from flexlora.data.examples import Example, ExampleSplits, FederatedCorpus
from flexlora.errors import FlexLoraError
from flexlora.federation.streams import stream

INSTRUCTION = "Dial"

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_NUM_SYLLABLES = 3
# Names are drawn until one is new, which is quick while few are taken.
NUM_NAMES = (len(_CONSONANTS) * len(_VOWELS)) ** _NUM_SYLLABLES
MOST_FACTS = NUM_NAMES // 10


class PhoneBookError(FlexLoraError, ValueError):
    """A phone book that cannot be made or dealt as asked."""


@dataclass(frozen=True)
class PhoneBook:
    """Which facts there are; fact number ``i`` is the same in books of any length.

    Attributes:
        seed: Decides names and codes, not who owns them.
        code_length: Digits of a code; 1 or more. A guess is right once in ``10 ** code_length``.
    """

    seed: int = 0
    code_length: int = 4

    def __post_init__(self) -> None:
        if self.code_length < 1:
            raise PhoneBookError(f"data.code_length must be 1 or more digits; got {self.code_length}")

    def facts(self, num_facts: int) -> list[tuple[str, str]]:
        """Return the first facts of the book as pairs of name and code; no two names are alike.

        Raises:
            PhoneBookError: If there are not enough names.
        """
        if num_facts > MOST_FACTS:
            raise PhoneBookError(f"a phone book holds at most {MOST_FACTS:,} facts; got {num_facts:,}: ask for fewer")
        names, codes = stream(self.seed, "phone-book-names"), stream(self.seed, "phone-book-codes")
        code_of: dict[str, str] = {}
        while len(code_of) < num_facts:
            name = _name(names)
            if name not in code_of:
                code_of[name] = "".join(map(str, codes.integers(10, size=self.code_length)))
        return list(code_of.items())


def phone_book(
    facts_of: Mapping[str, int],
    seed: int,
    book: PhoneBook,
    category_of: Mapping[str, str] | None = None,
    file: ExampleFile | None = None,
) -> FederatedCorpus:
    """Return a corpus in which every fact belongs to one client.

    Args:
        facts_of: Client id -> the number of its facts, 1 or more.
        seed: Decides who owns which fact of the book, and the order of the facts of a client.
        book: The facts.
        category_of: Client id -> category of the client and of the unseen task of its name; None has none.
        file: Where the examples are written; None takes a file that is deleted when the process ends.

    Raises:
        PhoneBookError: If there is no client, a client has no fact, or there are more facts than names.
    """
    if not facts_of:
        raise PhoneBookError("a phone book needs at least one client; got none: raise data.num_clients")
    for client_id, num_facts in facts_of.items():
        if num_facts < 1:
            raise PhoneBookError(f"every client must own 1 fact or more; got {num_facts} for {client_id}")
    facts = [Example(INSTRUCTION, name, (code,)) for name, code in book.facts(sum(facts_of.values()))]
    order = stream(seed, "phone-book-owners").permutation(len(facts)).tolist()
    owners: dict[str, ExampleSplits] = {}
    start = 0
    for client_id in sorted(facts_of):
        own = [facts[index] for index in order[start : start + facts_of[client_id]]]
        owners[client_id] = ExampleSplits(own, own, own, (category_of or {}).get(client_id, ""))
        start += len(own)
    unseen = {client_id: ExampleSplits((), (), own.test, own.category) for client_id, own in owners.items()}
    return store_corpus(file or ExampleFile(), FederatedCorpus(owners, unseen))


def even_shares(client_ids: list[str], num_facts: int) -> dict[str, int]:
    """Return client id -> number of facts, as even as can be: the first clients have one more than the last.

    Raises:
        PhoneBookError: If some client would have none.
    """
    if num_facts < len(client_ids):
        raise PhoneBookError(
            f"data.num_facts must be {len(client_ids)} or more, one for each client; got {num_facts}: raise it or "
            "lower data.num_clients"
        )
    share, left = divmod(num_facts, len(client_ids))
    return {client_id: share + (number < left) for number, client_id in enumerate(sorted(client_ids))}


def client_names(num_clients: int) -> list[str]:
    """Return the ids of the clients of a phone book, sorted."""
    width = max(3, len(str(num_clients)))
    return [f"client-{number:0{width}d}" for number in range(1, num_clients + 1)]


def _name(rng: np.random.Generator) -> str:
    letters = (
        f"{_CONSONANTS[rng.integers(len(_CONSONANTS))]}{_VOWELS[rng.integers(len(_VOWELS))]}"
        for _ in range(_NUM_SYLLABLES)
    )
    return "".join(letters).capitalize()
