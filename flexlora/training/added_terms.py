"""Gradients of the terms that a method or a configuration adds to the local loss, written out.

Everything works on one module, or on the same module of several clients with one more axis in front.
"""

import math

import torch
from torch import Tensor


def num_left_alone(share: float, rank: int) -> int:
    """Return ``max(1, floor(share * rank))``, the directions that a tail penalty leaves alone; 0.29 of 100 is 29.

    One always stays, or a penalty of any share below 1 would press on all that a client of rank 1 has.
    """
    return min(rank, max(1, math.floor(share * rank + 1e-9)))


def tail_gradients(A: Tensor, B: Tensor, is_tail: Tensor, weight: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``weight * ||B[:, tail]||_F * ||A[tail]||_F`` (arXiv:2401.06432, sec. 3).

    Where one of the norms is zero, its own factor has the gradient zero, as autograd says.

    Args:
        A: [..., rank, in_features].
        B: [..., out_features, rank].
        is_tail: [..., rank], true for directions in the tail.
        weight: A number, or [..., 1, 1].
    """
    tail_A, tail_B = A * is_tail[..., :, None], B * is_tail[..., None, :]
    norm_A, norm_B = (torch.linalg.matrix_norm(tail, keepdim=True) for tail in (tail_A, tail_B))
    tiny = torch.finfo(A.dtype).tiny
    return weight * norm_B * (tail_A / norm_A.clamp(min=tiny)), weight * norm_A * (tail_B / norm_B.clamp(min=tiny))


def proximal_gradients(
    A: Tensor, B: Tensor, start_A: Tensor, start_B: Tensor, scaling: Tensor | float, weight: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``weight / 2 * ||s B A - s B0 A0||_F^2``: FedProx on the change itself.

    FedProx (arXiv:1812.06127, eq. 2) has the distance of the parameters; here it is that of the products, which does
    not depend on how a change is split into factors. With ``dA = A - A0`` and ``dB = B - B0`` the difference is
    ``dB A + B0 dA``, so products with ``rank`` rows or columns are all it takes:

        grad_B = weight s^2 (dB (A A^T) + B0 (dA A^T)),  grad_A = weight s^2 ((B^T dB) A + (B^T B0) dA)

    Args:
        A: [..., rank, in_features].
        B: [..., out_features, rank].
        start_A: ``A0``, where the client started.
        start_B: ``B0``.
        scaling: A number, or [..., 1, 1].
        weight: FedProx's mu.
    """
    factor, dA, dB = weight * scaling**2, A - start_A, B - start_B
    grad_A = factor * ((B.mT @ dB) @ A + (B.mT @ start_B) @ dA)
    grad_B = factor * (dB @ (A @ A.mT) + start_B @ (dA @ A.mT))
    return grad_A, grad_B


def proximal_core_gradient(A: Tensor, B: Tensor, core: Tensor, start: Tensor, scaling: float, weight: float) -> Tensor:
    """Return the gradient of ``weight / 2 * ||s B (core - start) A||_F^2`` by the core."""
    return weight * scaling**2 * (B.mT @ B) @ (core - start) @ (A @ A.mT)
