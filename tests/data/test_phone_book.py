"""A phone book: every fact has one owner, and nothing but the seeds decides which."""

import math

import pytest
from transformers import AutoTokenizer

from flexlora.data.phone_book import (
    INSTRUCTION,
    MOST_FACTS,
    PhoneBook,
    PhoneBookError,
    client_names,
    even_shares,
    phone_book,
)
from flexlora.data.pretraining import BASE_FOLDER
from flexlora.data.prompts import encode_many, num_labels

SHARES = {"a": 3, "b": 10, "c": 1}


def names_of(examples):
    return [example.input for example in examples]


def pairs_of(corpus):
    return {(example.input, *example.outputs) for own in corpus.clients.values() for example in own.train}


def test_every_fact_belongs_to_exactly_one_client():
    corpus = phone_book(SHARES, 0, PhoneBook())
    assert {name: len(own.train) for name, own in corpus.clients.items()} == SHARES
    owned = [name for own in corpus.clients.values() for name in names_of(own.train)]
    assert len(owned) == len(set(owned)) == 14
    assert pairs_of(corpus) == set(PhoneBook().facts(14))


def test_a_client_is_tested_on_the_facts_that_it_learns_and_so_is_its_unseen_task():
    corpus = phone_book(SHARES, 0, PhoneBook(), {"a": "small", "b": "large", "c": "small"})
    assert corpus.unseen.keys() == corpus.clients.keys()
    for name, own in corpus.clients.items():
        assert list(own.train) == list(own.validation) == list(own.test) == list(corpus.unseen[name].test)
        assert not corpus.unseen[name].train and not corpus.unseen[name].validation
    assert {name: own.category for name, own in corpus.unseen.items()} == {"a": "small", "b": "large", "c": "small"}


def test_names_are_made_of_syllables_and_codes_have_the_length_asked_for():
    facts = PhoneBook(seed=3, code_length=6).facts(500)
    assert len({name for name, _ in facts}) == 500
    for name, code in facts:
        assert len(name) == 6 and name.isalpha() and name == name.capitalize()
        assert len(code) == 6 and code.isdigit()
    # Each digit in a tenth of 3,000 places, give or take five standard deviations.
    digits = "".join(code for _, code in facts)
    for digit in "0123456789":
        assert abs(digits.count(digit) - 300) < 5 * math.sqrt(3000 * 0.1 * 0.9)


def test_a_longer_book_begins_with_the_shorter_one_and_another_seed_gives_another_book():
    assert PhoneBook(seed=1).facts(40)[:7] == PhoneBook(seed=1).facts(7)
    assert not set(PhoneBook(seed=1).facts(40)) & set(PhoneBook(seed=2).facts(40))


def test_the_same_seeds_give_the_same_corpus_and_another_seed_other_owners_of_the_same_facts():
    first, again, other = (phone_book(SHARES, seed, PhoneBook()) for seed in (0, 0, 1))
    assert first.hashes == again.hashes
    assert pairs_of(first) == pairs_of(other) and first.hashes["clients"] != other.hashes["clients"]


def test_shares_are_even_and_the_first_clients_have_the_rest():
    assert even_shares(["b", "c", "a"], 8) == {"a": 3, "b": 3, "c": 2}
    assert even_shares(["a", "b"], 2) == {"a": 1, "b": 1}


def test_client_names_are_sorted_whatever_their_number():
    names = client_names(1200)
    assert names == sorted(names) and (names[0], names[-1]) == ("client-0001", "client-1200")
    assert client_names(2) == ["client-001", "client-002"]


def test_what_cannot_be_made_says_why_and_what_to_change():
    with pytest.raises(PhoneBookError, match=r"data.code_length must be 1 or more digits; got 0"):
        PhoneBook(code_length=0)
    with pytest.raises(PhoneBookError, match=f"at most {MOST_FACTS:,} facts; got {MOST_FACTS + 1:,}"):
        PhoneBook().facts(MOST_FACTS + 1)
    with pytest.raises(PhoneBookError, match=r"data.num_facts must be 2 or more, one for each client; got 1"):
        even_shares(["a", "b"], 1)
    with pytest.raises(PhoneBookError, match="1 fact or more; got 0 for b"):
        phone_book({"a": 1, "b": 0}, 0, PhoneBook())
    with pytest.raises(PhoneBookError, match=r"at least one client; got none: raise data.num_clients"):
        phone_book({}, 0, PhoneBook())


def test_the_largest_book_can_be_made():
    assert len({name for name, _ in PhoneBook().facts(MOST_FACTS)}) == MOST_FACTS


def test_the_embedded_base_reads_a_fact_in_few_tokens_and_answers_with_one_a_digit():
    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    examples = phone_book({"a": 200}, 0, PhoneBook()).clients["a"].train
    encoded = encode_many(list(examples), tokenizer, "plain", 32)
    assert max(len(example.input_ids) for example in encoded) <= 20 and not any(one.truncated for one in encoded)
    # Four digits and the end of the sequence.
    assert {num_labels(example.labels) for example in encoded} == {5}
    assert {example.instruction for example in examples} == {INSTRUCTION}
