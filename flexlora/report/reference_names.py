"""Names the further runs that a run is compared with, for tables, curves and sentences."""

from flexlora.rounds.records import ReferenceRunRecord, ReferencesRecord

SMALLEST, LARGE_ALONE, LARGEST = "FedIT at the smallest rank", "Large clients alone", "FedIT at the largest rank"

SHORT_NAMES = {SMALLEST: "FedIT, smallest rank", LARGE_ALONE: "Large clients alone", LARGEST: "FedIT, largest rank"}
"""Name of a reference run -> what curves call it."""


def reference_runs(references: ReferencesRecord) -> dict[str, ReferenceRunRecord]:
    """Return the reference runs there are by name, in the order of tables."""
    found = {
        SMALLEST: references.fedit_smallest_rank,
        LARGE_ALONE: references.large_clients_alone,
        LARGEST: references.fedit_largest_rank,
    }
    return {name: run for name, run in found.items() if run is not None}


def inside_a_sentence(name: str) -> str:
    """Return a name as it is written where no sentence begins: "FedIT" keeps its capital."""
    return name if name.startswith("FedIT") else name[0].lower() + name[1:]
