"""Guards the loading of base models: whatever is wrong with the files of somebody else becomes one error.

Sizes are checked before a model is built, and what was built against its files: a weight that is missing from them
would else be a random one.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexlora.errors import FlexLoraError
from flexlora.hub_reach import why_not_reached
from flexlora.training.linear_modules import ModelError

LONGEST_REASON = 3000
"""In characters: what to do often stands at the end of what transformers says."""

MOST_PARTS = 10_000
"""Most layers or experts."""

LARGEST_SIZE = 1_000_000_000
"""Largest width, number of heads or vocabulary."""

_PARTS = re.compile(r".*(layers?|experts?|blocks|depth)(_per_tok|_size)?")
_SIZES = re.compile(r".*(size|dim|heads?|embd|inner|d_model|d_ff|_rank)")

_OTHER_KIND = re.compile(r"Unrecognized configuration class <class '(?:[\w.]+\.)?(\w+)'>")
"""How transformers begins where an architecture is none of those that it loads as causal language models."""

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "consolidated*.pth")


@contextmanager
def loading(name_or_path: str, is_reached: bool = True) -> Iterator[None]:
    """Turn every error of loading a model or its tokenizer in a ``with`` block into one that names it.

    Args:
        name_or_path: The model.
        is_reached: Whether the hub could be asked, if it had to be.

    Raises:
        ModelError: With the reason that transformers gives.
    """
    try:
        yield
    except (FlexLoraError, MemoryError):
        raise
    except Exception as error:  # What damaged files make libraries raise cannot be listed.
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise not_loadable(name_or_path, error, is_reached) from error


def not_loadable(name_or_path: str, error: Exception, is_reached: bool = True) -> ModelError:
    """Return the error for a model that did not load."""
    folder = Path(name_or_path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(any(folder.glob(name)) for name in PICKLES):
        return ModelError(
            f"the weights of a base model must be in safetensors files; {name_or_path} has pickles, which can run code "
            "when they are read: load it with transformers where you trust it, and save it again with save_pretrained"
        )
    if folder.exists():
        rule = f"the folder {name_or_path} must hold a causal language model as transformers saves it"
    elif not is_reached:
        return ModelError(
            f"the base model must be a local folder or a hub id; there is no folder {name_or_path}, no copy of such a "
            f"model in the local cache, and {why_not_reached()}"
        )
    else:
        rule = (
            f"the base model must be a local folder or a hub id; there is no folder {name_or_path}, and no such model "
            "was found on the hub. Check the spelling, and HF_TOKEN if the model is gated"
        )
    reason = " ".join(str(error).split())
    if match := _OTHER_KIND.search(reason):
        return ModelError(
            f"the base model must be a causal language model, one that continues a text; {name_or_path} has a "
            f"{match[1]}, which transformers cannot load as one: name a decoder-only model, or the language model alone"
        )
    if not isinstance(error, OSError | ValueError | ImportError):
        reason = f"{type(error).__name__}: {reason}"
    return ModelError(f"{rule}. Reason: {reason[:LONGEST_REASON]}")


def check_sizes(config: Mapping[str, Any], name_or_path: str) -> None:
    """Raise if a configuration asks for a model that no machine could build.

    Raises:
        ModelError: Naming the setting.
    """
    for key, value in _numbers(config):
        leaf = key.rpartition(".")[2]
        most = MOST_PARTS if _PARTS.fullmatch(leaf) else LARGEST_SIZE if _SIZES.fullmatch(leaf) else None
        if most is not None and value > most:
            raise ModelError(
                f"{name_or_path}: {key} in config.json must be at most {most:,}; got {value:.4g}: put a copy of the "
                "file back"
            )


def check_weights(model: PreTrainedModel, info: Mapping[str, Any], name_or_path: str) -> None:
    """Raise unless every weight of a model was read from its files and holds numbers.

    Args:
        info: What transformers says about the loading (``output_loading_info``).

    Raises:
        ModelError: Naming the weight.
    """
    missing = sorted(str(key) for key in info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{name_or_path} must hold every weight of its model; missing: {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}. Its files are damaged, or those of "
            "another model: put a copy of them back"
        )
    for name, weight in model.named_parameters():
        # NaN and infinity are what a sum of them comes to, too.
        if weight.is_floating_point() and weight.numel() and not torch.isfinite(weight.sum(dtype=torch.float32)):
            extremes = torch.stack(torch.aminmax(weight.float()))
            if not torch.isfinite(extremes).all():
                raise ModelError(f"{name_or_path}: {name} holds NaN or infinity; put a copy of its weights back")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> None:
    """Raise if a tokenizer makes no tokens of a plain text.

    Raises:
        ModelError: Saying what to look at.
    """
    tokens = tokenizer("The answer is 42.", add_special_tokens=False)["input_ids"]
    if not tokens or all(token == tokenizer.unk_token_id for token in tokens):
        raise ModelError(
            f"{name_or_path}: its tokenizer makes {'no tokens' if not tokens else 'unknown tokens only'} of a plain "
            "text; tokenizer.json is missing, empty or damaged: put a copy of it back"
        )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _numbers(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value
