"""Tells the rows of benchmarks/capacity.py as tables: what ranks store, and whose facts survive aggregation."""

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora.foreign import read_json

Row = dict[str, Any]

TUNING_DRAW = 0
"""The draw that learning rates are chosen on; tables are of the others."""

NOTE = (
    "Per cent of the facts recalled (exact match). The reader is the global adapter cut to a rank, without a frozen "
    "branch, as a device of that rank can keep it; the owner is the client that has the fact."
)


def capacity_part(path: Path) -> list[str]:
    """Return the tables of a file of rows, and how to make the rows again."""
    lines = path.read_bytes().splitlines()
    rows = [read_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    command = ("```bash", "python benchmarks/capacity.py central", "python benchmarks/capacity.py federated", "```")
    return [*capacity_tables(rows), "", f"{NOTE} Rows: `{path.parent.name}/{path.name}`; made by", "", *command]


def capacity_tables(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the tables that there are rows for, central training first."""
    tables = []
    if any(row["study"] == "central" for row in rows):
        tables.append(_central_table(rows))
    if _final(rows):
        tables += [_owner_table(rows), _reader_table(rows)]
    return "\n\n".join("\n".join(table) for table in tables).split("\n")


def chosen_rate(results: Mapping[float, list[Row]]) -> float:
    """Return the learning rate with the best recall, of equal ones that with the lowest loss."""

    def merit(rate: float) -> tuple[float, float]:
        """Return recall and loss so that larger is better."""
        last = max((row for row in results[rate] if row["owner"] == "all"), key=lambda row: row["reader"])
        return last["exact_match"], -last["loss"]

    return max(results, key=merit)


def _central_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield recall by rank and number of facts, each rank at the rate that is best at the number most tried."""
    own = [row for row in rows if row["study"] == "central" and row["owner"] == "all" and row["rank"] == row["reader"]]
    numbers = sorted({row["num_facts"] for row in own})
    probed = max(numbers, key=lambda num: len({row["learning_rate"] for row in own if row["num_facts"] == num}))
    yield "Everything in one place, by rank and number of facts:"
    yield ""
    yield "| rank | learning rate |" + "".join(f" {num} facts |" for num in numbers)
    yield "| ---: | ---: |" + " ---: |" * len(numbers)
    for rank in sorted({row["rank"] for row in own}):
        of_rank = [row for row in own if row["rank"] == rank]
        rate = chosen_rate({row["learning_rate"]: [row] for row in of_rank if row["num_facts"] == probed})
        found = {row["num_facts"]: row["exact_match"] for row in of_rank if row["learning_rate"] == rate}
        cells = "".join(f" {found[num]:.0f} |" if num in found else " |" for num in numbers)
        yield f"| {rank} | {rate:g} |{cells}"


def _owner_table(rows: Sequence[Row]) -> Iterator[str]:
    final = _final(rows)
    owners = [*sorted({row["owner"] for row in final} - {"all"}, key=_rank_of), "all"]
    yield "Federated, read at the largest rank, by rank of the owner; mean of the draws (lowest, highest):"
    yield ""
    yield "| method | learning rate | draws |" + "".join(f" owner {_name_of(owner)} |" for owner in owners)
    yield "| --- | ---: | ---: |" + " ---: |" * len(owners)
    for method, own in _by_method(final).items():
        last = [row for row in own if row["reader"] == max(one["reader"] for one in own)]
        rates = ", ".join(f"{rate:g}" for rate in sorted({row["learning_rate"] for row in own}))
        cells = "".join(f" {_spread([r for r in last if r['owner'] == owner])} |" for owner in owners)
        yield f"| `{method}` | {rates} | {len({row['draw'] for row in own})} |{cells}"


def _reader_table(rows: Sequence[Row]) -> Iterator[str]:
    final = [row for row in _final(rows) if row["owner"] == "all"]
    readers = sorted({row["reader"] for row in final})
    yield "The same, all facts, by rank of the reader:"
    yield ""
    yield "| method |" + "".join(f" reader {reader} |" for reader in readers)
    yield "| --- |" + " ---: |" * len(readers)
    for method, own in _by_method(final).items():
        cells = "".join(f" {_spread([row for row in own if row['reader'] == reader])} |" for reader in readers)
        yield f"| `{method}` |{cells}"


def _final(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["study"] == "federated" and row["draw"] != TUNING_DRAW]


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def _spread(rows: Sequence[Row]) -> str:
    values = [row["exact_match"] for row in rows]
    return f"{statistics.fmean(values):.0f} ({min(values):.0f}, {max(values):.0f})" if values else ""


def _rank_of(owner: str) -> int:
    found = re.search(r"\d+", owner)
    return int(found.group()) if found else 0


def _name_of(owner: str) -> str:
    return owner if owner == "all" else f"rank {_rank_of(owner)}"
