"""Computes logits of an adapted model only at the positions where somebody looks at them.

Where logits are the output layer applied to the last hidden states, that layer is applied at those positions only.
Models that do more, such as capping logits, compute all of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from flexlora.data.prompts import IGNORED
from flexlora.training.adapted_model import AdaptedModel


def answer_losses(
    model: AdaptedModel, rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], padding: int
) -> Float[Tensor, " rows"]:
    """Return the cross-entropy in nats of each row, summed over the tokens that have a label.

    Args:
        model: With the factors that are loaded.
        rows: Tokens; shorter rows are padded on the right, where a causal model needs no attention mask.
        labels: As long as its row, each the token itself or -100; shifted here.
        padding: Any token.
    """
    length = max(map(len, rows))
    padded = [[*row, *[padding] * (length - len(row))] for row in rows]
    looked_at = [
        (index, index * length + column - 1, label)
        for index, row_labels in enumerate(labels)
        for column, label in enumerate(row_labels)
        if column and label != IGNORED
    ]
    owners, positions, targets = torch.tensor(looked_at, device=model.device).reshape(-1, 3).unbind(1)
    logits = _logits_at(model, torch.tensor(padded, device=model.device), positions)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return losses.new_zeros(len(rows)).index_add(0, owners, losses)


def _logits_at(
    model: AdaptedModel, input_ids: Int[Tensor, "rows length"], positions: Int[Tensor, " chosen"]
) -> Float[Tensor, "chosen vocab"]:
    """Return float32 logits at positions numbered through all rows."""
    head = model.separate_head
    if head is None:
        logits = model.network(input_ids=input_ids, use_cache=False).logits
        return logits.flatten(0, 1).index_select(0, positions).float()
    hidden = model.network.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return head(hidden.flatten(0, 1).index_select(0, positions)).float()


def next_logits(
    model: AdaptedModel,
    input_ids: Int[Tensor, "batch new"],
    attention_mask: Int[Tensor, "batch seen"],
    cache: Cache | None,
) -> tuple[Float[Tensor, "batch vocab"], Cache | None]:
    """Return the logits after the last column, in float32, and the cache that now holds all columns, if there is one.

    Args:
        model: With the factors that are loaded.
        input_ids: The columns that ``cache`` does not hold yet, all of them where the model cannot go on from one;
            prompts are padded on the left.
        attention_mask: 0 at padding, 1 elsewhere, over all columns so far.
        cache: What the previous call returned; None at first.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": model.can_cache}
    if model.can_cache:
        inputs[model.cache_name] = cache
    if model.can_pad_left:
        inputs["attention_mask"] = attention_mask
    if model.takes_positions:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        inputs["position_ids"] = positions[:, -input_ids.shape[1] :]
    head = model.separate_head
    if head is None:
        output = model.network(**inputs)
        return output.logits[:, -1].float(), getattr(output, model.cache_name) if model.can_cache else None
    output = model.network.base_model(**inputs)
    logits = head(output.last_hidden_state[:, -1]).float()
    return logits, getattr(output, model.cache_name) if model.can_cache else None
