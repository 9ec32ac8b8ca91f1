"""Cuts the rows of an optimiser step into passes, so that padding and launches cost least."""

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
from flexlora.training.group_layers import BankRows, RowMasks
from flexlora.training.length_runs import LARGER, PASS_TOKENS

# What one more bank in a pass costs, in padded tokens.
_BANK_TOKENS = {"cpu": 48, LARGER: 8, "cuda": 512}


# What it costs, in padded tokens, to gather the factors of a client that do not lie next to those before.
_GATHER_TOKENS = {"cpu": 8, LARGER: 8, "cuda": 32}


@dataclass(frozen=True)
class GroupJob:
    """The arguments of ``train_client`` that differ between clients."""

    broadcast: Broadcast
    examples: Sequence[EncodedExample]
    learning_rate: float
    seed: int


@dataclass(eq=False)
class PooledClient:
    """A client that trains at present: where its factors are stored, and what was measured so far.

    Attributes:
        job_index: Position of its job among all.
        job: What to train.
        bank_slots: Bank and slot of the trained factors and, if there is one, of the frozen branch.
        bank_numbers: Positions of those banks among all.
        batches: The examples of each step to come.
        steps_left: Their number.
        moments: Of the optimiser, each as long as the gradient.
        num_updates: Optimiser steps so far.
    """

    job_index: int
    job: GroupJob
    bank_slots: tuple[tuple[FactorBank, int], ...]
    bank_numbers: tuple[int, ...]
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
        """The bank of the trained factors and, if there is a frozen branch, the bank of that."""
        return tuple(bank for bank, _ in self.bank_slots)

    @property
    def slots(self) -> tuple[int, ...]:
        """Its slots in these banks."""
        return tuple(slot for _, slot in self.bank_slots)


@dataclass(frozen=True)
class PassRow:
    """One example of the step a client is making.

    Attributes:
        pool_index: Position of its client in the pool.
        client: Its client.
        example: The example.
        weight: One over the number of answer tokens of the step.
        stream: Seed, step and position in the step; they seed its dropout.
    """

    pool_index: int
    client: PooledClient
    example: EncodedExample
    weight: float
    stream: tuple[int, int, int]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.example.input_ids)


def cut_into_passes(rows: Sequence[PassRow], pace: str, most_tokens: int) -> list[list[PassRow]]:
    """Return the rows cut into passes at the least cost of padded tokens, passes, banks and gathered factors.

    Two ways are compared: rows sorted by length whatever client they belong to, and the rows of each client together.
    Rows with the same banks are neighbours and, within a pass, rows of one client.

    Args:
        rows: Of one optimiser step.
        pace: What passes cost.
        most_tokens: Most tokens of a pass, padding included; a single row may have more.
    """
    by_length = [[row] for row in sorted(rows, key=lambda row: (row.client.bank_numbers, row.length))]
    by_client = []
    for _, own in itertools.groupby(sorted(rows, key=_banks_and_slots), key=lambda row: row.pool_index):
        together = sorted(own, key=lambda row: row.length)
        most = max(1, most_tokens // together[-1].length)
        by_client += [together[start : start + most] for start in range(0, len(together), most)]
    candidates = [_cheapest_cuts(units, pace, most_tokens) for units in (by_length, by_client)]
    return min(candidates, key=lambda parts: sum(_cost(part, pace) for part in parts))


def _banks_and_slots(row: PassRow) -> tuple[tuple[int, ...], ...]:
    return row.client.bank_numbers, row.client.slots


def _cheapest_cuts(units: Sequence[Sequence[PassRow]], pace: str, most_tokens: int) -> list[list[PassRow]]:
    """Return runs of units as passes, at the least cost of padded tokens, passes and banks."""
    sizes = [(len(unit), max(row.length for row in unit), unit[0].client.bank_numbers) for unit in units]
    cheapest: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(units) + 1):
        best = (float("inf"), 0)
        num_rows, longest, num_banks, banks = 0, 0, 0, None
        for start in range(end - 1, -1, -1):
            own_rows, own_length, own_banks = sizes[start]
            num_rows, longest = num_rows + own_rows, max(longest, own_length)
            num_banks, banks = num_banks + (own_banks != banks), own_banks
            tokens = num_rows * longest
            if start < end - 1 and tokens > most_tokens:
                break
            cost = cheapest[start][0] + tokens + PASS_TOKENS.get(pace, 0) + num_banks * _BANK_TOKENS.get(pace, 0)
            best = min(best, (cost, start))
        cheapest.append(best)
    parts, end = [], len(units)
    while end:
        start = cheapest[end][1]
        parts.append(sorted((row for unit in units[start:end] for row in unit), key=_banks_and_slots))
        end = start
    return parts


def _cost(rows: Sequence[PassRow], pace: str) -> float:
    """Return what a pass costs, in tokens."""
    cost = float(len(rows) * max(row.length for row in rows) + PASS_TOKENS.get(pace, 0))
    for _, own in itertools.groupby(rows, key=lambda row: row.client.bank_numbers):
        slots, num_segments = _cut_into_segments([row.client.slots[0] for row in own], torch.device("cpu"))
        gathered = 0 if isinstance(slots, slice) else num_segments * _GATHER_TOKENS.get(pace, 0)
        cost += _BANK_TOKENS.get(pace, 0) + gathered
    return cost


def rows_by_bank(rows: Sequence[PassRow], dropout: float, device: torch.device) -> list[BankRows]:
    """Return which rows use which factors; rows with the same banks, and rows of one client, are neighbours."""
    bank_rows, start = [], 0
    for banks, group in itertools.groupby(rows, key=lambda row: row.client.banks):
        own = list(group)
        span = slice(start, start := start + len(own))
        for branch, bank in enumerate(banks):
            trained = bank.trained != "none"
            masks = masks_of(own, dropout, device) if trained and dropout else None
            bank_rows.append(
                BankRows(bank, span, *_cut_into_segments([row.client.slots[branch] for row in own], device), masks)
            )
    return bank_rows


def masks_of(rows: Sequence[PassRow], dropout: float, device: torch.device) -> RowMasks:
    """Return the dropout masks of rows; each row has a stream of its own."""
    seeds = [stream_seed(seed, "dropout", step, position) for seed, step, position in (row.stream for row in rows)]
    return RowMasks(dropout, seeds, [row.length for row in rows], device)


def _cut_into_segments(slots: Sequence[int], device: torch.device) -> tuple[slice | Tensor, int]:
    """Return the slots of the fewest runs of equally many rows, and the number of runs."""
    counts = [len(list(group)) for _, group in itertools.groupby(slots)]
    firsts = list(slots)[:: math.gcd(*counts)]
    consecutive = list(range(firsts[0], firsts[0] + len(firsts)))
    of_runs = slice(firsts[0], firsts[-1] + 1) if firsts == consecutive else torch.tensor(firsts, device=device)
    return of_runs, len(firsts)
