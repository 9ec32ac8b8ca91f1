"""Gathers what a person should know about data that were read: what was skipped, not used or repaired."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

MOST_NAMES = 40


@dataclass
class DataNotes:
    """What readers note while they read; the only thing that they change.

    Attributes:
        skipped: What was not read -> why; names of files and folders as they stand in the data.
        owners: Name of an owner -> the files that have it, as they stand in a folder.
        unused: Columns and fields of turns that hold something and have no meaning here.
        num_repaired: Rows or tasks with halves of surrogate pairs, which are no text, in place of which U+FFFD was put.
        num_unasked: Answers before the first question of their conversation, which are context and not trained.
    """

    skipped: dict[str, str] = field(default_factory=dict)
    owners: dict[str, list[str]] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    num_repaired: int = 0
    num_unasked: int = 0

    def sentences(self) -> tuple[str, ...]:
        """Return one sentence for each kind of note, none where there is nothing to say."""
        found = [f"Not read ({why}): {_listed(names)}." for why, names in _by_reason(self.skipped).items()]
        shared = [" and ".join(files) for files in self.owners.values() if len(files) > 1]
        if shared:
            found.append(
                f"Read together: {_listed(shared)}; files of one name are one owner, so rename one, or take it away if "
                "both hold the same."
            )
        if self.unused:
            found.append(f"Not used: {_listed(sorted(self.unused))}.")
        if self.num_repaired:
            found.append(
                f"Repaired: {self.num_repaired} rows or tasks held halves of surrogate pairs (no valid text), now "
                "U+FFFD."
            )
        if self.num_unasked:
            found.append(f"Not trained: {self.num_unasked} answers that no question comes before.")
        return tuple(found)


def _by_reason(skipped: dict[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, why in skipped.items():
        names.setdefault(why, []).append(name)
    return names


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    rest = len(shown) - MOST_NAMES
    return ", ".join(shown[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
