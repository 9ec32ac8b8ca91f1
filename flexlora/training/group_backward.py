"""Computes the losses of a pass and adds its gradients to the banks, written out or by autograd."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from flexlora.data.prompts import IGNORED, padding_token
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.group_decoder import GroupDecoder, decoder_of
from flexlora.training.group_layers import BankRows, GroupLayers, without_lora
from flexlora.training.group_passes import PassRow, rows_by_bank
from flexlora.training.logits import answer_losses


class GroupBackward:
    """Forward and backward through one network, for passes with rows of many clients."""

    def __init__(self, model: AdaptedModel) -> None:
        """Find out whether the network can be written out; nothing is put into it yet."""
        self._model, self._layers = model, GroupLayers(model.network)
        self._padding = padding_token(model.tokenizer)
        with model.without_adapter():
            head = model.separate_head
            self._head = None if head is None else without_lora(head)
            is_simple = self._head is not None and not model.dropout
            self._decoder = decoder_of(model.network) if is_simple else None

    def add(self, paths: Iterable[str]) -> None:
        """Prepare for factors of these modules."""
        self._layers.add(paths)

    def __call__(self, rows: Sequence[PassRow], num_clients: int) -> Tensor:
        """Add the gradients of a pass to the banks, and return its part of the loss of each client in the pool."""
        device = self._model.device
        weights = torch.tensor([row.weight for row in rows], device=device)
        pool_indices = torch.tensor([row.pool_index for row in rows], device=device)
        bank_rows = rows_by_bank(rows, self._model.dropout, device)
        if self._decoder is not None and all(part.bank.shapes.keys() <= self._decoder.paths for part in bank_rows):
            losses = self._written_out(self._decoder, rows, weights, bank_rows)
        else:
            with self._model.without_adapter(), self._layers.using(bank_rows):
                losses = weights * answer_losses(
                    self._model,
                    [row.example.input_ids for row in rows],
                    [row.example.labels for row in rows],
                    self._padding,
                )
                losses.sum().backward()
        return torch.zeros(num_clients, device=device).index_add_(0, pool_indices, losses.detach())

    def _written_out(
        self, decoder: GroupDecoder, rows: Sequence[PassRow], weights: Tensor, bank_rows: Sequence[BankRows]
    ) -> Tensor:
        device = weights.device
        chosen = _choose_positions(rows, device)
        with torch.no_grad():
            hidden, kept = decoder.forward(_padded(rows, self._padding, device), chosen.columns, bank_rows)
        hidden.requires_grad_()
        labelled = hidden.flatten(0, 1).index_select(0, chosen.places)
        assert self._head is not None
        normed = decoder.last_norm(labelled)
        logits = self._head(normed.to(decoder.dtype)).float()
        nats = functional.cross_entropy(logits, chosen.targets, reduction="none")
        losses = weights * nats.new_zeros(len(rows)).index_add(0, chosen.owners, nats)
        (gradient,) = torch.autograd.grad(losses.sum(), hidden)
        with torch.no_grad():
            decoder.backward(gradient, kept, bank_rows)
        return losses


@dataclass(frozen=True)
class _ChosenPositions:
    """Where hidden states are needed: as many columns in each row, at least those that predict a label.

    Attributes:
        columns: [rows, chosen]; all of them if labels are at more than half.
        places: Of those that predict a label, numbered through all chosen ones.
        targets: The labels, in that order.
        owners: Their rows.
    """

    columns: Tensor
    places: Tensor
    targets: Tensor
    owners: Tensor


def _choose_positions(rows: Sequence[PassRow], device: torch.device) -> _ChosenPositions:
    length = max(row.length for row in rows)
    columns = [[column for column, label in enumerate(row.example.labels[1:]) if label != IGNORED] for row in rows]
    targets = [row.example.labels[column + 1] for row, own in zip(rows, columns, strict=True) for column in own]
    num_chosen = max(map(len, columns))
    if num_chosen > length // 2:
        num_chosen, chosen = length, [list(range(length))] * len(rows)
        places = [index * length + column for index, own in enumerate(columns) for column in own]
    else:
        chosen = [[*own, *[own[-1]] * (num_chosen - len(own))] for own in columns]
        places = [index * num_chosen + place for index, own in enumerate(columns) for place in range(len(own))]
    owners = [index for index, own in enumerate(columns) for _ in own]
    return _ChosenPositions(*(torch.tensor(numbers, device=device) for numbers in (chosen, places, targets, owners)))


def _padded(rows: Sequence[PassRow], padding: int, device: torch.device) -> Tensor:
    length = max(row.length for row in rows)
    padded = [[*row.example.input_ids, *[padding] * (length - row.length)] for row in rows]
    return torch.tensor(padded, device=device)
