"""Merges an adapter into the weights of its base and writes the whole model."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from flexlora.adapters.card import Card
from flexlora.adapters.peft_format import AdapterError
from flexlora.files import appearing_whole
from flexlora.lora.factors import AdapterState


def merge_into_base(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: AdapterState,
    folder: Path | str,
    card: Card | None = None,
) -> None:
    """Add ``adapter`` to the weights of ``base``, in memory too, and write model, tokenizer and card as one folder.

    Sums are formed in float64 and rounded once to the dtype of the weights.

    Raises:
        AdapterError: If ``folder`` holds something, or a module does not exist or shares its weight with another.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise AdapterError(f"{folder} must be new or empty; it holds files")
    weights = {path: _own_weight(base, path) for path in sorted(adapter)}
    with torch.no_grad():
        for path, weight in weights.items():
            delta = adapter[path].delta().to(weight.device)
            is_transposed = isinstance(base.get_submodule(path), Conv1D)
            weight.copy_(weight.to(torch.float64) + (delta.T if is_transposed else delta))
    with appearing_whole(folder) as partial:
        base.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if card is not None:
            card.write(partial)


def _own_weight(base: PreTrainedModel, path: str) -> Tensor:
    weights = dict(base.named_parameters(remove_duplicate=False))
    weight = weights.get(f"{path}.weight")
    if weight is None:
        raise AdapterError(f"{path}: the base model has no such module with a weight")
    sharing = [name for name, other in weights.items() if other is weight and name != f"{path}.weight"]
    if sharing:
        raise AdapterError(f"{path}: its weight is also {', '.join(sharing)}, which merging would change too")
    return weight
