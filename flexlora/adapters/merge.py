"""How are adapters that people already have combined?

For every module the change is ``P = sum_i c_i s_i B_i A_i`` over the adapters that have it, found as one decomposition
of the sum and never by adding factors. The coefficients ``c_i`` are the method: ``mean`` divides the weights by their
sum, ``sum`` takes them as they are. Modules are done one after another: the factors of one are mapped from the files,
added up, decomposed and written before the next is looked at, so memory depends neither on the number of adapters nor
on the number of modules.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from math import isfinite
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from flexlora.adapters.folder import WEIGHTS_FILE, AdapterFolder, factor_keys, is_expert, is_number
from flexlora.adapters.tensor_file import TensorSpool
from flexlora.adapters.together import (
    MergeError,
    check_together,
    common_copy,
    common_targets,
    named_base,
    open_adapters,
)
from flexlora.adapters.write import AdapterDtype, peft_config, write_config
from flexlora.files import appearing_whole
from flexlora.lora.certificate import Accuracy, Certificate
from flexlora.lora.factors import LoraFactors
from flexlora.lora.product import ProductError, ProductSum, Spectrum, add_product, certified_decomposition
from flexlora.text import count_text, layer_order

Missing = Literal["zero", "renormalise"]


Coefficients = Callable[[Sequence[float], Sequence[bool], Missing], list[float]]


FIRST_DIRECTIONS = 64
"""Directions looked for first where a share of the energy decides; then four times as many, as long as need be."""


@dataclass(frozen=True)
class MergedModule:
    """What became of one module.

    Attributes:
        path: In the base model.
        shape: ``(out_features, in_features)`` of its change.
        ranks: Of the adapters that have it, in the order given.
        rank: Of the result.
        energy_kept: Share in 0..1 of the squared Frobenius norm of the sum that the result holds.
        certificate: How the sum was decomposed and how far the result can be from the best of its rank.
    """

    path: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    rank: int
    energy_kept: float
    certificate: Certificate

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the sum."""
        return self.certificate.norm**2


@dataclass(frozen=True)
class MergeResult:
    """What a merge did and where it lies; modules layer by layer."""

    folder: Path
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    base_model: str | None
    modules: tuple[MergedModule, ...]
    notes: tuple[str, ...]

    @property
    def energy_kept(self) -> float:
        """Share in 0..1 of the squared norm of the whole sum that the result holds."""
        total = sum(module.energy for module in self.modules)
        return sum(module.energy * module.energy_kept for module in self.modules) / total if total > 0 else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "folder": str(self.folder),
            "adapters": list(self.adapters),
            "method": self.method,
            "weights": list(self.weights),
            "base_model": self.base_model,
            "energy_kept": self.energy_kept,
            "notes": list(self.notes),
            "modules": [_module_json(module) for module in self.modules],
        }


@dataclass(frozen=True)
class _RankRule:
    """How many directions a module keeps: a number, a share of the energy, all, or as many as the largest adapter."""

    rank: int | None
    energy: float | None
    exact: bool

    def limit(self, ranks: Sequence[int]) -> int | None:
        """Return how many directions to ask for first; None is all there are."""
        if self.exact or self.energy == 1:
            return None
        if self.energy is not None:
            return FIRST_DIRECTIONS
        return self.rank if self.rank is not None else max(ranks)

    def is_short(self, spectrum: Spectrum, certificate: Certificate, limit: int | None) -> bool:
        """Return whether more directions have to be asked for."""
        if self.energy is None or limit is None or len(spectrum.S) < limit:
            return False
        return certificate.least_energy_kept < self.energy and limit < min(spectrum.shape)

    def chosen(self, spectrum: Spectrum, certificate: Certificate) -> int:
        """Return how many of the directions found to keep."""
        found = len(spectrum.S)
        if self.energy is None or found == 0:
            return max(1, found)
        shares = (spectrum.S / certificate.largest_norm).square().cumsum(0)
        return min(found, 1 + int((shares < self.energy).sum()))


