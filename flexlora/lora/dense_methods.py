"""Decomposes sums of products with dense matrices: QR or Gram matrices of both stacks, or the sum multiplied out.

The table in ``decomposition`` says when each is taken. Each answers with a certificate, or None where its precision is
not enough for the accuracy that is asked for.
"""

# torch.linalg carries no type information.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportConstantRedefinition=false

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from flexlora.lora.certificate import ROUNDING, Accuracy, Certificate, lost_to_rounding, spread_of, together, verdict_on
from flexlora.lora.linalg import STEEP, Triple, cholesky, eigenvectors, gram, thin_svd, top_eigenvectors
from flexlora.lora.operator import Operator


def by_qr(operators: Sequence[Operator], reason: str) -> list[tuple[Triple, Certificate]]:
    """Decompose sums of one shape and total rank through QR of both stacks: exact to float64, however small a value."""
    left, right = _stacks(operators)
    Q1, R1 = torch.linalg.qr(left)
    Q2, R2 = torch.linalg.qr(right.mT)
    found: list[tuple[Triple, Certificate]] = []
    for operator, before, core, after in zip(operators, Q1, R1 @ R2.mT, Q2, strict=True):
        U, S, Vh = thin_svd(core)
        certificate = Certificate("qr", reason, float(S.norm()), 0.0, 0.0, _double_rounding(operator))
        found.append(((before @ U, S, Vh @ after.T), certificate))
    return found


def by_gram(
    operators: Sequence[Operator], k: int, accuracy: Accuracy, reason: str
) -> list[tuple[Triple, Certificate] | None]:
    """Decompose sums of one shape and total rank through float64 Gram matrices of both stacks.

    None where their precision does not do. With ``L^T L = C1 C1^T`` and ``R R^T = C2 C2^T`` the singular values of ``L
    R`` are those of ``C1^T C2``. Its right singular vectors ``W`` give ``U S = L C2 W`` and ``Vh = W^T C2^-1 R``;
    nothing is divided by a singular value but the columns of ``U S``.
    """
    left, right = _stacks(operators)
    lengths = right.norm(dim=-1).clamp_min(1e-300)
    right /= lengths[..., None]
    left *= lengths[..., None, :]
    G1, G2 = gram(left), gram(right.mT)
    (C1, is_first), (C2, is_second) = cholesky(G1), cholesky(G2)
    is_possible = is_first & is_second
    if not bool(is_possible.any()):
        return [None] * len(operators)
    core = torch.where(is_possible[:, None, None], C1.mT @ C2, 0.0)
    theta, W = eigenvectors(gram(core))
    theta, W = theta.clamp_min(0), W[..., :k]
    S = theta[:, :k].sqrt()
    U = left @ (C2 @ W) / S[:, None, :]
    V = torch.linalg.solve_triangular(C2.mT, W, upper=True).mT @ right
    one = torch.eye(k).to(U)
    off = torch.maximum((gram(U) - one).abs().amax((-2, -1)), (gram(V.mT) - one).abs().amax((-2, -1)))
    # What the Gram matrices and the eigenvalue solver may have got wrong in the k leading eigenvalues together.
    spread = torch.linalg.matrix_norm(G1) * torch.linalg.matrix_norm(G2) + theta[:, 0] * sqrt(operators[0].columns)
    missed = (64 * torch.finfo(torch.float64).eps * sqrt(k) * spread).tolist()
    found: list[tuple[Triple, Certificate] | None] = []
    for index in range(len(operators)):
        total, tail2 = float(theta[index].sum()), float(theta[index, k:].sum())
        is_steep = not float(S[index, -1]) > 10 * STEEP * float(S[index, 0])
        verdict = None if is_steep else verdict_on(missed[index], tail2, total, accuracy)
        if verdict is None or not bool(is_possible[index]) or not float(off[index]) <= 1e-9:
            found.append(None)
            continue
        excess, rounding = verdict
        spread = spread_of(tail2, missed[index])
        certificate = Certificate("gram", reason, sqrt(total), sqrt(tail2), excess, rounding, spread=spread)
        found.append(((U[index], S[index], V[index]), certificate))
    return found


def _stacks(operators: Sequence[Operator]) -> tuple[Tensor, Tensor]:
    """Return both stacks of every sum, shapes (sums, out_features, columns) and (sums, columns, in_features)."""
    if len(operators) == 1:
        left, right = operators[0].stacked()
        return left[None], right[None]
    pairs = [operator.stacked() for operator in operators]
    return torch.stack([left for left, _ in pairs]), torch.stack([right for _, right in pairs])


def by_dense_gram(
    operator: Operator, k: int, accuracy: Accuracy, reason: str, formed: Operator | None
) -> tuple[Triple, Certificate] | None:
    """Decompose through the float64 Gram matrix of the shorter side; None where its precision does not do.

    For ``fast`` the sum is multiplied out in float32 first, in float64 where that turns out to be too coarse.
    """
    m, n = operator.out_features, operator.in_features
    eps, scale2 = torch.finfo(torch.float64).eps, operator.scale**2
    for dtype in (torch.float32, torch.float64) if operator.terms and accuracy == "fast" else (torch.float64,):
        if formed is None or dtype == torch.float64:
            formed = operator.formed(dtype)
        assert formed.dense is not None
        rounding2 = (ROUNDING * torch.finfo(dtype).eps) ** 2 * scale2
        W = formed.dense.to(torch.float64)
        W = W.T if m < n else W
        theta, V = top_eigenvectors(gram(W), k + 1)
        total = float(torch.linalg.vector_norm(W)) ** 2
        theta = theta.clamp_min(0)
        missed = together(16 * eps * (sqrt(k) + sqrt(min(m, n))) * total, lost_to_rounding(theta, k, rounding2))
        theta, V = theta[:k], V[:, :k]
        tail2 = max(0.0, total - float(theta.sum()))
        verdict = verdict_on(missed, tail2, total, accuracy)
        if verdict is not None and float(theta[-1]) > (10 * STEEP) ** 2 * float(theta[0]):
            S = theta.sqrt()
            other = W @ (V / S)
            off = float((other.T @ other - torch.eye(k).to(other)).abs().max())
            if off <= 1e-9:
                U, Vh = (V, other.T) if m < n else (other, V.T)
                excess, rounding = verdict
                spread = spread_of(tail2, missed) + sqrt(rounding2)
                certificate = Certificate(
                    "dense_gram", reason, sqrt(total), sqrt(tail2), excess, rounding, spread=spread
                )
                return (U, S, Vh), certificate
    return None


def by_dense_svd(operator: Operator, reason: str) -> tuple[Triple, Certificate]:
    """Decompose the sum, multiplied out in float64; QR of the longer side first, or LAPACK works on copies of it."""
    dense = operator.formed(torch.float64).dense
    assert dense is not None
    operator.forget_copies()
    m, n = dense.shape
    if m == n:
        U, S, Vh = thin_svd(dense)
    else:
        Q, R = torch.linalg.qr(dense if m > n else dense.T)
        del dense
        U, S, Vh = thin_svd(R)
        U, Vh = (Q @ U, Vh) if m > n else (Vh.T, (Q @ U).T)
    return (U, S, Vh), Certificate("dense_svd", reason, float(S.norm()), 0.0, 0.0, _double_rounding(operator))


def _double_rounding(operator: Operator) -> float:
    longer = max(operator.out_features, operator.in_features)
    return 4 * torch.finfo(torch.float64).eps * sqrt(longer) * operator.magnitude
