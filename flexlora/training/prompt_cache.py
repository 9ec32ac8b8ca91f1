"""Runs prompts of different lengths through a network without computing their padding, and joins what it caches.

Decoding wants many rows at once, because each step reads all weights; reading prompts wants rows of one length, because
padding costs as much as text. So neighbours of similar length are read together, and their keys and values are padded
with zeros, which the mask hides, to one cache for all.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.length_runs import PASS_TOKENS, cheapest_runs
from flexlora.training.logits import next_logits


def read_prompts(
    model: AdaptedModel, input_ids: Int[Tensor, "rows width"], mask: Int[Tensor, "rows width"]
) -> tuple[Float[Tensor, "rows vocab"], Cache | None]:
    """Return what ``next_logits`` returns for whole prompts.

    Args:
        model: With the factors that are loaded.
        input_ids: Padded on the left; rows of similar length are neighbours.
        mask: 0 at padding, 1 elsewhere.
    """
    lengths = mask.sum(1).tolist()
    parts = cheapest_runs(lengths, len(lengths), PASS_TOKENS.get(model.pace, 0))
    if len(parts) == 1 or not model.can_join_caches:
        return next_logits(model, input_ids, mask, None)
    read: list[tuple[Tensor, Cache]] = []
    for rows in parts:
        width = max(lengths[rows])
        logits, cache = next_logits(model, input_ids[rows, -width:], mask[rows, -width:], None)
        assert cache is not None
        read.append((logits, cache))
    return torch.cat([logits for logits, _ in read]), _joined([cache for _, cache in read], input_ids.shape[1])


def _joined(caches: Sequence[Cache], width: int) -> Cache:
    """Return the first of several caches with the rows of all; what they held is let go layer by layer."""
    first = caches[0]
    for number, layer in enumerate(first.layers):
        others = [cache.layers[number] for cache in caches]
        for name in ("keys", "values"):
            tensors = [getattr(other, name) for other in others]
            padded = [functional.pad(tensor, (0, 0, width - tensor.shape[2], 0)) for tensor in tensors]
            setattr(layer, name, torch.cat(padded))
            for other in others[1:]:
                setattr(other, name, None)
    return first
