"""Examples in files: what is read back, what is kept for later runs, and what happens to damaged files."""

import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data import corpus_cache
from flexlora.data.corpus_cache import EXAMPLES_FILE, INDEX_FILE, MOST_CORPORA, files_state, kept_corpus
from flexlora.data.corpus_file import ExampleFile, store_corpus
from flexlora.data.examples import Example, ExampleSplits, FederatedCorpus
from flexlora.data.mapped_file import MappedFile, MappedFileError

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


def reader(made, word="a"):
    """Return what makes a corpus and notes that it was asked to."""

    def read(file):
        made.append(word)
        return store_corpus(file, corpus(word)), ("Left out: 1 row.",)

    return read


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


def test_a_corpus_is_made_once_and_opened_after_that(tmp_path):
    made: list[str] = []
    first, warnings = kept_corpus(tmp_path, {"seed": 0}, reader(made))
    second, again = kept_corpus(tmp_path, {"seed": 0}, reader(made))
    assert made == ["a"] and warnings == again == ("Left out: 1 row.",)
    assert first == second and first.folder == second.folder
    kept_corpus(tmp_path, {"seed": 1}, reader(made))
    kept_corpus(None, {"seed": 0}, reader(made))
    assert made == ["a", "a", "a"] and len(list(tmp_path.iterdir())) == 2


def test_what_others_could_read_is_closed_to_them(tmp_path):
    folder = kept_corpus(tmp_path, {}, reader([]))[0].folder
    assert folder is not None and folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", [EXAMPLES_FILE, INDEX_FILE])
@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "gone"])
def test_a_damaged_corpus_is_made_again(tmp_path, name, damage):
    made: list[str] = []
    whole, _ = kept_corpus(tmp_path, {}, reader(made))
    assert whole.folder is not None
    path = whole.folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        kept = {"truncated": content[:-9], "changed": content.replace(b"1", b"2", 1), "empty": b""}[damage]
        path.write_bytes(kept)
    again, _ = kept_corpus(tmp_path, {}, reader(made))
    assert made == ["a", "a"] and again == whole and again.folder == whole.folder
    assert kept_corpus(tmp_path, {}, reader(made))[0] == whole and len(made) == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_being_killed_while_writing_leaves_nothing_under_the_name(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from test_corpus_file import corpus
from flexlora.data.corpus_cache import kept_corpus
from flexlora.data.corpus_file import store_corpus
def read(file):
    store_corpus(file, corpus())
    file.flush()
    os._exit(9)
kept_corpus(Path({str(tmp_path)!r}), {{}}, read)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    assert ".partial-" in left.name
    made: list[str] = []
    kept_corpus(tmp_path, {}, reader(made))
    assert made == ["a"]


def test_two_runs_that_make_the_same_corpus_at_once_both_get_it(tmp_path):
    both, results, made = threading.Barrier(2), [], []

    def read(file):
        both.wait(timeout=30)
        return reader(made)(file)

    threads = [threading.Thread(target=lambda: results.append(kept_corpus(tmp_path, {}, read)[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [dict(result.clients) for result in results] == [corpus().clients] * 2
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_to_keeps_nothing_and_says_so(tmp_path, caplog):
    file = tmp_path / "file"
    file.touch()
    found, _ = kept_corpus(file, {}, reader([]))
    assert dict(found.clients) == corpus().clients and found.folder is None
    assert "cannot be written to" in caplog.text


def test_only_the_corpora_used_last_stay(tmp_path):
    (tmp_path / "somebody-elses").mkdir()
    folders = []
    for seed in range(MOST_CORPORA + 2):
        folder = kept_corpus(tmp_path, {"seed": seed}, reader([]))[0].folder
        assert folder is not None
        os.utime(folder, (seed, seed))
        folders.append(folder)
    assert [folder.exists() for folder in folders] == [False, False] + [True] * MOST_CORPORA
    assert (tmp_path / "somebody-elses").exists()


def test_other_code_or_other_files_are_another_corpus(tmp_path, monkeypatch):
    made: list[str] = []
    kept_corpus(tmp_path, {}, reader(made))
    monkeypatch.setattr(corpus_cache, "code_hash", lambda: "changed")
    kept_corpus(tmp_path, {}, reader(made))
    assert len(made) == 2
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.json").write_text("1")
    before = files_state(data)
    (data / "b.json").write_text("2")
    assert files_state(data) != before == files_state(data)[:1]


def test_a_file_that_ends_too_early_is_reported_by_name(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"abc")
    with pytest.raises(MappedFileError, match="short ends before byte 9"):
        MappedFile(path, writable=False).view(1, 8)
