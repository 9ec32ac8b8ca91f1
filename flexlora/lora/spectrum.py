"""Measures spectra: energy and the directions that hold it, effective rank, truncation error, principal angles."""

# torch.linalg and torch.special carry no type information.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lora.product import Spectrum


def truncation_error(spectrum: Spectrum, rank: int) -> float:
    """Return ``||G - T_rank(G)||`` (Frobenius) for the change ``G`` that ``spectrum`` came from.

    It is ``sqrt(sum_{j > rank} S_j^2 + tail^2)``, the least that any matrix of this rank can reach (Eckart and Young).
    """
    return spectrum.truncate(rank).tail


def energy_kept(spectrum: Spectrum, rank: int) -> float:
    """Return the share in 0..1 of the squared Frobenius norm that the first ``rank`` directions hold.

    What an earlier truncation discarded counts as not kept. The zero change keeps everything at every rank.
    """
    total = truncation_error(spectrum, 0) ** 2
    return float(spectrum.S[:rank].square().sum()) / total if total > 0 else 1.0


def directions_holding(spectrum: Spectrum, energy: float) -> int:
    """Return the least number of directions that hold a share of the squared singular values; 0 for the zero change.

    ``min {p: sum_{j <= p} S_j^2 >= energy sum_j S_j^2}`` (FLoRIST, arXiv:2506.09199). What an earlier truncation
    discarded is no longer part of the change and does not count. Directions below the rounding errors of that sum, 1e-8
    of the largest, are not told from nothing.

    Args:
        spectrum: ``S`` descending.
        energy: Above 0, at most 1.
    """
    held = spectrum.S.square().cumsum(0)
    if held.shape[0] == 0 or not held[-1] > 0:
        return 0
    return min(int((held < energy * held[-1]).sum()) + 1, held.shape[0])


def effective_rank(spectrum: Spectrum) -> float:
    """Return the effective rank of Roy and Vetterli (EUSIPCO 2007): ``exp(-sum_j p_j log p_j)``, ``p_j = S_j / sum S``.

    Between 1 and the number of directions, reached when all singular values are equal; 0 for the zero change. The
    discarded tail does not enter.
    """
    if spectrum.S.sum() <= 0:
        return 0.0
    p = spectrum.S / spectrum.S.sum()
    return float(torch.special.entr(p).sum().exp())


def principal_angles(
    rows: Float[Tensor, "k in_features"], other_rows: Float[Tensor, "m in_features"]
) -> Float[Tensor, " smaller"]:
    """Return the principal angles in radians between two row spaces, ascending, each in 0..pi/2.

    The rows must be linearly independent. Cosines cannot tell small angles apart and sines large ones; each angle is
    taken from the function that can (Bjoerck and Golub 1973).
    """
    if rows.shape[0] < other_rows.shape[0]:
        rows, other_rows = other_rows, rows
    basis = torch.linalg.qr(rows.to(torch.float64).T).Q
    other = torch.linalg.qr(other_rows.to(torch.float64).T).Q
    inner = basis.T @ other
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(other - basis @ inner).clamp(max=1).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def share_inside(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> float:
    """Return the share (0 to 1) of the squared singular values of all modules inside these ranks; 1 if all are 0."""
    total = sum(float(spectrum.S.square().sum()) + spectrum.tail**2 for spectrum in spectra.values())
    inside = sum(float(spectrum.S[: ranks.get(module, 0)].square().sum()) for module, spectrum in spectra.items())
    return inside / total if total else 1.0
