"""Corpora kept for later runs: when they are opened, rebuilt, closed to others and deleted."""

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flexlora.data import corpus_cache
from flexlora.data.corpus_cache import EXAMPLES_FILE, INDEX_FILE, MOST_CORPORA, code_hash, files_state, kept_corpus
from flexlora.data.corpus_file import store_corpus
from flexlora.data.examples import Example, ExampleSplits, FederatedCorpus


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
def test_a_corpus_that_fails_its_hash_is_rebuilt(tmp_path, name, damage):
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
from test_corpus_cache import corpus
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
    monkeypatch.setattr(corpus_cache, "code_hash", lambda _: "changed")
    kept_corpus(tmp_path, {}, reader(made))
    assert len(made) == 2
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.json").write_text("1")
    before = files_state(data)
    (data / "b.json").write_text("2")
    assert files_state(data) != before == files_state(data)[:1]


def test_code_that_decides_a_corpus_decides_its_name(tmp_path):
    made: list[str] = []
    code = tmp_path / "code.py"
    code.write_text("1")
    before = code_hash((code,))
    kept_corpus(tmp_path / "kept", {}, reader(made), [code])
    code_hash.cache_clear()
    code.write_text("2")
    assert code_hash((code,)) != before
    kept_corpus(tmp_path / "kept", {}, reader(made), [code])
    assert made == ["a", "a"]


def test_the_hash_covers_all_of_the_package_that_the_data_room_uses():
    # Errors, seals and limits of time decide no corpus; all else that the room imports must be hashed.
    room = Path(corpus_cache.__file__).parent
    used = set()
    for path in room.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flexlora."):
                used.add(node.module)
    outside = {module for module in used if not module.startswith("flexlora.data")}
    undecided = {"flexlora.errors", "flexlora.seal", "flexlora.time_limit"}
    assert outside - undecided == {"flexlora.foreign", "flexlora.federation.streams"}
    streams = (room.with_name("federation") / "streams.py").read_text(encoding="utf-8")
    assert "flexlora" not in streams


def test_every_damage_to_the_index_of_a_corpus_is_noticed(tmp_path):
    made: list[str] = []
    whole, _ = kept_corpus(tmp_path, {}, reader(made))
    assert whole.folder is not None
    path = whole.folder / INDEX_FILE
    content = path.read_bytes()
    damaged = [bytearray(content) for _ in range(0, len(content), 29)]
    for number, other in enumerate(damaged):
        other[29 * number] ^= 1 << number % 8
    for other in (*damaged, b"[" * 100_000, b"null", b"{}", b'{"hashes": {}}', b"\xff"):
        path.write_bytes(other)
        before = len(made)
        again, warnings = kept_corpus(tmp_path, {}, reader(made))
        assert len(made) == before + 1 and again == whole and warnings == ("Left out: 1 row.",)
