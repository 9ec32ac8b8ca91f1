"""Cuts the rows of an optimiser step into passes, such that padding and launches cost least."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexlora.data.prompts import EncodedExample
from flexlora.federation.messages import Broadcast
from flexlora.federation.streams import stream_seed
from flexlora.training.factor_bank import FactorBank
from flexlora.training.group_layers import RowMasks, Share
from flexlora.training.one_client import PASS_TOKENS

# A pass with more tokens no longer fits into the caches.
_MOST_PASS_TOKENS = {"cpu": 1024, "cuda": 32768}


# What one more bank in a pass costs, in padded tokens.
_SHARE_TOKENS = {"cpu": 48, "cuda": 512}


# What it costs, in padded tokens, to gather the factors of a client that do not lie next to those before.
_GATHER_TOKENS = {"cpu": 8, "cuda": 32}


@dataclass(frozen=True)
class GroupJob:
    """One client's training: those arguments of ``train_client`` that differ between clients."""

    broadcast: Broadcast
    examples: Sequence[EncodedExample]
    learning_rate: float
    seed: int


@dataclass(eq=False)
class PooledClient:
    """A client in the pool: its place in the banks, and what its training has come to so far.

    Attributes:
        index: Position of its job among all.
        job: What was asked for.
        places: Bank and slot of the trained factors and, if there is one, of the frozen branch.
        order: Positions of those banks among all.
        batches: The examples of each step to come.
        steps_left: How many those are.
        moments: Of the optimiser, as long as the trained columns of the bank.
        num_updates: Steps that moved something.
    """

    index: int
    job: GroupJob
    places: tuple[tuple[FactorBank, int], ...]
    order: tuple[int, ...]
    batches: Iterator[list[EncodedExample]]
    steps_left: int
    moments: list[Tensor]
    num_updates: Tensor
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    num_tokens: int = 0
    num_answers: int = 0
    train_seconds: float = 0.0

    @property
    def banks(self) -> tuple[FactorBank, ...]:
        """The bank of the trained factors and, if there is a frozen branch, that of it."""
        return tuple(bank for bank, _ in self.places)

    @property
    def slots(self) -> tuple[int, ...]:
        """Where it is in its banks."""
        return tuple(slot for _, slot in self.places)


@dataclass(frozen=True)
class Row:
    """One example of the step a client is making.

    Attributes:
        member: Its client's position in the pool.
        client: Its client.
        example: The example.
        weight: One over the answer tokens of the step.
        stream: What is the row's own: seed, step, and position in the step.
    """

    member: int
    client: PooledClient
    example: EncodedExample
    weight: float
    stream: tuple[int, int, int]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.example.input_ids)


def cut_into_passes(rows: Sequence[Row], kind: str) -> list[list[Row]]:
    """Return the rows cut into passes such that padded tokens, passes and what they look up together cost least.

    Either rows are sorted by length, whoever they belong to, or the rows of a client stay together: lengths decide.
    Rows that meet the same banks are neighbours, and within a pass rows of one client.
    """
    by_length = [[row] for row in sorted(rows, key=lambda row: (row.client.order, row.length))]
    by_client = []
    for _, own in itertools.groupby(sorted(rows, key=_place), key=lambda row: row.member):
        together = sorted(own, key=lambda row: row.length)
        most = max(1, _MOST_PASS_TOKENS.get(kind, 1024) // together[-1].length)
        by_client += [together[start : start + most] for start in range(0, len(together), most)]
    candidates = [_cheapest_cuts(units, kind) for units in (by_length, by_client)]
    return min(candidates, key=lambda parts: sum(_cost(part, kind) for part in parts))


def _place(row: Row) -> tuple[tuple[int, ...], ...]:
    return row.client.order, row.client.slots


def _cheapest_cuts(units: Sequence[Sequence[Row]], kind: str) -> list[list[Row]]:
    """Return runs of units as passes such that padded tokens and the number of passes and banks cost least."""
    most = _MOST_PASS_TOKENS.get(kind, 1024)
    sizes = [(len(unit), max(row.length for row in unit), unit[0].client.order) for unit in units]
    cheapest: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(units) + 1):
        best = (float("inf"), 0)
        num_rows, longest, num_banks, banks = 0, 0, 0, None
        for start in range(end - 1, -1, -1):
            own_rows, own_length, own_banks = sizes[start]
            num_rows, longest = num_rows + own_rows, max(longest, own_length)
            num_banks, banks = num_banks + (own_banks != banks), own_banks
            tokens = num_rows * longest
            if start < end - 1 and tokens > most:
                break
            cost = cheapest[start][0] + tokens + PASS_TOKENS.get(kind, 0) + num_banks * _SHARE_TOKENS.get(kind, 0)
            best = min(best, (cost, start))
        cheapest.append(best)
    parts, end = [], len(units)
    while end:
        start = cheapest[end][1]
        parts.append(sorted((row for unit in units[start:end] for row in unit), key=_place))
        end = start
    return parts


def _cost(rows: Sequence[Row], kind: str) -> float:
    """Return what a pass costs, in tokens."""
    cost = float(len(rows) * max(row.length for row in rows) + PASS_TOKENS.get(kind, 0))
    for _, own in itertools.groupby(rows, key=lambda row: row.client.order):
        places, num_segments = _cut_into_segments([row.client.slots[0] for row in own], torch.device("cpu"))
        gathered = 0 if isinstance(places, slice) else num_segments * _GATHER_TOKENS.get(kind, 0)
        cost += _SHARE_TOKENS.get(kind, 0) + gathered
    return cost


def shares_of(rows: Sequence[Row], dropout: float, device: torch.device) -> list[Share]:
    """Return which rows meet which factors; rows with the same banks, and of one client, are neighbours."""
    shares, start = [], 0
    for banks, group in itertools.groupby(rows, key=lambda row: row.client.banks):
        own = list(group)
        span = slice(start, start := start + len(own))
        for branch, bank in enumerate(banks):
            trained = bank.trained != "none"
            masks = masks_of(own, dropout, device) if trained and dropout else None
            shares.append(
                Share(bank, span, *_cut_into_segments([row.client.slots[branch] for row in own], device), masks)
            )
    return shares


def masks_of(rows: Sequence[Row], dropout: float, device: torch.device) -> RowMasks:
    """Return the dropout masks of rows, each from a stream of its own."""
    seeds = [stream_seed(seed, "dropout", step, position) for seed, step, position in (row.stream for row in rows)]
    return RowMasks(dropout, seeds, [row.length for row in rows], device)


def _cut_into_segments(slots: Sequence[int], device: torch.device) -> tuple[slice | Tensor, int]:
    """Return the clients of the fewest runs of equally many rows, and how many runs those are."""
    counts = [len(list(group)) for _, group in itertools.groupby(slots)]
    firsts = list(slots)[:: math.gcd(*counts)]
    consecutive = list(range(firsts[0], firsts[0] + len(firsts)))
    places = slice(firsts[0], firsts[-1] + 1) if firsts == consecutive else torch.tensor(firsts, device=device)
    return places, len(firsts)
