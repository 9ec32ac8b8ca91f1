"""Writes the folder of a merged adapter: casts factors, gives all experts one rank and finds the settings that fit."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from flexlora.adapters.folder import AdapterFolder
from flexlora.adapters.peft_format import WEIGHTS_FILE, factor_keys, is_expert
from flexlora.adapters.tensor_file import TensorSpool
from flexlora.adapters.together import MergeError, common_targets, named_base
from flexlora.adapters.write import AdapterDtype, peft_config, write_config
from flexlora.files import appearing_whole


def cast_factor(factor: Tensor, dtype: AdapterDtype, path: str) -> Tensor:
    """Return a factor on the CPU in the type to write, which must be able to hold its largest number."""
    largest, limits = float(factor.abs().max()), torch.finfo(getattr(torch, dtype))
    if largest != 0 and not limits.tiny <= largest <= limits.max:
        raise MergeError(
            f"factors must be within {limits.tiny:.1g} and {limits.max:.1g} for {dtype}; the largest number of {path} "
            f"is {largest:.1g}: use {'float32 or bfloat16' if dtype == 'float16' else 'weights nearer to 1'}"
        )
    return factor.to("cpu", getattr(torch, dtype))


def equal_expert_ranks(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks with the largest rank of all experts for every expert.

    Stock PEFT stacks the factors of experts that transformers fuses, and knows one rank for all layers of them.
    """
    largest = max((rank for path, rank in ranks.items() if is_expert(path)), default=0)
    return {path: largest if is_expert(path) else rank for path, rank in ranks.items()}


def write_merged(
    folder: Path, spool: TensorSpool, config: Mapping[str, object], padded_ranks: Mapping[str, int]
) -> None:
    """Write the folder, whole or not at all, with the tensors of ``spool``; modules of ``padded_ranks`` get these."""
    with appearing_whole(folder, replace=False) as partial:
        write_config(partial, config)
        spool.write(partial / WEIGHTS_FILE)
        _pad(partial / WEIGHTS_FILE, padded_ranks)


def _pad(weights_file: Path, ranks: Mapping[str, int]) -> None:
    """Give modules of a written file these ranks, with rows of zeros in ``A`` and columns of zeros in ``B``.

    Only here, where all ranks are known: factors that wait for those of other modules would fill the memory.
    """
    if not ranks:
        return
    missing = {key: (place, rank) for path, rank in ranks.items() for place, key in enumerate(factor_keys(path))}
    with safe_open(weights_file, framework="pt") as written, TensorSpool(weights_file.parent) as padded:
        for key in written.keys():
            tensor = written.get_tensor(key)
            if key in missing:
                axis, rank = missing[key]
                more = rank - tensor.shape[axis]
                tensor = pad(tensor, (0, more) if axis == 1 else (0, 0, 0, more))
            padded.add(key, tensor)
        # The file that is read stays mapped until the end of the block, whatever has its name.
        weights_file.unlink()
        padded.write(weights_file)


def config_of(opened: Sequence[AdapterFolder], ranks: Mapping[str, int]) -> dict[str, object]:
    """Return the ``adapter_config.json``: ``lora_alpha`` is the rank everywhere, so that every scaling is 1."""
    config = peft_config(ranks, ranks, named_base(opened).base_model)
    config["fan_in_fan_out"] = any(adapter.settings["fan_in_fan_out"] for adapter in opened)
    config["target_modules"] = common_targets(opened, tuple(ranks)) or sorted(ranks)
    task_types = {adapter.settings["task_type"] for adapter in opened}
    config["task_type"] = task_types.pop() if len(task_types) == 1 else None
    mappings = [adapter.settings["auto_mapping"] for adapter in opened]
    config["auto_mapping"] = mappings[0] if mappings == mappings[:1] * len(mappings) else None
    config["layer_replication"] = opened[0].settings["layer_replication"]
    config["revision"] = named_base(opened).settings["revision"]
    return config
