"""Clips gradients and makes optimiser steps for all clients of a group at once."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from flexlora.training.factor_bank import FactorBank
from flexlora.training.group_passes import PooledClient
from flexlora.training.one_client import LocalTraining

_ADAM_EPS = 1e-8


def clip_gradients(
    clients: Sequence[PooledClient], banks: Iterable[FactorBank], max_grad_norm: float | None
) -> list[Tensor]:
    """Scale the gradient of each client down to the largest norm, and return the norms before."""
    norms = {bank: torch.linalg.vector_norm(bank.gradients, dim=1) for bank in banks}
    if max_grad_norm is not None:
        for bank, of_slots in norms.items():
            bank.gradients *= (max_grad_norm / (of_slots + 1e-6)).clamp(max=1.0)[:, None]
    return [norms[client.bank_slots[0][0]][client.bank_slots[0][1]] for client in clients]


def update_factors(clients: Sequence[PooledClient], settings: LocalTraining) -> None:
    """Let the optimiser of each client make a step."""
    for rate in sorted({client.job.learning_rate for client in clients}):
        _step([client for client in clients if client.job.learning_rate == rate], settings, rate)


def num_moments(settings: LocalTraining) -> int:
    """Return how many tensors as large as the gradient the optimiser keeps."""
    return 2 if settings.optimizer == "adamw" else int(settings.momentum > 0)


def _step(clients: Sequence[PooledClient], settings: LocalTraining, learning_rate: float) -> None:
    bank_slots = [client.bank_slots[0] for client in clients]
    weights = [bank.trained_weights[slot] for bank, slot in bank_slots]
    gradients = [bank.gradients[slot] for bank, slot in bank_slots]
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
