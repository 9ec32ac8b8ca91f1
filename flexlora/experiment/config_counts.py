"""Refuses counts that no machine, or not this one, could hold or finish, before any work on them begins."""

from collections.abc import Iterator, Mapping
from typing import Any

from flexlora.experiment.config import Config
from flexlora.limits import memory_bytes, most_processes, num_cores
from flexlora.text import count_text

MOST = 1_000_000_000
"""Of any count that has no smaller bound below."""

LARGEST_SEED = 2**64 - 1
UNCOUNTED = {
    "seed": LARGEST_SEED,
    "data.corpus_seed": LARGEST_SEED,
    "privacy.differential.noise_seed": LARGEST_SEED,
    "devices.round_bytes": 2**63 - 1,
}
"""Whole numbers that count nothing that would be held or repeated -> the largest that makes sense."""

BYTES_EACH: Mapping[str, int] = {
    "data.num_clients": 4096,
    "data.clients_per_task": 4096,
    "data.num_unseen_tasks": 4096,
    "data.examples_per_task": 1024,
    "data.facts_per_client": 512,
    "data.facts_by_type": 512,
    "data.num_facts": 512,
    "clients.counts": 4096,
    "devices.counts": 4096,
    "rounds.cohort_size": 4096,
}
"""Memory that one of each takes at least, with everything kept for it."""

REPEATS: Mapping[str, float] = {
    "rounds.num_rounds": 10_000_000,
    "training.num_epochs": 1_000_000,
    "training.max_steps": 1_000_000_000,
    "evaluation.local_only_epochs": 1_000_000,
    "evaluation.max_new_tokens": 1_000_000,
    "data.max_length": 10_000_000,
    "clock.over_selection": 1_000_000,
}
"""What is repeated, or as long, at most."""

LARGEST_RANK = 65_536
"""No module of a language model has a larger side that would make use of it."""


def excessive(config: Config) -> Iterator[str]:
    """Yield a sentence for each count that is larger than what is sensible on this machine."""
    memory = memory_bytes()
    for key, value in _numbers(config.model_dump(mode="json")):
        most, why = _most(key, memory)
        if value > most or value < -most:
            yield f"{key}: must be at most {_whole(most)}, {why}; got {_in_words(value)}"


def _most(key: str, memory: int) -> tuple[float, str]:
    """Return the largest sensible value of a setting, and why."""
    for name in (key, key.rpartition(".")[0]):
        if name in BYTES_EACH:
            return memory // BYTES_EACH[name], f"what fits into the memory of this machine ({memory / 1e9:.3g} GB)"
        if name in REPEATS:
            return REPEATS[name], "more than any run has been known to use"
    if key in UNCOUNTED:
        return UNCOUNTED[key], "64 bits"
    if key == "model.num_threads" or key == "model.num_processes":
        return most_processes(), f"for the {count_text(num_cores(), 'core')} of this machine"
    if key.startswith(("clients.types.", "devices.max_rank", "devices.rank_choices")) or key.endswith("rank"):
        return LARGEST_RANK, "more than any module of a language model has"
    return MOST, "more than any count here can use"


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Yield the key and the value of every number that counts something."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value
    elif isinstance(value, float) and key in REPEATS:
        yield key, value


def _whole(value: float) -> str:
    """Return a whole number with thin spaces between thousands, every digit right."""
    return f"{int(value):,}".replace(",", "\u202f")


def _in_words(value: float) -> str:
    """Return a number of any size in a few letters."""
    try:
        return f"{value:.4g}"
    except OverflowError:
        return f"a number of {value.bit_length() if isinstance(value, int) else 'many'} bits"
