"""Finds the linear modules that can be adapted, and says which others get nothing and why.

A module is left out if no text reaches it (a vision tower, attention to images, weights that a layer uses without
calling their module), if it is no more than the base of a router, or if PEFT cannot take it by its name, so that no
other program could read the adapter.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flexlora.text import count_text, percent_text
from flexlora.training.linear_modules import ModelError, features
from flexlora.training.probes import modules_reached

Selection = Literal["all-linear"] | Sequence[str]

UNREACHED = "no text reaches them"
ROUTING = "they return more than a product, as routers do"
REFUSED = "PEFT refuses them, as fast kernels use their weights without calling them"
RENAMED = "PEFT takes their names for those of fused experts"

# What peft.tuners.tuners_utils refuses; a test compares.
_REFUSING_MODELS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_REFUSED_NAMES = {"out_proj", "conv1d"}
# Of parameters without an adapter, a share that is worth a word.
_WORTH_SAYING = 0.01


@dataclass(frozen=True)
class Targets:
    """The modules to adapt, and what is left.

    Attributes:
        shapes: Path -> ``(out_features, in_features)`` of the modules to adapt, sorted by path.
        left_out: Path -> why, of linear modules that were asked for and cannot be adapted.
        notes: Sentences about what gets no adapter.
    """

    shapes: Mapping[str, tuple[int, int]]
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_targets(model: PreTrainedModel, selection: Selection) -> Targets:
    """Return the modules to adapt.

    Args:
        model: The base model, not yet adapted, with or without weights.
        selection: ``all-linear`` for every linear module except the output layer, or the last parts of paths, such as
            ``("q_proj", "self_attn.v_proj")``.

    Raises:
        ModelError: If a name matches no linear module, or none that can be adapted.
    """
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    chosen: dict[str, str | None] = {}
    if selection == "all-linear":
        chosen = {path: None for path, module in linear.items() if module is not head}
    for suffix in selection if selection != "all-linear" else ():
        found = [path for path in linear if path == suffix or path.endswith(f".{suffix}")]
        if not found:
            names = sorted({path.rpartition(".")[2] for path in linear})
            raise ModelError(f"target_modules must name linear modules; got {suffix!r}, there are {', '.join(names)}")
        chosen |= dict.fromkeys(found, suffix)
    reasons = _reasons(model, linear, chosen)
    shapes = {path: features(linear[path]) for path in sorted(chosen.keys() - reasons.keys())}
    for suffix in selection if selection != "all-linear" else ():
        if not any(path == suffix or path.endswith(f".{suffix}") for path in shapes):
            own = [path for path in sorted(reasons) if path == suffix or path.endswith(f".{suffix}")]
            raise ModelError(
                f"target_modules must name modules that can be adapted; {suffix!r} names {len(own)}, such as {own[0]}: "
                f"{reasons[own[0]]}; leave it out"
            )
    if not shapes:
        raise ModelError(f"the base model {type(model).__name__} has no linear module that can be adapted")
    return Targets(shapes, reasons, (*_reasons_noted(reasons), *_experts_noted(model)))


def _reasons(model: PreTrainedModel, linear: Mapping[str, nn.Module], chosen: Iterable[str]) -> dict[str, str]:
    """Return path -> why it cannot be adapted."""
    reached = modules_reached(model, linear)
    refuses = getattr(model.config, "model_type", None) in _REFUSING_MODELS
    renamed: dict[str, bool] = {}
    reasons = {}
    for path in sorted(chosen):
        leaf = path.rpartition(".")[2]
        if leaf not in renamed:
            renamed[leaf] = _is_renamed(model, path)
        if path not in reached:
            reasons[path] = UNREACHED
        elif not reached[path]:
            reasons[path] = ROUTING
        elif refuses and leaf in _REFUSED_NAMES:
            reasons[path] = REFUSED
        elif renamed[leaf]:
            reasons[path] = RENAMED
    return reasons


def _is_renamed(model: PreTrainedModel, path: str) -> bool:
    """Return whether PEFT would adapt something else than the module that it is told.

    In families whose experts transformers has fused, PEFT reads names as those that the experts had before. Dense
    layers beside the experts often have the same ones.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return False  # A version of PEFT before that.
    config = LoraConfig(target_modules=[path])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:
        return True
    return path not in (config.target_modules or ())


def _reasons_noted(reasons: Mapping[str, str]) -> list[str]:
    notes = []
    for why in dict.fromkeys(reasons.values()):
        names = Counter(_place(path) for path, own in reasons.items() if own == why)
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(names.items()))
        notes.append(f"No adapter for {count_text(names.total(), 'linear module')}: {why}. Left out: {listed}.")
    return notes


def _place(path: str) -> str:
    """Return a path with a star for every number in it, the same for all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def _experts_noted(model: PreTrainedModel) -> list[str]:
    """Return a sentence about weights of experts, which are stacked and no linear modules."""
    total = sum(parameter.numel() for parameter in model.parameters())
    stacked: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "expert" in name.lower():
            stacked[_place(name)] += parameter.numel()
    if stacked.total() < _WORTH_SAYING * total:
        return []
    return [
        f"No adapter for the experts: their weights are stacked and no linear modules. They are "
        f"{', '.join(sorted(stacked))}, {percent_text(stacked.total() / total)} of the parameters."
    ]
