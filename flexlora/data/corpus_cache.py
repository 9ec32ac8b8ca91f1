"""Keeps corpora for later runs, in folders whose names depend on everything that decides what is in them.

A corpus gets its name when it is complete: a run that is killed leaves no half corpus under that name, and two runs
that build the same one at once both end with a good one. The examples of an opened corpus are compared with their hash;
a corpus that fails its hash is rebuilt.
"""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from flexlora.data.corpus_file import ExampleFile, Owner, Record, StoredOwners, stored_corpus
from flexlora.data.examples import FederatedCorpus
from flexlora.data.mapped_file import MappedFileError
from flexlora.foreign import ForeignError, read_json
from flexlora.seal import sealed, unsealed

EXAMPLES_FILE = "examples.jsonl"
INDEX_FILE = "index.json"
# If there are more, those used longest ago are deleted.
MOST_CORPORA = 16

_NAME = re.compile(r"corpus-[0-9a-f]{32}(\.partial-.+)?")
_DAY_SECONDS = 86400

_log = logging.getLogger(__name__)

# Writes a corpus to a file and returns it with warnings for a person.
ReadCorpus = Callable[[ExampleFile], tuple[FederatedCorpus, tuple[str, ...]]]


def user_cache_folder() -> Path:
    """Return the folder for what can be rebuilt: below ``XDG_CACHE_HOME``, which is ``~/.cache`` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexlora"


def kept_corpus(
    root: Path | None, decided_by: Mapping[str, object], read: ReadCorpus, code: Sequence[Path] = ()
) -> tuple[FederatedCorpus, tuple[str, ...]]:
    """Return what ``read`` returns, from an earlier run if there was one.

    Args:
        root: Folder of corpora; None keeps nothing.
        decided_by: Everything that the corpus depends on, as plain values; ``code_hash`` is added.
        read: Called if there is no such corpus yet, or if it fails its hash.
        code: Files of code that decide the corpus, too, such as the one that defines ``read``.
    """
    if root is None:
        return read(ExampleFile())
    text = json.dumps([decided_by, code_hash(tuple(code))], sort_keys=True)
    folder = root / f"corpus-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    found = _opened(folder)
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Readable by this user alone: the texts may be private.
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=root))
    except OSError as error:
        _log.warning("Examples are not kept for later runs, as %s cannot be written to: %s.", root, error)
        return read(ExampleFile())
    try:
        corpus, warnings = _build(partial, folder, read)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _delete_old(root, folder)
    return corpus, warnings


@cache
def code_hash(further: tuple[Path, ...] = ()) -> str:
    """Return a SHA-256 of the code that reads, generates, deals and writes examples.

    Args:
        further: Files that decide a corpus besides those of this folder, the random streams and the reader of JSON.
    """
    digest = hashlib.sha256(f"{platform.python_version()} {np.__version__}".encode())
    data = Path(__file__).parent
    beside = (data.with_name("federation") / "streams.py", data.with_name("foreign.py"))
    for path in (*sorted(data.rglob("*.py")), *beside, *further):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def files_state(path: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of change of a file or of all files below a folder: what changes when they do."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    states = ((file, file.stat()) for file in files)
    return [(str(file.resolve()), state.st_size, state.st_mtime_ns) for file, state in states]


def _build(partial: Path, folder: Path, read: ReadCorpus) -> tuple[FederatedCorpus, tuple[str, ...]]:
    """Build the corpus in ``partial`` and rename that to ``folder``."""
    file = ExampleFile(partial / EXAMPLES_FILE)
    corpus, warnings = read(file)
    file.flush()
    assert isinstance(corpus.clients, StoredOwners) and isinstance(corpus.unseen, StoredOwners), "read has stored them"
    owners = {"clients": corpus.clients, "unseen": corpus.unseen}
    rows = {name: [_to_row(owner) for owner in own.owners.values()] for name, own in owners.items()}
    index = {"hashes": dict(corpus.hashes), "warnings": warnings, **rows}
    (partial / INDEX_FILE).write_text(sealed(json.dumps(index)), encoding="utf-8")
    broken = partial.with_name(f"{partial.name}-broken")
    try:
        try:
            partial.rename(folder)
        except OSError:
            # Another run was faster, or the corpus that is there is damaged.
            found = _opened(folder)
            if found is not None:
                return found
            folder.rename(broken)
            partial.rename(folder)
    except OSError as error:
        _log.warning("Examples are not kept for later runs: %s.", error)
        return corpus, warnings
    finally:
        shutil.rmtree(broken, ignore_errors=True)
    return replace(corpus, folder=folder), warnings


def _opened(folder: Path) -> tuple[FederatedCorpus, tuple[str, ...]] | None:
    """Return the corpus in a folder, None if there is none or it fails its hash."""
    try:
        body, is_sealed = unsealed((folder / INDEX_FILE).read_bytes())
        index = read_json(body, INDEX_FILE)
        if not is_sealed:
            raise ForeignError(INDEX_FILE, "it has no digest of itself")
        file = ExampleFile(folder / EXAMPLES_FILE, writable=False)
        clients, unseen = ([_from_row(row) for row in index[name]] for name in ("clients", "unseen"))
        corpus = stored_corpus(file, clients, unseen, folder)
        if corpus.hashes != index["hashes"]:
            raise MappedFileError("its examples are not those that were written")
        os.utime(folder)
        return corpus, tuple(index["warnings"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        _log.warning("The corpus kept in %s is damaged and will be rebuilt: %s.", folder, error)
        return None


def _to_row(owner: Owner) -> list[object]:
    record = owner.record
    parts = (owner.num_validation, owner.num_test, owner.dropped)
    return [owner.name, owner.category, record.start, record.size, record.num_examples, *parts]


def _from_row(row: list[Any]) -> Owner:
    name, category, start, size, num_examples, num_validation, num_test, dropped = row
    return Owner(name, category, Record(start, size, num_examples), num_validation, num_test, tuple(dropped))


def _delete_old(root: Path, newest: Path) -> None:
    """Delete the corpora that were used longest ago, and what killed runs have left."""
    ours = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and path != newest]
    unfinished = [path for path in ours if ".partial-" in path.name]
    whole = sorted((path for path in ours if path not in unfinished), key=_changed, reverse=True)
    abandoned = [path for path in unfinished if _changed(path) < time.time() - _DAY_SECONDS]
    for path in (*whole[MOST_CORPORA - 1 :], *abandoned):
        # Runs that use it keep their files open.
        shutil.rmtree(path, ignore_errors=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
