"""Finds the data files of a folder, and says which of its files are left out and why.

Left out are hidden files, files of other kinds, descriptions that the datasets library writes beside its data, and test
and validation splits that lie beside what is to be dealt to clients.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.data.data_notes import DataNotes

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

# Files that describe data and are none, in folders that come from the hub or from the datasets library.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "croissant.json")
_TRAIN = {"train", "training"}
_HELD_OUT = {"test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"}
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
        hidden = next((place for place, part in enumerate(parts) if part.startswith((".", "__MACOSX", "~$"))), None)
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
    return _without_tests(candidates, folder, notes) if splits else candidates


def owner_of(file: Path, folder: Path) -> str:
    """Return the name of a file below a folder without its endings, to be the owner of what is in it."""
    inside = file.relative_to(folder) if file.is_relative_to(folder) and file != folder else Path(file.name)
    return "/".join((*inside.parts[:-1], kind_of(file).stem))


def _describes(file: Path) -> bool:
    """Return whether a file says something about data, or is a cache that ``datasets`` leaves beside them."""
    beside = file.with_name("dataset_info.json").exists()
    is_left = file.name == "state.json" or (file.suffix == ".arrow" and file.name.startswith("cache-"))
    return file.name.lower() in DESCRIPTIONS or (is_left and beside)


def _without_tests(files: Sequence[Path], folder: Path, notes: DataNotes) -> list[Path]:
    """Leave out test and validation splits.

    Beside a file called training data, those are all with a word such as ``test`` in their name or folder. Elsewhere
    it is only files whose whole name is such a word: ``blood_test.jsonl`` may be the data of a ward.
    """
    words = {file: _words(file, folder) for file in files}
    if any(own & _TRAIN for own in words.values()):
        left_out = [file for file, own in words.items() if own & _HELD_OUT and not own & _TRAIN]
    else:
        left_out = [file for file in files if _SHARD.sub("", kind_of(file).stem).lower() in _HELD_OUT]
        left_out = left_out if len(left_out) < len(files) else []
    for file in left_out:
        notes.skipped["/".join(file.relative_to(folder).parts)] = "a test or validation split beside training data"
    return [file for file in files if file not in set(left_out)]


def _words(file: Path, folder: Path) -> set[str]:
    """Return the words in the name of a file and of the folders below ``folder`` that it is in."""
    parts = (*file.relative_to(folder).parts[:-1], kind_of(file).stem)
    return {word.lower() for part in parts for word in re.findall(r"[^\W\d_]+", part)}
