"""Trains many clients at once on one base: what ``train_client`` does, for a pool of clients that share passes.

Every client keeps its own order of examples, number of steps, optimiser state, clipping and dropout, and what it gets
does not depend on who else is in the pool, up to the rounding of sums taken in another order. In each turn of the pool
every client makes one optimiser step, on passes whose rows come from all of them, sorted by length so that hardly any
padding is computed. Whoever has made the last step leaves, and the next client enters.
"""

import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from flexlora.clients import Broadcast, stream_seed
from flexlora.data.prompts import EncodedExample, padding_token
from flexlora.group_decoder import GroupDecoder, decoder_of
from flexlora.group_layers import FactorBank, GroupLayers, RowMasks, Share, Trained, without_lora
from flexlora.lora.factors import AdapterState
from flexlora.model import IGNORED, AdaptedModel
from flexlora.training import (
    DivergedError,
    LocalTraining,
    check_trainable,
    num_answer_tokens,
    step_batches,
    training_metrics,
)

# Clients enter while a step of all of them has fewer tokens than this, and while there is memory.
_POOL_TOKENS = {"cpu": 4096, "cuda": 65536}
_MOST_CLIENTS = 256
_MEMORY_SHARE = 0.25
# Weights, gradients and two moments.
_BYTES_PER_FACTOR = 16

# A pass is as long as caches like. One more pass, and one more bank in a pass, cost as much as so many padded tokens.
_MOST_PASS_TOKENS = {"cpu": 1024, "cuda": 32768}
_PASS_TOKENS = {"cpu": 96, "cuda": 1024}
_SHARE_TOKENS = {"cpu": 48, "cuda": 512}
# A client whose factors do not lie where the pass could take them from as they are costs as much as so many tokens.
_GATHER_TOKENS = {"cpu": 8, "cuda": 32}

# Clients share a bank while padding makes their factors at most so many times as large.
_MOST_PADDING = 1.5

_ADAM_EPS = 1e-8


@dataclass(frozen=True)
class GroupJob:
    """One client's training: those arguments of ``train_client`` that differ between clients."""

    broadcast: Broadcast
    examples: Sequence[EncodedExample]
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class TrainedClient:
    """What came of a job.

    Attributes:
        adapter: The trained factors, as ``train_client`` returns them.
        metrics: What was measured, likewise.
        train_seconds: The client's share, by tokens, of the time its group took.
    """

    adapter: AdapterState
    metrics: Mapping[str, float]
    train_seconds: float


def train_group(
    model: AdaptedModel, jobs: Iterable[GroupJob], settings: LocalTraining, clients_per_group: int | None = None
) -> Iterator[TrainedClient | Exception]:
    """Yield one outcome per job, in the order of the jobs.

    A job that cannot be trained, or whose loss diverges, comes out as its exception; no other is affected. Jobs are
    taken from the iterable only when there is room for them. Between outcomes the model is as it was before.

    Args:
        model: Serves as the base; ``reason_against_groups`` must have no objection to it and the modules of the jobs.
        jobs: What to train.
        settings: How to train; how a step is cut into passes is decided here, whatever ``batch_size`` is.
        clients_per_group: Most clients at a time; None decides by tokens and memory.
    """
    pool, queue = _Pool(model, settings, clients_per_group), enumerate(jobs)
    done: dict[int, TrainedClient | Exception] = {}
    waiting = next(queue, None)
    for index in itertools.count():
        while index not in done:
            while waiting is not None and pool.has_room(waiting[1]):
                try:
                    pool.enter(*waiting)
                except Exception as error:
                    done[waiting[0]] = error
                waiting = next(queue, None)
            if not pool.clients and index not in done:
                return
            done |= pool.turn()
        yield done.pop(index)


@dataclass(eq=False)
class _Client:
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
class _Row:
    """One example of the step a client is making.

    Attributes:
        member: Its client's position in the pool.
        client: Its client.
        example: The example.
        weight: One over the answer tokens of the step.
        stream: What is the row's own: seed, step, and position in the step.
    """

    member: int
    client: _Client
    example: EncodedExample
    weight: float
    stream: tuple[int, int, int]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.example.input_ids)


