"""Orthonormalises tall matrices and decomposes small ones, in float64 and without losing small values."""

# torch.linalg carries no type information, and LinAlgError comes from torch's private part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportConstantRedefinition=false

from collections.abc import Generator
from contextlib import contextmanager

import torch
from scipy.linalg import eigh  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]

STEEP = 1e-6
"""Singular value over the largest below which its vectors are not taken from a Gram matrix."""

SERIAL_SIDE = 768
"""Side up to which LAPACK is given one thread: it cuts its work into steps too small to share among several."""


@contextmanager
def one_thread(is_small: bool = True) -> Generator[None]:
    """Let torch compute on one thread in a ``with`` block, if ``is_small``."""
    before = torch.get_num_threads()
    if not is_small or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def full_precision() -> Generator[None]:
    """Give products of float32 matrices full precision in a ``with`` block, whatever is set for training."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class DecompositionError(ArithmeticError):
    """No decomposition was found."""


def thin_svd(matrix: Tensor) -> Triple:
    """Return the thin SVD of a finite matrix, by a second way where LAPACK's iteration does not converge.

    With ``matrix = Q R`` the second way decomposes ``R^T``, scaled to norm 1: the same singular values, to the same
    digits, from other numbers to iterate on.

    Raises:
        DecompositionError: If neither converges.
    """
    try:
        with one_thread(max(matrix.shape) <= SERIAL_SIDE):
            return tuple(torch.linalg.svd(matrix, full_matrices=False))
    except torch.linalg.LinAlgError:
        norm = matrix.norm()
    Q, R = torch.linalg.qr(matrix / norm)
    try:
        U, S, Vh = torch.linalg.svd(R.T, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(
            f"a sum of products must have a singular value decomposition; the one of shape {tuple(matrix.shape)} and "
            f"norm {float(norm):.3g} did not converge in two attempts, look for a client whose update is out of scale "
            f"({error})"
        ) from error
    return Q @ Vh.T, S * norm, U.T


def ritz(Z: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the squared singular values of ``Z``, descending, its right singular vectors, and the left ones.

    The latter as two matrices whose product they are. ``inner`` is ``Z^T Z``, in whose eigenvalues small values have
    lost their digits, so where there are any, ``Z`` itself is decomposed.
    """
    theta, rotation = eigenvectors(inner)
    theta = theta.clamp_min(0)
    if float(theta[-1]) > STEEP * float(theta[0]):
        return theta, rotation, (Z, rotation / theta.sqrt())
    basis, upper = orthonormal(Z, inner)
    mixture, S, rotation = thin_svd(upper)
    return S.square(), rotation.T, (basis, mixture)


def orthonormal(Y: Tensor, inner: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``Q`` (float64) with orthonormal columns and an upper triangular ``R`` with ``Y = Q R``.

    By Cholesky of the float64 Gram matrix, twice where the columns are far from orthogonal, by Householder where they
    are nearly dependent.
    """
    Y = Y.to(torch.float64)
    inner = gram(Y) if inner is None else inner
    lengths = inner.diagonal().sqrt().clamp_min(1e-300)
    upper, info = torch.linalg.cholesky_ex(inner / (lengths[:, None] * lengths), upper=True)
    least = float(upper.diagonal().min()) if int(info) == 0 else 0.0
    if least > 1e-7:
        upper = upper * lengths
        Q = torch.linalg.solve_triangular(upper, Y, upper=True, left=False)
        if least > 1e-2:
            return Q, upper
        again, info = torch.linalg.cholesky_ex(gram(Q), upper=True)
        if int(info) == 0:
            return torch.linalg.solve_triangular(again, Q, upper=True, left=False), again @ upper
    Q, upper = torch.linalg.qr(Y)
    # A column that is nothing but rounding must not look like a captured direction: it bounds nothing.
    smallest = 1e-300 + 1e-16 * float(upper.diagonal().abs().max())
    diagonal = upper.diagonal()
    diagonal.copy_(torch.where(diagonal.abs() < smallest, torch.full_like(diagonal, smallest), diagonal))
    return Q, upper


def gram(X: Tensor) -> Tensor:
    """Return ``X.mT @ X``, the lower part mirrored from the upper one, which alone is computed."""
    size, step = X.shape[-1], 128
    result = torch.empty(*X.shape[:-2], size, size, dtype=X.dtype, device=X.device)
    for start in range(0, size, step):
        stop = min(size, start + step)
        result[..., start:stop, start:] = X[..., start:stop].mT @ X[..., start:]
        result[..., stop:, start:stop] = result[..., start:stop, stop:].mT
    return result


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower factors of Gram matrices that may be singular, with jitter at the level of their rounding.

    And, for each, whether there is one.
    """
    lengths = matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    scaled = matrix / (lengths[..., :, None] * lengths[..., None, :])
    scaled.diagonal(dim1=-2, dim2=-1).add_(1e-14)
    lower, info = torch.linalg.cholesky_ex(scaled)
    return lower * lengths[..., :, None], (info == 0) & (lengths > 0).all(-1)


def eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of symmetric matrices, descending, and their vectors."""
    with one_thread(matrix.shape[-1] <= SERIAL_SIDE):
        theta, V = torch.linalg.eigh(matrix)
    return theta.flip(-1), V.flip(-1)


def top_eigenvectors(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest eigenvalues, descending, and their vectors."""
    size = matrix.shape[0]
    if matrix.device.type == "cpu" and 4 * k < size and size > SERIAL_SIDE:
        values, vectors = eigh(matrix.numpy(), subset_by_index=[size - k, size - 1], driver="evr", check_finite=False)
        # Of many equal eigenvalues LAPACK's selection has been seen to find fewer than it was asked for.
        if len(values) == k:
            return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1).contiguous()
    theta, V = eigenvectors(matrix)
    return theta[:k], V[:, :k].contiguous()