def merge(
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    out: str | Path,
    method: str = "mean",
    rank: int | None = None,
    energy: float | None = None,
    exact: bool = False,
    missing: Missing = "zero",
    accuracy: Accuracy = "exact",
    device: str = "cpu",
    dtype: AdapterDtype = "float32",
    allow_different_bases: bool = False,
    notify: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Combine LoRA adapters of any ranks into one PEFT folder, as the best approximation of the sum of their changes.

    With neither ``rank`` nor ``energy`` nor ``exact``, a module gets the largest rank that an adapter has there. A
    module never gets more directions than the sum has. The folder appears whole or not at all.

    Args:
        adapters: PEFT folders, or ids on the Hugging Face hub where there is no such folder.
        weights: One per adapter; all 1 if None. Positive for ``mean``, which divides them by their sum; not 0 for
            ``sum``, which takes them as they are.
        out: Folder to write; must not exist.
        method: One of ``METHODS``.
        rank: Directions to keep in every module, at least 1.
        energy: Share in 0..1 of the squared norm of a module's sum to keep, by as few directions as that takes.
        exact: Keep every direction.
        missing: A module that an adapter lacks counts as unchanged by it (``zero``), or the mean there is over those
            that have it (``renormalise``).
        accuracy: How near the best approximation of its rank the result must be: ``exact`` 1e-6, ``fast`` 1e-3.
        device: Where to compute.
        dtype: Of the factors written.
        allow_different_bases: Take adapters that name different base models; the result names the first.
        notify: Called after each module with the number of modules done and that of all.

    Raises:
        MergeError: If the arguments contradict each other or the adapters do not fit together.
        AdapterError: If an adapter cannot be read or holds NaN or infinity.
    """
    if isinstance(adapters, str | Path):
        raise MergeError(f"adapters must be a list of folders or hub ids; got only {adapters}, put it in brackets")
    names, folder = tuple(str(adapter) for adapter in adapters), Path(out)
    weights = _numbers(weights) if weights is not None else (1.0,) * len(names)
    rule = _RankRule(rank, energy, exact)
    for option, value, allowed in (
        ("method", method, tuple(METHODS)),
        ("missing", missing, get_args(Missing)),
        ("accuracy", accuracy, get_args(Accuracy)),
        ("dtype", dtype, get_args(AdapterDtype)),
    ):
        if value not in allowed:
            raise MergeError(f"{option} must be one of {', '.join(allowed)}; got {value}")
    _check_request(names, weights, method, missing, rule)
    _check_device(device)
    parent = _existing_parent(folder)
    with ExitStack() as stack:
        opened = open_adapters(names, stack)
        notes = check_together(opened, allow_different_bases)
        paths = sorted({path for adapter in opened for path in adapter.modules})
        stack.enter_context(_naming(folder))
        spool = stack.enter_context(TensorSpool(parent))
        for key in sorted({key for adapter in opened for key in adapter.copies}):
            spool.add(key, common_copy(opened, key))
        modules = []
        for done, path in enumerate(paths, start=1):
            coefficients = METHODS[method](weights, [path in adapter.modules for adapter in opened], missing)
            total = _add_up(opened, coefficients, path)
            stored = [adapter.modules[path] for adapter in opened if path in adapter.modules]
            ranks = tuple(module.rank for module in stored)
            merged, factors = _decompose(total, path, ranks, rule, accuracy, device)
            keys = factor_keys(path, stored[0].is_embedding)
            for key, factor in zip(keys, (factors.A, factors.B), strict=True):
                spool.add(key, _rounded(factor, dtype, path))
            modules.append(merged)
            if notify is not None:
                notify(done, len(paths))
        equal = _with_equal_experts(modules)
        padded = {now.path: now.rank for was, now in zip(modules, equal, strict=True) if was.rank < now.rank}
        with appearing_whole(folder, replace=False) as partial:
            write_config(partial, _config_of(opened, equal))
            spool.write(partial / WEIGHTS_FILE)
            _pad(partial / WEIGHTS_FILE, padded)
        base_model = named_base(opened).base_model
    notes += _missing_notes(modules, len(names), missing) + _padding_notes(padded)
    modules = sorted(equal, key=lambda module: layer_order(module.path))
    return MergeResult(folder, names, weights, method, base_model, tuple(modules), tuple(notes))


def _mean(weights: Sequence[float], has: Sequence[bool], missing: Missing) -> list[float]:
    """Return ``w_i / sum w``; the sum is over all adapters, or over those that have the module."""
    counted = [weight for weight, here in zip(weights, has, strict=True) if here or missing == "zero"]
    # Over the largest first, because a sum of huge weights is infinite.
    largest = max(counted)
    total = sum(weight / largest for weight in counted)
    return [weight / largest / total for weight in weights]


def _sum(weights: Sequence[float], has: Sequence[bool], missing: Missing) -> list[float]:
    return list(weights)


METHODS: Mapping[str, Coefficients] = {"mean": _mean, "sum": _sum}
"""Method -> the coefficients of the adapters in a module, from their weights and from who has the module."""


def _numbers(weights: Sequence[float]) -> tuple[float, ...]:
    try:
        if isinstance(weights, str) or any(isinstance(weight, str | bool) for weight in weights):
            raise TypeError
        return tuple(float(weight) for weight in weights)
    except (TypeError, ValueError, OverflowError):
        raise MergeError(f"weights must be numbers, one per adapter, as [3, 1]; got {weights!r:.60}") from None


def _check_request(
    names: Sequence[str], weights: Sequence[float], method: str, missing: Missing, rule: _RankRule
) -> None:
    if not names:
        raise MergeError("merging needs at least one adapter; got none")
    if missing == "renormalise" and method == "sum":
        raise MergeError("missing=renormalise divides by the weights of those that have a module; use method=mean")
    if len(weights) != len(names):
        raise MergeError(f"weights must be one per adapter, {len(names)} here; got {len(weights)}")
    if not all(isfinite(weight) and (weight > 0 if method == "mean" else weight != 0) for weight in weights):
        rule_text = "positive for method=mean (use sum for signed ones)" if method == "mean" else "other than 0"
        raise MergeError(f"weights must be finite and {rule_text}; got {', '.join(f'{w:g}' for w in weights)}")
    if (rule.rank is not None) + (rule.energy is not None) + rule.exact > 1:
        raise MergeError("only one of rank, energy and exact can decide how many directions to keep; got several")
    is_whole = isinstance(rule.rank, Integral) and not isinstance(rule.rank, bool)
    if rule.rank is not None and not (is_whole and rule.rank >= 1):
        raise MergeError(f"rank must be a whole number of at least 1; got {rule.rank!r}")
    if rule.energy is not None and not (is_number(rule.energy) and 0 < rule.energy <= 1):
        raise MergeError(f"energy must be a share above 0 and up to 1; got {rule.energy!r}")


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise MergeError(f"device must be cpu, cuda or cuda:N; got {device}") from error
    if kind not in ("cpu", "cuda"):
        raise MergeError(f"device must be cpu, cuda or cuda:N; got {device}")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise MergeError(f"device {device} is not there; use cpu")


def _existing_parent(folder: Path) -> Path:
    """Return the folder that ``folder`` will appear in, as far as there is one now."""
    if os.path.lexists(folder):
        raise MergeError(f"out must not exist yet; {folder} does")
    parent = next(parent for parent in folder.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise MergeError(f"out must lie in a folder; got {folder}, and {parent} is none")
    return parent


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Let errors of the file system in a ``with`` block say what they mean for ``folder``."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{folder} cannot be written, and nothing of it was: {error.strerror or error}") from error


def _add_up(opened: Sequence[AdapterFolder], coefficients: Sequence[float], path: str) -> ProductSum:
    """Return the sum of the changes of one module, whose factors stay where they are in the files."""
    total: ProductSum | None = None
    for adapter, coefficient in zip(opened, coefficients, strict=True):
        if path in adapter.modules:
            factors = adapter.factors(path)
            total = total or ProductSum(*factors.shape, keep_factors=True)
            total = add_product(total, factors, coefficient)
    assert total is not None
    return total


def _decompose(
    total: ProductSum, path: str, ranks: tuple[int, ...], rule: _RankRule, accuracy: Accuracy, device: str
) -> tuple[MergedModule, LoraFactors]:
    limit = rule.limit(ranks)
    try:
        spectrum, certificate = certified_decomposition(total, limit, accuracy=accuracy, device=device)
        while limit is not None and rule.is_short(spectrum, certificate, limit):
            limit *= 4
            spectrum, certificate = certified_decomposition(
                total, limit, accuracy=accuracy, start=spectrum.Vh, device=device
            )
    except ProductError as error:
        raise MergeError(f"{path}: {error}") from error
    rank = rule.chosen(spectrum, certificate)
    if rank < len(spectrum.S):
        spectrum = spectrum.truncate(rank)
        certificate = replace(certificate, tail=spectrum.tail)
    # Scaling 1 and the singular values shared evenly: both factors are of one size, which low precision asks for.
    factors = spectrum.factors(rank, 1.0, "balanced")
    shape = (total.out_features, total.in_features)
    # Where changes cancel there is nothing but rounding errors to keep.
    energy_kept = certificate.energy_kept if len(spectrum.S) else 1.0
    return MergedModule(path, shape, ranks, rank, energy_kept, certificate), factors


def _rounded(factor: Tensor, dtype: AdapterDtype, path: str) -> Tensor:
    largest, limits = float(factor.abs().max()), torch.finfo(getattr(torch, dtype))
    if largest != 0 and not limits.tiny <= largest <= limits.max:
        raise MergeError(
            f"factors must be within {limits.tiny:.1g} and {limits.max:.1g} for {dtype}; the largest number of {path} "
            f"is {largest:.1g}: use {'float32 or bfloat16' if dtype == 'float16' else 'weights nearer to 1'}"
        )
    return factor.to("cpu", getattr(torch, dtype))


def _with_equal_experts(modules: Sequence[MergedModule]) -> list[MergedModule]:
    """Return the modules with the largest rank of all experts in every expert.

    Stock PEFT stacks the factors of experts that transformers fuses, and knows one rank for all layers of them.
    """
    largest = max((module.rank for module in modules if is_expert(module.path)), default=0)
    return [replace(module, rank=largest) if is_expert(module.path) else module for module in modules]


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


def _config_of(opened: Sequence[AdapterFolder], modules: Sequence[MergedModule]) -> dict[str, object]:
    """Return the ``adapter_config.json``: ``lora_alpha`` is the rank everywhere, so that every scaling is 1."""
    ranks = {module.path: module.rank for module in modules}
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


def _missing_notes(modules: Sequence[MergedModule], num_adapters: int, missing: Missing) -> list[str]:
    lacking = sum(len(module.ranks) < num_adapters for module in modules)
    if not lacking:
        return []
    counted = "count as unchanged there" if missing == "zero" else "are left out of the mean there"
    return [f"{lacking} of {len(modules)} modules are missing in some adapters, which {counted}"]


def _padding_notes(padded: Mapping[str, int]) -> list[str]:
    if not padded:
        return []
    experts, rank = count_text(len(padded), "module"), max(padded.values())
    return [f"{experts} of experts got zeros up to rank {rank}: where transformers fuses experts, they need one rank"]


def _module_json(module: MergedModule) -> dict[str, Any]:
    return {
        "path": module.path,
        "shape": list(module.shape),
        "num_adapters": len(module.ranks),
        "smallest_rank": min(module.ranks),
        "largest_rank": max(module.ranks),
        "total_rank": sum(module.ranks),
        "rank": module.rank,
        "energy_kept": module.energy_kept,
        "certificate": {
            **asdict(module.certificate),
            "error": module.certificate.error,
            "optimal": module.certificate.optimal,
            "least_energy_kept": module.certificate.least_energy_kept,
        },
    }
