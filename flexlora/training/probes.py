"""Finds out what a network does, from its settings or by trying a few tokens."""

import inspect

import torch
from torch import nn
from transformers import PreTrainedModel

_PROBE_LENGTH = 4

# Settings of heads that a causal model does not have.
_OTHER_HEADS = ("classifier_", "summary_")


def separate_head(network: PreTrainedModel) -> nn.Module | None:
    """Return the output layer if it alone turns the last hidden states into logits, tried on a few tokens."""
    decoder, head = network.base_model, network.get_output_embeddings()
    if decoder is network or head is None:
        return None
    with torch.no_grad():
        tokens = torch.arange(_PROBE_LENGTH, device=network.device)[None]
        hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        expected = network(input_ids=tokens, use_cache=False).logits
        logits = head(hidden)
    return head if logits.shape == expected.shape and torch.allclose(logits, expected) else None


def takes_positions(network: PreTrainedModel) -> bool:
    """Return whether the network can be told the position of each token."""
    return "position_ids" in inspect.signature(network.forward).parameters


def has_dropout(network: PreTrainedModel) -> bool:
    """Return whether the network has dropout of its own, in its settings or its modules."""
    settings = network.config.get_text_config().to_dict()
    rates = [
        rate
        for name, rate in settings.items()
        if name.endswith(("dropout", "pdrop")) and not name.startswith(_OTHER_HEADS)
    ]
    rates += [module.p for module in network.modules() if isinstance(module, nn.Dropout)]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)
