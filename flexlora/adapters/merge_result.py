"""Says what became of a merge: each module's ranks, the energy kept and how far from the best the result can be."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexlora.lora.certificate import Certificate


@dataclass(frozen=True)
class MergedModule:
    """What became of one module.

    Attributes:
        path: In the base model.
        shape: ``(out_features, in_features)`` of its change.
        ranks: Of the adapters that have it, in the order given.
        rank: Directions of the result.
        energy_kept: Share in 0..1 of the squared Frobenius norm of the sum that the result holds.
        certificate: How the sum was decomposed and how far the result can be from the best of its rank.
        stored_rank: Of the factors written; directions beyond ``rank`` change nothing and can be trained.
    """

    path: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    rank: int
    energy_kept: float
    certificate: Certificate
    stored_rank: int

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


def _module_json(module: MergedModule) -> dict[str, Any]:
    return {
        "path": module.path,
        "shape": list(module.shape),
        "num_adapters": len(module.ranks),
        "smallest_rank": min(module.ranks),
        "largest_rank": max(module.ranks),
        "total_rank": sum(module.ranks),
        "rank": module.rank,
        "stored_rank": module.stored_rank,
        "energy_kept": module.energy_kept,
        "certificate": {
            **asdict(module.certificate),
            "error": module.certificate.error,
            "optimal": module.certificate.optimal,
            "least_energy_kept": module.certificate.least_energy_kept,
        },
    }
