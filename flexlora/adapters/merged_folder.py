"""Writes the folder of a merged adapter: casts factors, lays out their ranks and finds the settings that fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from flexlora.adapters.base_names import is_path, portable_name
from flexlora.adapters.card import Card, base_title, loading_text, table
from flexlora.adapters.folder import AdapterFolder
from flexlora.adapters.laid_out import laid_out
from flexlora.adapters.merge_request import MergeRequest
from flexlora.adapters.peft_format import WEIGHTS_FILE, factor_keys
from flexlora.adapters.rank_layout import common_rank
from flexlora.adapters.tensor_file import TensorSpool
from flexlora.adapters.together import MergeError, common_setting, common_targets, named_base
from flexlora.adapters.write import AdapterDtype, peft_config, write_config
from flexlora.files import appearing_whole
from flexlora.lora.factors import LoraFactors

MOST_NAMED = 50
"""Adapters that a card names."""


def cast_factor(factor: Tensor, dtype: AdapterDtype, path: str) -> Tensor:
    """Return a factor on the CPU in the type to write, which must be able to hold its largest number."""
    largest, limits = float(factor.abs().max()), torch.finfo(getattr(torch, dtype))
    if largest != 0 and not limits.tiny <= largest <= limits.max:
        raise MergeError(
            f"factors must be within {limits.tiny:.1g} and {limits.max:.1g} for {dtype}; the largest number of {path} "
            f"is {largest:.1g}: use {'float32 or bfloat16' if dtype == 'float16' else 'weights nearer to 1'}"
        )
    return factor.to("cpu", getattr(torch, dtype))


@dataclass(frozen=True)
class SpooledModule:
    """One module in a spool: its factors have the scaling 1.

    Attributes:
        rank: In the spool.
        stored_rank: To write.
        is_embedding: Whether its change is stored transposed.
    """

    rank: int
    stored_rank: int
    is_embedding: bool


def spool_dtype(request: MergeRequest) -> AdapterDtype:
    """Return the type that factors wait in: float32 where they may still be scaled before they are written."""
    return request.dtype if request.layout.ranks == "uniform" else "float32"


def write_merged(
    folder: Path,
    spool: TensorSpool,
    config: Mapping[str, object],
    modules: Mapping[str, SpooledModule],
    request: MergeRequest,
    card: Card,
) -> None:
    """Write the folder, whole or not at all, with the tensors of ``spool`` and every module at its ``stored_rank``."""
    lora_alpha = config["lora_alpha"]
    assert isinstance(lora_alpha, int)
    casting = spool_dtype(request) != request.dtype
    changing = {
        path: module
        for path, module in modules.items()
        if casting or not module.rank == module.stored_rank == lora_alpha
    }
    with appearing_whole(folder, replace=False) as partial:
        write_config(partial, config)
        card.write(partial)
        spool.write(partial / WEIGHTS_FILE)
        if changing:
            _lay_out(partial / WEIGHTS_FILE, changing, lora_alpha, request.dtype)


def _lay_out(weights_file: Path, modules: Mapping[str, SpooledModule], lora_alpha: int, dtype: AdapterDtype) -> None:
    """Give modules of a written file their ranks and the scaling ``lora_alpha / rank``.

    Only here, where all ranks are known: factors that wait for those of other modules would fill the memory.
    """
    keys = {path: factor_keys(path, module.is_embedding) for path, module in modules.items()}
    with safe_open(weights_file, framework="pt") as written, TensorSpool(weights_file.parent) as spool:
        for key in set(written.keys()).difference(*keys.values()):
            spool.add(key, written.get_tensor(key))
        for path, pair in keys.items():
            A, B = (written.get_tensor(key) for key in pair)
            factors = laid_out(path, LoraFactors(A, B, 1.0), modules[path].stored_rank, lora_alpha)
            for key, factor in zip(pair, (factors.A, factors.B), strict=True):
                spool.add(key, cast_factor(factor, dtype, path))
        # The file that is read stays mapped until the end of the block, whatever has its name.
        weights_file.unlink()
        spool.write(weights_file)


def card_of(opened: Sequence[AdapterFolder], request: MergeRequest, rank: int, num_modules: int) -> Card:
    """Return the card of a merge; adapters of this machine are called by the names of their folders."""
    base = named_base(opened).base_model
    rows = [(portable_name(name), f"{weight:g}") for name, weight in zip(request.names, request.weights, strict=True)]
    more = [("...", f"{len(rows) - MOST_NAMED} more")] if len(rows) > MOST_NAMED else []
    text = f"""The {request.method} of LoRA adapters, merged by `flexlora`: of the
sum of their changes, the best approximation of its rank. Rank {rank} in {num_modules} modules.

{table([*rows[:MOST_NAMED], *more], ("Adapter", "Weight"))}

## Use

{loading_text(base)}"""
    if base is not None and is_path(base):
        text += f"\n\nThe base model was in a local folder called `{base_title(base)}`; put the path of yours there."
    return Card(f"Merged LoRA adapter for {base_title(base)}", text, base, tags=("merge",))


def config_of(opened: Sequence[AdapterFolder], ranks: Mapping[str, int]) -> dict[str, object]:
    """Return the ``adapter_config.json``: ``lora_alpha`` is ``r``, so that the scaling is 1 where all ranks are one.

    Args:
        ranks: Module path -> the rank to write.
    """
    config = peft_config(ranks, common_rank(ranks), named_base(opened).base_model)
    config["fan_in_fan_out"] = any(adapter.settings["fan_in_fan_out"] for adapter in opened)
    config["target_modules"] = common_targets(opened, tuple(ranks)) or sorted(ranks)
    config["task_type"] = common_setting(opened, "task_type")
    config["auto_mapping"] = common_setting(opened, "auto_mapping")
    config["layer_replication"] = opened[0].settings["layer_replication"]
    config["revision"] = named_base(opened).settings["revision"]
    return config
