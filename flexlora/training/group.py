"""Trains many clients at once on one base: what ``train_client`` does, for a pool of clients that share passes.

Every client keeps its own order of examples, number of steps, optimiser state, clipping and dropout, and what it gets
does not depend on who else is in the pool, up to the rounding of sums taken in another order. In each turn of the pool
every client makes one optimiser step, on passes whose rows come from all of them, sorted by length so that hardly any
padding is computed. Whoever has made the last step leaves, and the next client enters.
"""

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from flexlora.data.prompts import IGNORED, padding_token
from flexlora.lora.factors import AdapterState
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.group_decoder import GroupDecoder, decoder_of
from flexlora.training.group_layers import FactorBank, GroupLayers, Share, Trained, without_lora
from flexlora.training.group_passes import GroupJob, PooledClient, Row, cut_into_passes, shares_of
from flexlora.training.logits import answer_losses
from flexlora.training.one_client import (
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


# Clients share a bank while padding makes their factors at most so many times as large.
_MOST_PADDING = 1.5


_ADAM_EPS = 1e-8


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


class _Pool:
    """The clients that train at present."""

    def __init__(self, model: AdaptedModel, settings: LocalTraining, most_clients: int | None) -> None:
        self.clients: list[PooledClient] = []
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
            PooledClient(
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
                Row(member, client, example, 1 / answers[-1], (client.job.seed, step, position))
                for position, example in enumerate(batch)
                if num_answer_tokens([example])
            ]
        for bank in self._banks:
            bank.gradients.zero_()
        losses = torch.zeros(len(self.clients), device=self._model.device)
        for part in cut_into_passes(rows, self._model.device.type):
            losses += self._backward(part)
        norms = self._clip()
        for client, loss, norm in zip(self.clients, losses.unbind(), norms, strict=True):
            client.losses.append(loss)
            client.norms.append(norm)
        # A step without a single answer has no gradient: nothing moves, not even by momentum.
        self._update([client for client, count in zip(self.clients, answers, strict=True) if count])

    def _backward(self, rows: Sequence[Row]) -> Tensor:
        """Add the gradients of a pass to the banks, and return its part of the loss of each client in the pool."""
        device = self._model.device
        weights = torch.tensor([row.weight for row in rows], device=device)
        members = torch.tensor([row.member for row in rows], device=device)
        shares = shares_of(rows, self._model.dropout, device)
        if self._decoder is not None and all(share.bank.shapes.keys() <= self._decoder.paths for share in shares):
            losses = self._backward_written_out(self._decoder, rows, weights, shares)
        else:
            with self._model.without_adapter(), self._layers.meeting(shares):
                losses = weights * answer_losses(
                    self._model,
                    [row.example.input_ids for row in rows],
                    [row.example.labels for row in rows],
                    self._padding,
                )
                losses.sum().backward()
        return torch.zeros(len(self.clients), device=device).index_add_(0, members, losses.detach())

    def _backward_written_out(
        self, decoder: GroupDecoder, rows: Sequence[Row], weights: Tensor, shares: Sequence[Share]
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

    def _update(self, clients: Sequence[PooledClient]) -> None:
        for rate in sorted({client.job.learning_rate for client in clients}):
            _optimizer_step([client for client in clients if client.job.learning_rate == rate], self._settings, rate)


def _optimizer_step(clients: Sequence[PooledClient], settings: LocalTraining, learning_rate: float) -> None:
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


def _leave(client: PooledClient) -> AdapterState:
    """Free the client's slots and return its factors."""
    for bank, slot in client.places[1:]:
        bank.leave(slot, {})
    bank, slot = client.places[0]
    return bank.leave(slot, client.job.broadcast.trainable)


def _outcome(client: PooledClient) -> TrainedClient | Exception:
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