class _Pool:
    """The clients that train at present."""

    def __init__(self, model: AdaptedModel, settings: LocalTraining, most_clients: int | None) -> None:
        self.clients: list[_Client] = []
        self._model, self._settings, self._most_clients = model, settings, most_clients
        self._layers, self._banks = GroupLayers(model.network), list[FactorBank]()
        self._padding = padding_token(model.tokenizer)
        with model.without_adapter():
            head = model.separate_head
            self._head = None if head is None else without_lora(head)
            is_simple = self._head is not None and not model.dropout
            self._decoder = decoder_of(model.network) if is_simple else None

    def has_room(self, job: GroupJob) -> bool:
        if not self.clients or self._most_clients is not None:
            return len(self.clients) < (self._most_clients or 1)
        jobs = [job, *(client.job for client in self.clients)]
        return (
            len(jobs) <= _MOST_CLIENTS
            and sum(_step_tokens(job, self._settings) for job in jobs) <= _POOL_TOKENS.get(self._model.device.type, 0)
            and sum(map(_factor_bytes, jobs)) <= _MEMORY_SHARE * _memory_bytes(self._model.device)
        )

    def enter(self, index: int, job: GroupJob) -> None:
        check_trainable(job.broadcast, job.examples)
        branches: list[tuple[AdapterState, Trained]] = [(job.broadcast.trainable, job.broadcast.train_factors)]
        if job.broadcast.frozen:
            branches.append((job.broadcast.frozen, "none"))
        for adapter, _ in branches:
            self._model.check(adapter)
            self._layers.add(adapter)
        places = tuple(self._place(adapter, trained) for adapter, trained in branches)
        bank, slot = places[0]
        self.clients.append(
            _Client(
                index=index,
                job=job,
                places=places,
                order=tuple(self._banks.index(bank) for bank, _ in places),
                batches=step_batches(job.examples, self._settings, np.random.default_rng(job.seed)),
                steps_left=self._settings.num_steps(len(job.examples)),
                moments=[torch.zeros_like(bank.gradients[slot]) for _ in range(_num_moments(self._settings))],
                num_updates=torch.zeros((), device=self._model.device),
            )
        )

    def _place(self, adapter: AdapterState, trained: Trained) -> tuple[FactorBank, int]:
        ranks = {path: factors.rank for path, factors in adapter.items()}
        fitting = [bank for bank in self._banks if bank.fits(ranks, trained, _MOST_PADDING)]
        if fitting:
            bank = min(fitting, key=lambda bank: bank.num_columns)
        else:
            shapes = {path: (ranks[path], factors.shape[1], factors.shape[0]) for path, factors in adapter.items()}
            bank = FactorBank(shapes, trained, self._model.device)
            self._banks.append(bank)
        return bank, bank.enter(adapter)

    def turn(self) -> dict[int, TrainedClient | Exception]:
        """Let every client make one step, and return the outcomes of those that leave."""
        start, tokens_before = time.perf_counter(), [client.num_tokens for client in self.clients]
        try:
            self._step()
        except Exception as error:
            return self._one_by_one(error)
        seconds = time.perf_counter() - start
        tokens = [client.num_tokens - before for client, before in zip(self.clients, tokens_before, strict=True)]
        for client, own in zip(self.clients, tokens, strict=True):
            client.train_seconds += seconds * own / max(1, sum(tokens))
        leaving = [client for client in self.clients if not client.steps_left]
        self.clients = [client for client in self.clients if client.steps_left]
        return {client.index: _outcome(client) for client in leaving}

    def _one_by_one(self, error: Exception) -> dict[int, TrainedClient | Exception]:
        """Find out whose fault an error was: train each client anew, alone."""
        clients, self.clients = self.clients, []
        for client in clients:
            _leave(client)
        if len(clients) == 1:
            return {clients[0].index: error}
        return {client.index: next(train_group(self._model, [client.job], self._settings, 1)) for client in clients}

    def _step(self) -> None:
        rows, answers = [], []
        for member, client in enumerate(self.clients):
            batch = next(client.batches)
            step, client.steps_left = client.steps_left, client.steps_left - 1
            answers.append(num_answer_tokens(batch))
            client.num_tokens += sum(len(example.input_ids) for example in batch)
            client.num_answers += answers[-1]
            rows += [
                _Row(member, client, example, 1 / answers[-1], (client.job.seed, step, position))
                for position, example in enumerate(batch)
                if num_answer_tokens([example])
            ]
        for bank in self._banks:
            bank.gradients.zero_()
        losses = torch.zeros(len(self.clients), device=self._model.device)
        for part in _passes(rows, self._model.device.type):
            losses += self._backward(part)
        norms = self._clip()
        for client, loss, norm in zip(self.clients, losses.unbind(), norms, strict=True):
            client.losses.append(loss)
            client.norms.append(norm)
        # A step without a single answer has no gradient: nothing moves, not even by momentum.
        self._update([client for client, count in zip(self.clients, answers, strict=True) if count])

    def _backward(self, rows: Sequence[_Row]) -> Tensor:
        """Add the gradients of a pass to the banks, and return its part of the loss of each client in the pool."""
        device = self._model.device
        weights = torch.tensor([row.weight for row in rows], device=device)
        members = torch.tensor([row.member for row in rows], device=device)
        shares = _shares(rows, self._model.dropout, device)
        if self._decoder is not None and all(share.bank.shapes.keys() <= self._decoder.paths for share in shares):
            losses = self._backward_written_out(self._decoder, rows, weights, shares)
        else:
            with self._model.without_adapter(), self._layers.meeting(shares):
                losses = weights * self._model.answer_losses(
                    [row.example.input_ids for row in rows], [row.example.labels for row in rows], self._padding
                )
                losses.sum().backward()
        return torch.zeros(len(self.clients), device=device).index_add_(0, members, losses.detach())

    def _backward_written_out(
        self, decoder: GroupDecoder, rows: Sequence[_Row], weights: Tensor, shares: Sequence[Share]
    ) -> Tensor:
        device, length = weights.device, max(row.length for row in rows)
        padded = [[*row.example.input_ids, *[self._padding] * (length - row.length)] for row in rows]
        columns = [[column for column, label in enumerate(row.example.labels[1:]) if label != IGNORED] for row in rows]
        targets = torch.tensor(
            [row.example.labels[column + 1] for row, own in zip(rows, columns, strict=True) for column in own],
            device=device,
        )
        num_chosen = max(map(len, columns))
        if num_chosen > length // 2:
            num_chosen, chosen = length, [range(length)] * len(rows)
            places = [index * length + column for index, own in enumerate(columns) for column in own]
        else:
            chosen = [[*own, *[own[-1]] * (num_chosen - len(own))] for own in columns]
            places = [index * num_chosen + place for index, own in enumerate(columns) for place in range(len(own))]
        owners = torch.tensor([index for index, own in enumerate(columns) for _ in own], device=device)
        with torch.no_grad():
            hidden, kept = decoder.forward(
                torch.tensor(padded, device=device), torch.tensor([list(own) for own in chosen], device=device), shares
            )
        hidden.requires_grad_()
        labelled = hidden.flatten(0, 1).index_select(0, torch.tensor(places, device=device))
        assert self._head is not None
        logits = self._head(decoder.last_norm(labelled)).float()
        nats = functional.cross_entropy(logits, targets, reduction="none")
        losses = weights * nats.new_zeros(len(rows)).index_add(0, owners, nats)
        (gradient,) = torch.autograd.grad(losses.sum(), hidden)
        with torch.no_grad():
            decoder.backward(gradient, kept, shares)
        return losses

    def _clip(self) -> list[Tensor]:
        """Scale the gradient of each client down to the largest norm, and return the norms before."""
        norms = {bank: torch.linalg.vector_norm(bank.gradients, dim=1) for bank in self._banks}
        if self._settings.max_grad_norm is not None:
            for bank, of_slots in norms.items():
                bank.gradients *= (self._settings.max_grad_norm / (of_slots + 1e-6)).clamp(max=1.0)[:, None]
        return [norms[client.places[0][0]][client.places[0][1]] for client in self.clients]

    def _update(self, clients: Sequence[_Client]) -> None:
        for rate in sorted({client.job.learning_rate for client in clients}):
            _optimizer_step([client for client in clients if client.job.learning_rate == rate], self._settings, rate)


