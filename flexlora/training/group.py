"""Trains a pool of clients on one base as ``train_client`` trains one; the clients share passes.

Every client keeps its own order of examples, number of steps, optimiser state, clipping and dropout. Its result does
not depend on the other clients in the pool, except for the rounding of sums taken in another order. In each turn, every
client makes one optimiser step, on passes whose rows come from all of them, sorted by length to save padding. A client
that has made its last step leaves, and the next one enters.
"""

import itertools
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import AdapterState
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.common_ranks import CommonRanks, common_ranks
from flexlora.training.factor_bank import FactorBank, Trained
from flexlora.training.group_backward import GroupBackward
from flexlora.training.group_optimizer import clip_gradients, num_moments, update_factors
from flexlora.training.group_passes import GroupJob, PassRow, PooledClient, cut_into_passes
from flexlora.training.group_room import has_room, tokens_with_memory
from flexlora.training.group_terms import add_terms
from flexlora.training.one_client import (
    DivergedError,
    LocalTraining,
    check_trainable,
    num_answer_tokens,
    step_batches,
    training_metrics,
)

# Clients share a bank while padding makes their factors at most this many times as large.
_MOST_PADDING = 1.5


@dataclass(frozen=True)
class TrainedClient:
    """The result of a job.

    Attributes:
        adapter: The trained factors, as ``train_client`` returns them.
        metrics: What was measured, as ``train_client`` returns it.
        train_seconds: The client's share, by tokens, of the time its group took.
        cores: The trained cores, if the broadcast said to train those.
    """

    adapter: AdapterState
    metrics: Mapping[str, float]
    train_seconds: float
    cores: Mapping[str, Tensor] | None = None


