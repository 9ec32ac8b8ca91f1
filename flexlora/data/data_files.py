"""Finds the data files of a folder, and says which of its files are left out and why.

Left out are hidden files, files of other kinds, descriptions that the datasets library writes beside its data,
compressed copies of files beside them, and test and validation splits beside what is to be dealt to clients.
"""

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.data.data_notes import DataNotes

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

# Files that describe data and are none, in folders that come from the hub or from the datasets library.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "croissant.json")
# Words for parts of data, also with one of these endings: ``testset``.
_ENDINGS = "(?:set|data|split|file)?s?"
_TRAIN = re.compile("(?:train|training)(?:set|data|split|file)?")
_HELD_OUT = re.compile(
    "(?:test|testing|eval|evaluation|validation|valid|val|dev|devel|development|holdout|heldout|heldback|unseen)"
    + _ENDINGS
)
_HIDDEN = (".", "__MACOSX", "__pycache__", "~$")
_SHARD = re.compile(r"[-_.]?\d{5}([-_.]of[-_.]\d{5})?$")


@dataclass(frozen=True)
class Kind:
    """What the name of a file says: ``.jsonl`` and ``.gz`` for ``north.JSONL.gz``, whose stem is ``north``."""

    stem: str
    ending: str
    compression: str = ""


def kind_of(file: Path) -> Kind:
    """Return what kind of file a name means; capital letters do not matter."""
    name = Path(file.name)
    compression = name.suffix.lower() if name.suffix.lower() in COMPRESSIONS else ""
    inner = Path(name.stem) if compression else name
    return Kind(inner.stem, inner.suffix.lower(), compression)


def data_files(
    folder: Path, endings: Collection[str], notes: DataNotes, *, deep: bool = True, splits: bool = True
) -> list[Path]:
    """Return the files of a folder that hold training data, sorted.

    Args:
        folder: Is searched.
        endings: Of files that can be read, such as ``.jsonl``; compressed ones count, too.
        notes: Told about all other files.
        deep: Whether folders in it are searched.
        splits: Whether a word such as ``test`` in the name of a file says that it is no training data.
    """
    candidates = []
    for file in sorted(folder.rglob("*") if deep else folder.glob("*")):
        parts = file.relative_to(folder).parts
        hidden = next((place for place, part in enumerate(parts) if part.startswith(_HIDDEN)), None)
        if hidden is not None:
            # A hidden folder is named once, however much is in it.
            notes.skipped["/".join(parts[: hidden + 1])] = "hidden"
        elif not file.is_file():
            continue
        elif _describes(file):
            notes.skipped["/".join(parts)] = "a description of the data"
        elif kind_of(file).ending not in endings:
            notes.skipped["/".join(parts)] = f"no {', '.join(endings)}"
        else:
            candidates.append(file)
    candidates = _without_copies(candidates, folder, notes)
    kept = _without_tests(candidates, folder, notes) if splits else candidates
    _note_shared_names(kept, folder, notes)
    return kept


def owner_of(file: Path, folder: Path) -> str:
    """Return the name of a file below a folder without its endings, to be the owner of what is in it."""
    inside = file.relative_to(folder) if file.is_relative_to(folder) and file != folder else Path(file.name)
    return "/".join((*inside.parts[:-1], kind_of(file).stem))


def _describes(file: Path) -> bool:
    """Return whether a file says something about data, or is a cache that ``datasets`` leaves beside them."""
    beside = file.with_name("dataset_info.json").exists()
    is_left = file.name == "state.json" or (file.suffix == ".arrow" and file.name.startswith("cache-"))
    return file.name.lower() in DESCRIPTIONS or (is_left and beside)


def _without_copies(files: Sequence[Path], folder: Path, notes: DataNotes) -> list[Path]:
    """Leave out files that differ from one beside them in nothing but their compression: copies, read twice otherwise.

    What is not compressed is read, unless it is empty.
    """
    copies: dict[tuple[Path, str, str], list[Path]] = {}
    for file in files:
        copies.setdefault((file.parent, kind_of(file).stem, kind_of(file).ending), []).append(file)
    order = ("", *COMPRESSIONS)
    for group in copies.values():
        group.sort(key=lambda file: (file.stat().st_size == 0, order.index(kind_of(file).compression)))
    left_out = [(file, group[0]) for group in copies.values() for file in group[1:]]
    for file, read in left_out:
        notes.skipped["/".join(file.relative_to(folder).parts)] = f"the same as {read.name}, which is read"
    return [file for file in files if file not in {file for file, _ in left_out}]


def _note_shared_names(files: Sequence[Path], folder: Path, notes: DataNotes) -> None:
    """Note files that become one owner, as ``north.csv`` beside ``north.jsonl`` does."""
    for file in files:
        notes.owners.setdefault(owner_of(file, folder), []).append("/".join(file.relative_to(folder).parts))


def _without_tests(files: Sequence[Path], folder: Path, notes: DataNotes) -> list[Path]:
    """Leave out test and validation splits.

    Beside a file called training data, those are all with a word such as ``test`` in their name or folder. Elsewhere
    it is only files whose whole name is such a word: ``blood_test.jsonl`` may be the data of a ward.
    """
    words = {file: _words(file, folder) for file in files}
    trained = {file for file, own in words.items() if any(map(_TRAIN.fullmatch, own))}
    if trained:
        left_out = [file for file, own in words.items() if any(map(_HELD_OUT.fullmatch, own)) and file not in trained]
    else:
        names = {file: re.sub(r"[-_. ]", "", _SHARD.sub("", kind_of(file).stem)).lower() for file in files}
        left_out = [file for file, name in names.items() if _HELD_OUT.fullmatch(name)]
        left_out = left_out if len(left_out) < len(files) else []
    for file in left_out:
        notes.skipped["/".join(file.relative_to(folder).parts)] = "a test or validation split beside training data"
    return [file for file in files if file not in set(left_out)]


def _words(file: Path, folder: Path) -> set[str]:
    """Return the words in the name of a file and of the folders below ``folder`` that it is in.

    ``dataTest`` is two words and one, and so is ``held_out``.
    """
    found: set[str] = set()
    for part in (*file.relative_to(folder).parts[:-1], kind_of(file).stem):
        whole = re.findall(r"[^\W\d_]+", part)
        words = [word.lower() for run in whole for word in re.split(r"(?<=[a-z])(?=[A-Z])", run)]
        found |= {*words, *(run.lower() for run in whole), *map("".join, itertools.pairwise(words))}
    return found