def _optimizer_step(clients: Sequence[_Client], settings: LocalTraining, learning_rate: float) -> None:
    places = [client.places[0] for client in clients]
    weights = [bank.trained_weights[slot] for bank, slot in places]
    gradients = [bank.gradients[slot] for bank, slot in places]
    if settings.optimizer == "sgd":
        sgd(
            weights,
            gradients,
            [client.moments[0] if client.moments else None for client in clients],
            fused=True,
            lr=learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        return
    adamw(
        weights,
        gradients,
        [client.moments[0] for client in clients],
        [client.moments[1] for client in clients],
        [],
        [client.num_updates for client in clients],
        fused=True,
        amsgrad=False,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        lr=learning_rate,
        weight_decay=settings.weight_decay,
        eps=_ADAM_EPS,
        maximize=False,
    )


def _num_moments(settings: LocalTraining) -> int:
    return 2 if settings.optimizer == "adamw" else int(settings.momentum > 0)


def _leave(client: _Client) -> AdapterState:
    """Free the client's slots and return its factors."""
    for bank, slot in client.places[1:]:
        bank.leave(slot, {})
    bank, slot = client.places[0]
    return bank.leave(slot, client.job.broadcast.trainable)


def _outcome(client: _Client) -> TrainedClient | Exception:
    adapter = _leave(client)
    try:
        metrics = training_metrics(client.losses, client.norms, client.num_tokens, client.num_answers)
    except DivergedError as error:
        return error
    return TrainedClient(adapter, metrics, client.train_seconds)


def _step_tokens(job: GroupJob, settings: LocalTraining) -> float:
    """Return about how many tokens one optimiser step of a client has."""
    size = min(settings.batch_size * settings.gradient_accumulation_steps, len(job.examples))
    return size * sum(len(example.input_ids) for example in job.examples) / max(1, len(job.examples))


def _factor_bytes(job: GroupJob) -> int:
    adapters = (job.broadcast.trainable, job.broadcast.frozen or {})
    return _BYTES_PER_FACTOR * sum(
        factors.rank * sum(factors.shape) for adapter in adapters for factors in adapter.values()
    )


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _passes(rows: Sequence[_Row], kind: str) -> list[list[_Row]]:
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


def _place(row: _Row) -> tuple[tuple[int, ...], ...]:
    return row.client.order, row.client.slots


def _cheapest_cuts(units: Sequence[Sequence[_Row]], kind: str) -> list[list[_Row]]:
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
            cost = cheapest[start][0] + tokens + _PASS_TOKENS.get(kind, 0) + num_banks * _SHARE_TOKENS.get(kind, 0)
            best = min(best, (cost, start))
        cheapest.append(best)
    parts, end = [], len(units)
    while end:
        start = cheapest[end][1]
        parts.append(sorted((row for unit in units[start:end] for row in unit), key=_place))
        end = start
    return parts


def _cost(rows: Sequence[_Row], kind: str) -> float:
    """Return what a pass costs, in tokens."""
    cost = len(rows) * max(row.length for row in rows) + _PASS_TOKENS.get(kind, 0)
    for _, own in itertools.groupby(rows, key=lambda row: row.client.order):
        places, num_segments = _cut_into_segments([row.client.slots[0] for row in own], torch.device("cpu"))
        gathered = 0 if isinstance(places, slice) else num_segments * _GATHER_TOKENS.get(kind, 0)
        cost += _SHARE_TOKENS.get(kind, 0) + gathered
    return cost


def _shares(rows: Sequence[_Row], dropout: float, device: torch.device) -> list[Share]:
    """Return which rows meet which factors; rows with the same banks, and of one client, are neighbours."""
    shares, start = [], 0
    for banks, group in itertools.groupby(rows, key=lambda row: row.client.banks):
        own = list(group)
        span = slice(start, start := start + len(own))
        for branch, bank in enumerate(banks):
            trained = bank.trained != "none"
            masks = _masks(own, dropout, device) if trained and dropout else None
            shares.append(
                Share(bank, span, *_cut_into_segments([row.client.slots[branch] for row in own], device), masks)
            )
    return shares


def _masks(rows: Sequence[_Row], dropout: float, device: torch.device) -> RowMasks:
    seeds = [stream_seed(seed, "dropout", step, position) for seed, step, position in (row.stream for row in rows)]
    return RowMasks(dropout, seeds, [row.length for row in rows], device)


def _cut_into_segments(slots: Sequence[int], device: torch.device) -> tuple[slice | Tensor, int]:
    """Return the clients of the fewest runs of equally many rows, and how many runs those are."""
    counts = [len(list(group)) for _, group in itertools.groupby(slots)]
    firsts = list(slots)[:: math.gcd(*counts)]
    consecutive = list(range(firsts[0], firsts[0] + len(firsts)))
    places = slice(firsts[0], firsts[-1] + 1) if firsts == consecutive else torch.tensor(firsts, device=device)
    return places, len(firsts)