def train_group(
    model: AdaptedModel,
    jobs: Iterable[GroupJob],
    settings: LocalTraining,
    clients_per_group: int | None = None,
    broadcasts: Iterable[Broadcast] = (),
    most_pass_tokens: int | None = None,
) -> Iterator[TrainedClient | Exception]:
    """Yield one outcome per job, in the order of the jobs.

    The outcome of a job that fails is its exception; other jobs are not affected. Jobs are taken from the iterable only
    when there is room for them. Between outcomes the model is as it was before.

    Args:
        model: The base; ``reason_against_groups`` must return None for it and the modules of the jobs.
        jobs: What to train.
        settings: How to train; passes are cut here, whatever ``batch_size`` is.
        clients_per_group: Most clients at a time; None decides by tokens and memory.
        broadcasts: What jobs still to come may start from, as far as it is known; on a GPU it decides to which ranks
            factors are padded.
        most_pass_tokens: Most tokens of a pass, padding included; None means as many as there is memory for. Where
            memory runs out all the same, clients train again, half as many at a time on passes of half as many.
    """
    ranks = common_ranks(model.device.type, model.num_parameters, broadcasts)
    most_tokens = most_pass_tokens or tokens_with_memory(model)
    pool, queue = _Pool(model, settings, clients_per_group, ranks, most_tokens), enumerate(jobs)
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

    def __init__(
        self,
        model: AdaptedModel,
        settings: LocalTraining,
        most_clients: int | None,
        ranks: CommonRanks,
        most_tokens: int,
    ) -> None:
        self.clients: list[PooledClient] = []
        self._model, self._settings, self._most_clients, self._ranks = model, settings, most_clients, ranks
        self._most_tokens = most_tokens
        self._backward, self._banks = GroupBackward(model), list[FactorBank]()

    def has_room(self, job: GroupJob) -> bool:
        """Return whether the client of ``job`` may enter now."""
        training = [client.job for client in self.clients]
        model = self._model
        return has_room(training, job, self._settings, model.device, self._most_clients, model.pace, self._ranks)

    def enter(self, index: int, job: GroupJob) -> None:
        """Store the factors of a client and let it take part in the next turn."""
        check_trainable(job.broadcast, job.examples)
        trained = job.broadcast.train_factors
        assert trained != "core" and job.broadcast.mask is None, "trains_alone says so"
        branches: list[tuple[AdapterState, Trained]] = [(job.broadcast.trainable, trained)]
        if job.broadcast.frozen:
            branches.append((job.broadcast.frozen, "none"))
        for adapter, _ in branches:
            self._model.check(adapter)
            self._backward.add(adapter)
        bank_slots = tuple(self._enter_bank(adapter, trained) for adapter, trained in branches)
        bank, slot = bank_slots[0]
        self.clients.append(
            PooledClient(
                job_index=index,
                job=job,
                bank_slots=bank_slots,
                bank_numbers=tuple(self._banks.index(bank) for bank, _ in bank_slots),
                batches=step_batches(job.examples, self._settings, np.random.default_rng(job.seed)),
                steps_left=self._settings.num_steps(len(job.examples)),
                moments=[torch.zeros_like(bank.gradients[slot]) for _ in range(num_moments(self._settings))],
                num_updates=torch.zeros((), device=self._model.device),
            )
        )

    def _enter_bank(self, adapter: AdapterState, trained: Trained) -> tuple[FactorBank, int]:
        ranks = self._ranks.stored(adapter, is_trained=trained != "none")
        fitting = [bank for bank in self._banks if bank.fits(ranks, trained, _MOST_PADDING)]
        if fitting:
            bank = min(fitting, key=lambda bank: bank.num_columns)
        else:
            shapes = {path: (ranks[path], factors.shape[1], factors.shape[0]) for path, factors in adapter.items()}
            keeps_starts = trained != "none" and self._settings.proximal > 0
            bank = FactorBank(shapes, trained, self._model.device, keeps_starts=keeps_starts)
            self._banks.append(bank)
        return bank, bank.enter(adapter)

    def turn(self) -> dict[int, TrainedClient | Exception]:
        """Let every client make one step, and return the outcomes of those that are done."""
        start, tokens_before = time.perf_counter(), [client.num_tokens for client in self.clients]
        try:
            self._step()
        except Exception as error:
            return self._trained_again(error)
        seconds = time.perf_counter() - start
        tokens = [client.num_tokens - before for client, before in zip(self.clients, tokens_before, strict=True)]
        for client, own in zip(self.clients, tokens, strict=True):
            client.train_seconds += seconds * own / max(1, sum(tokens))
        leaving = [client for client in self.clients if not client.steps_left]
        self.clients = [client for client in self.clients if client.steps_left]
        return {client.job_index: _outcome(client) for client in leaving}

    def _trained_again(self, error: Exception) -> dict[int, TrainedClient | Exception]:
        """Train the clients again: fewer at a time if memory ran out, else each alone, to find the one that failed."""
        jobs, indices = [client.job for client in self.clients], [client.job_index for client in self.clients]
        ran_out = isinstance(error, torch.OutOfMemoryError | MemoryError)
        most_tokens = self._most_tokens // 2 if ran_out else self._most_tokens
        longest = max(len(example.input_ids) for job in jobs for example in job.examples)
        for client in self.clients:
            _leave(client)
        if len(jobs) == 1 and (not ran_out or self._most_tokens < longest):
            self.clients = []
            return {indices[0]: error}
        # What the failed pass computed must not stay in memory, nor the banks.
        self.clients, self._banks = [], []
        _forget_frames(error)
        most_clients = max(1, len(jobs) // 2) if ran_out else 1
        again = train_group(self._model, jobs, self._settings, most_clients, most_pass_tokens=most_tokens)
        return dict(zip(indices, again, strict=True))

    def _step(self) -> None:
        rows, answers = [], []
        for pool_index, client in enumerate(self.clients):
            batch = next(client.batches)
            step, client.steps_left = client.steps_left, client.steps_left - 1
            answers.append(num_answer_tokens(batch))
            client.num_tokens += sum(len(example.input_ids) for example in batch)
            client.num_answers += answers[-1]
            rows += [
                PassRow(pool_index, client, example, 1 / answers[-1], (client.job.seed, step, position))
                for position, example in enumerate(batch)
                if num_answer_tokens([example])
            ]
        for bank in self._banks:
            bank.gradients.zero_()
        losses = torch.zeros(len(self.clients), device=self._model.device)
        for part in cut_into_passes(rows, self._model.pace, self._most_tokens):
            losses += self._backward(part, len(self.clients))
        # A step without an answer token has no gradient; nothing moves, not even by momentum.
        moving = [client for client, count in zip(self.clients, answers, strict=True) if count]
        add_terms(moving, self._banks, self._settings.proximal)
        norms = clip_gradients(self.clients, self._banks, self._settings.max_grad_norm)
        for client, loss, norm in zip(self.clients, losses.unbind(), norms, strict=True):
            client.losses.append(loss)
            client.norms.append(norm)
        update_factors(moving, self._settings)


def _forget_frames(error: Exception) -> None:
    """Free what the functions that an error left keep alive."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _leave(client: PooledClient) -> AdapterState:
    """Free the client's slots and return its factors."""
    for bank, slot in client.bank_slots[1:]:
        bank.leave(slot, {})
    bank, slot = client.bank_slots[0]
    return bank.leave(slot, client.job.broadcast.trainable)


def _outcome(client: PooledClient) -> TrainedClient | Exception:
    adapter = _leave(client)
    try:
        metrics = training_metrics(client.losses, client.norms, client.num_tokens, client.num_answers)
    except DivergedError as error:
        return error
    return TrainedClient(adapter, metrics, client.train_seconds)
