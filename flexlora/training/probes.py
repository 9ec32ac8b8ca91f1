"""Finds out what a network does, from its settings or by trying a few tokens."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

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


def cache_name(network: PreTrainedModel) -> str:
    """Return what the network calls the cache that it takes and returns."""
    known = inspect.signature(network.forward).parameters
    return "cache_params" if "cache_params" in known and "past_key_values" not in known else "past_key_values"


def can_cache(network: PreTrainedModel) -> bool:
    """Return whether a step that is given the cache of the one before computes what all tokens at once do, tried."""
    name = cache_name(network)
    tokens = torch.arange(_PROBE_LENGTH, device=network.device)[None]
    with torch.no_grad():
        expected = network(input_ids=tokens, use_cache=False).logits[:, -1]
        try:
            first = network(input_ids=tokens[:, :-1], use_cache=True)
            cache = getattr(first, name)
            second = network(**{"input_ids": tokens[:, -1:], name: cache, "use_cache": True})
        except Exception:  # Whatever an architecture makes of a cache that it has not, or keeps elsewhere.
            return False
    return hasattr(cache, "reorder_cache") and _are_near(second.logits[:, -1], expected)


def can_pad_left(network: PreTrainedModel, *, with_cache: bool) -> bool:
    """Return whether padding in front of a prompt, masked, changes nothing, tried on a few tokens.

    The state of a state-space model, or of linear attention, sees it.

    Args:
        network: With weights.
        with_cache: Try it in two steps, the second of which goes on from the cache of the first.
    """
    tokens = torch.arange(_PROBE_LENGTH, device=network.device)[None]
    padded = torch.cat([torch.full_like(tokens, _PROBE_LENGTH), tokens], 1)
    mask = torch.cat([torch.zeros_like(tokens), torch.ones_like(tokens)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def options(first: int, last: int) -> dict[str, Any]:
        """Return what the network is told of some columns, ``last`` not included."""
        placed = {"position_ids": positions[:, first:last]} if takes_positions(network) else {}
        return {"input_ids": padded[:, first:last], "attention_mask": mask[:, :last], "use_cache": with_cache, **placed}

    name, width = cache_name(network), padded.shape[1]
    with torch.no_grad():
        expected = network(input_ids=tokens, use_cache=False).logits[:, -1]
        try:
            if with_cache:
                cache = getattr(network(**options(0, width - 1)), name)
                found = network(**options(width - 1, width), **{name: cache}).logits[:, -1]
            else:
                found = network(**options(0, width)).logits[:, -1]
        except Exception:  # Whatever an architecture makes of a mask that it does not take.
            return False
    return _are_near(found, expected)


def grows_plainly(network: PreTrainedModel) -> bool:
    """Return whether its cache is nothing but keys and values of all columns, as [rows, heads, columns, features]."""
    tokens = torch.arange(_PROBE_LENGTH, device=network.device)[None]
    with torch.no_grad():
        cache = getattr(network(input_ids=tokens, use_cache=True), cache_name(network))
    layers = cache.layers if type(cache) is DynamicCache else []
    return bool(layers) and all(
        type(layer) is DynamicLayer and layer.keys is not None and layer.keys.ndim == 4 for layer in layers
    )


def is_causal(network: PreTrainedModel) -> bool:
    """Return whether what follows a token changes nothing there, tried on a few tokens."""
    tokens = torch.arange(_PROBE_LENGTH, device=network.device)[None]
    others = torch.cat([tokens[:, :-1], tokens[:, -1:] + 1], 1)
    with torch.no_grad():
        one, other = (network(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (tokens, others))
    return _are_near(one, other)


def _are_near(found: Tensor, expected: Tensor) -> bool:
    """Return whether logits differ by no more than rounding does."""
    share = 1e-4 if found.dtype == torch.float32 else 5e-2
    return bool((found - expected).abs().max() <= share * expected.abs().max())


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


def modules_reached(network: PreTrainedModel, linear: Mapping[str, nn.Module]) -> dict[str, bool]:
    """Return the modules that a text runs through, and whether they return a product alone, tried on a few tokens.

    Experts of their own count whether or not the router has chosen them. A network without weights that cannot be tried
    is judged by its structure: only the part of it that reads texts counts.

    Args:
        network: With or without weights.
        linear: Path -> module.
    """
    reached: dict[str, bool] = {}

    def note(path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        """Note a module that is called; routers are linear modules that return more."""
        reached[path] = isinstance(output, Tensor) and output.shape[:-1] == inputs[0].shape[:-1]

    with ExitStack() as stack:
        for path, module in linear.items():
            stack.enter_context(module.register_forward_hook(partial(note, path)))
        if not _runs(network):
            return {path: True for path in linear if path.startswith(_text_part(network))}
    return {path: True for path in linear if ".experts." in path} | reached


def _runs(network: PreTrainedModel) -> bool:
    """Run a few tokens through a network, and return whether it can."""
    tokens = torch.arange(_PROBE_LENGTH, device=network.device)[None]
    ways: list[dict[str, Any]] = [{"use_cache": False}]
    if network.device.type == "meta":
        # What masks look at to save work has no value there; with a cache or a mask they do not look.
        ways += [{"attention_mask": torch.ones_like(tokens), "use_cache": False}]
        ways += [{"past_key_values": DynamicCache(config=network.config), "use_cache": True}]
    with torch.no_grad(), _without_experts(network):
        for way in ways:
            try:
                network(input_ids=tokens, **way)
            except Exception:  # Whatever an architecture makes of tensors without values.
                if network.device.type != "meta":
                    raise
            else:
                return True
    return False


@contextmanager
def _without_experts(network: PreTrainedModel) -> Iterator[None]:
    """Let stacked experts pass on what they are given, in a network without weights, where nothing can be routed."""
    stacked = [
        module
        for module in network.modules()
        if network.device.type == "meta"
        and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        and "expert" in type(module).__name__.lower()
    ]
    for module in stacked:
        module.forward = lambda hidden, *rest, **options: hidden
    try:
        yield
    finally:
        for module in stacked:
            del module.forward


def _text_part(network: PreTrainedModel) -> str:
    """Return what the paths of modules start with that read texts; empty if all may."""
    if network.config.get_text_config() is network.config:
        return ""
    decoder = network.get_decoder()
    return next((f"{path}." for path, module in network.named_modules() if module is decoder and path), "")
