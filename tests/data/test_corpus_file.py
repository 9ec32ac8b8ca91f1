"""Examples in files: what is read back, and what identifies it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data.corpus_file import ExampleFile, store_corpus
from flexlora.data.examples import Example, ExampleSplits, FederatedCorpus

# Halves of surrogate pairs occur in scraped texts.
texts = st.text(st.characters(exclude_categories=()), max_size=20)
examples = st.builds(
    Example,
    texts,
    texts,
    st.lists(texts, min_size=1, max_size=3).map(tuple),
    st.lists(st.tuples(texts, texts), max_size=2).map(tuple),
)


def corpus(word="a"):
    def some(name, num):
        return tuple(Example("Do it.", f"{word} {name} {n}", (f"answer {n}", "other")) for n in range(num))

    clients = {
        f"client-{n}": ExampleSplits(some(f"{n} train", 8), some(f"{n} validation", n), some(f"{n} test", 1), "kind")
        for n in range(3)
    }
    return FederatedCorpus(clients, {"unseen": ExampleSplits((), (), some("unseen", 5))})


def plain(owners):
    return {
        name: ExampleSplits(tuple(own.train), tuple(own.validation), tuple(own.test), own.category)
        for name, own in owners.items()
    }


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(examples, max_size=4), min_size=1, max_size=4))
def test_whatever_is_written_is_read_back(owners):
    file = ExampleFile()
    records = [file.append(own) for own in owners]
    assert [file.read(record) for record in records] == [tuple(own) for own in owners]
    # What was mapped before the file grew can still be read.
    again = file.append(owners[0])
    assert file.read(again) == file.read(records[0])


def test_a_stored_corpus_equals_the_one_in_memory_and_knows_lengths_without_reading():
    file = ExampleFile()
    stored = store_corpus(file, corpus())
    assert plain(stored.clients) == corpus().clients and plain(stored.unseen) == corpus().unseen
    assert dict(stored.clients) == corpus().clients
    part = stored.clients["client-2"].train
    file.read = None  # type: ignore[method-assign]
    assert len(part) == 8 and list(stored.clients) == ["client-0", "client-1", "client-2"]
    assert not stored.clients["client-0"].validation and not list(stored.clients["client-0"].validation)


def test_parts_are_sequences():
    part = store_corpus(ExampleFile(), corpus()).clients["client-2"].train
    assert part[1:3] == corpus().clients["client-2"].train[1:3]
    assert part[-1] == corpus().clients["client-2"].train[-1] and part[0] in part
    with pytest.raises(IndexError):
        _ = part[8]


def test_the_hash_is_about_examples_and_not_about_places():
    one, other = ExampleFile(), ExampleFile()
    other.append([Example("x", "y", ("z",))])
    assert store_corpus(one, corpus()).hashes == store_corpus(other, corpus()).hashes
    changed = store_corpus(ExampleFile(), corpus("b")).hashes
    assert changed["clients"] != store_corpus(ExampleFile(), corpus()).hashes["clients"]
    moved = replace(corpus(), unseen=corpus().clients)
    assert (
        store_corpus(ExampleFile(), moved).hashes["unseen"] == store_corpus(ExampleFile(), corpus()).hashes["clients"]
    )


def test_tools_and_fields_of_turns_and_answers_are_kept():
    history = (("user", "q"), ("assistant", "c", '{"tool_calls": []}'), ("tool", "2", '{"name": "add"}'))
    examples = [Example("", "", ("a",), history, '[{"name": "add"}]', '{"tool_calls": []}'), Example("p", "", ("b",))]
    file = ExampleFile()
    assert file.read(file.append(examples)) == tuple(examples)
