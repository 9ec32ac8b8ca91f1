"""Measures where an adapter changes its base model, and in how many directions."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from flexlora.adapters.folder import locate_adapter, open_adapter
from flexlora.adapters.peft_format import AdapterError
from flexlora.lora.product import ProductError, ProductSum, add_product, decompose
from flexlora.lora.spectrum import effective_rank
from flexlora.text import layer_order

LARGEST = 1e150
"""Singular value whose square is still a number."""


_BLOCK = re.compile(r"(?:^|\.)(?P<layer>\d+)\.(?P<kind>.+)$")


@dataclass(frozen=True)
class ModuleSpectrum:
    """The change of one module.

    Attributes:
        path: In the base model.
        shape: ``(out_features, in_features)``.
        rank: As stored.
        effective_rank: Of Roy and Vetterli: between 1 and ``rank``, 0 for no change.
        singular_values: Of the change, scaling included, descending; those at the level of rounding left out.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    effective_rank: float
    singular_values: tuple[float, ...]

    @property
    def layer(self) -> int | None:
        """Number of the block it is in, None outside all blocks."""
        match = _BLOCK.search(self.path)
        return int(match["layer"]) if match else None

    @property
    def kind(self) -> str:
        """What it does in its block."""
        return kind_of(self.path)

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the change."""
        return sum(value**2 for value in self.singular_values)

    def rank_for(self, share: float) -> int:
        """Return the least number of directions that hold ``share`` of the energy."""
        kept, target = 0.0, share * self.energy
        for count, value in enumerate(self.singular_values, start=1):
            kept += value**2
            if kept >= target:
                return count
        return len(self.singular_values)


@dataclass(frozen=True)
class Inspection:
    """What an adapter changes; modules layer by layer."""

    folder: str
    base_model: str | None
    modules: tuple[ModuleSpectrum, ...]

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the whole change."""
        return sum(module.energy for module in self.modules)

    @property
    def kinds(self) -> dict[str, list[ModuleSpectrum]]:
        """Kind of module -> the modules of that kind, layer by layer."""
        kinds: dict[str, list[ModuleSpectrum]] = {}
        for module in self.modules:
            kinds.setdefault(module.kind, []).append(module)
        return kinds

    @property
    def layers(self) -> dict[int, list[ModuleSpectrum]]:
        """Block -> the modules in it."""
        layers: dict[int, list[ModuleSpectrum]] = {}
        for module in self.modules:
            if module.layer is not None:
                layers.setdefault(module.layer, []).append(module)
        return dict(sorted(layers.items()))

    def share(self, modules: Sequence[ModuleSpectrum]) -> float:
        """Return the share in 0..1 of the whole energy that lies in ``modules``."""
        return sum(module.energy for module in modules) / self.energy if self.energy > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "folder": self.folder,
            "base_model": self.base_model,
            "norm": sqrt(self.energy),
            "share_by_kind": {kind: self.share(modules) for kind, modules in self.kinds.items()},
            "share_by_layer": {str(layer): self.share(modules) for layer, modules in self.layers.items()},
            "modules": [
                {
                    "path": module.path,
                    "shape": list(module.shape),
                    "rank": module.rank,
                    "effective_rank": module.effective_rank,
                    "rank_for_90_percent": module.rank_for(0.9),
                    "rank_for_99_percent": module.rank_for(0.99),
                    "norm": sqrt(module.energy),
                    "singular_values": list(module.singular_values),
                }
                for module in self.modules
            ],
        }


def kind_of(path: str) -> str:
    """Return the path within its block, with ``*`` for further numbers: ``self_attn.q_proj``, ``experts.*.up_proj``."""
    match = _BLOCK.search(path)
    parts = (match["kind"] if match else path).split(".")
    return ".".join("*" if part.isdigit() else part for part in parts)


def mean_spectrum(modules: Sequence[ModuleSpectrum]) -> list[float]:
    """Return singular values averaged over modules, each spectrum divided by its largest value.

    A spectrum that has ended counts as zero; modules without any change are left out.
    """
    spectra = [module.singular_values for module in modules if module.singular_values]
    length = max((len(values) for values in spectra), default=0)
    return [
        sum(values[place] / values[0] for values in spectra if place < len(values)) / len(spectra)
        for place in range(length)
    ]


def inspect_adapter(adapter: str | Path, notify: Callable[[int, int], None] | None = None) -> Inspection:
    """Return the spectrum of every module of a PEFT folder or hub id; one module is in memory at a time.

    Raises:
        AdapterError: If the adapter cannot be read or holds NaN or infinity.
    """
    modules = []
    with open_adapter(locate_adapter(str(adapter)), str(adapter)) as opened:
        for done, path in enumerate(opened.modules, start=1):
            total = ProductSum(*opened.modules[path].shape, keep_factors=True)
            try:
                spectrum = decompose(add_product(total, opened.factors(path), 1.0))
            except ProductError as error:
                raise AdapterError(f"{adapter}: {path}: {error}") from error
            values = tuple(float(value) for value in spectrum.S)
            if values and values[0] > LARGEST:
                raise AdapterError(
                    f"{adapter}: changes must be below {LARGEST:g}; {path} has a norm of {values[0]:.1g}"
                )
            stored = opened.modules[path]
            modules.append(ModuleSpectrum(path, stored.shape, stored.rank, effective_rank(spectrum), values))
            if notify is not None:
                notify(done, len(opened.modules))
        base_model = opened.base
    modules.sort(key=lambda module: layer_order(module.path))
    return Inspection(str(adapter), base_model, tuple(modules))
