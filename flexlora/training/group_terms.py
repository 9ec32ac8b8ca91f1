"""Adds the gradients of added terms of the loss to the banks, for all clients of a group at once."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flexlora.training.added_terms import num_left_alone, proximal_gradients, tail_gradients
from flexlora.training.factor_bank import FactorBank
from flexlora.training.group_passes import PooledClient


def add_terms(clients: Sequence[PooledClient], banks: Iterable[FactorBank], proximal: float) -> None:
    """Add the gradients of the terms that ``train_client`` adds, for clients whose step has a gradient.

    Args:
        clients: Those that move in this step.
        banks: Of all clients; where there is a proximal term, they know where each client started.
        proximal: Weight of the proximal term; 0 for none.
    """
    for bank in banks:
        own = [client for client in clients if client.bank_slots[0][0] is bank]
        penalised = [client for client in own if client.job.broadcast.tail_penalty is not None]
        if penalised:
            _add_tail_penalties(bank, penalised)
        if own and proximal:
            _add_proximal_terms(bank, own, proximal)


def _add_tail_penalties(bank: FactorBank, clients: Sequence[PooledClient]) -> None:
    slots = [client.bank_slots[0][1] for client in clients]
    for path, (rank, _, _) in bank.shapes.items():
        A, B = (factors[slots] for factors in bank.factors[path])
        weights, left_alone = [], []
        for client in clients:
            penalty = client.job.broadcast.tail_penalty
            assert penalty is not None
            weights.append(penalty.weight)
            left_alone.append(num_left_alone(penalty.share, client.job.broadcast.trainable[path].rank))
        is_tail = torch.arange(rank, device=A.device) >= torch.tensor(left_alone, device=A.device)[:, None]
        _add(bank, path, slots, tail_gradients(A, B, is_tail, torch.tensor(weights, device=A.device)[:, None, None]))


def _add_proximal_terms(bank: FactorBank, clients: Sequence[PooledClient], proximal: float) -> None:
    slots = [client.bank_slots[0][1] for client in clients]
    for path in bank.shapes:
        A, B = (factors[slots] for factors in bank.factors[path])
        start_A, start_B = (factors[slots] for factors in bank.start_factors(path))
        _add(bank, path, slots, proximal_gradients(A, B, start_A, start_B, bank.scalings(path)[slots], proximal))


def _add(bank: FactorBank, path: str, slots: Sequence[int], gradients: tuple[Tensor, Tensor]) -> None:
    for into, gradient in zip(bank.factor_gradients[path], gradients, strict=True):
        if into is not None:
            into[list(slots)] += gradient
