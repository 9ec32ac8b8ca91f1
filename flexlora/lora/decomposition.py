"""What are the leading singular values of a sum of products, at the least cost, and how good is the answer?

For ``P = sum_i c_i B_i A_i`` of shape ``m x n``, with ``R`` columns in all the ``B_i`` and ``k`` directions asked for:

========== ===================================================================== =================================
method     how                                                                   taken when
========== ===================================================================== =================================
qr         QR of both stacks, SVD of the ``R x R`` core, float64                 ``R`` is small, or all is wanted
gram       float64 Gram matrices of both stacks, Cholesky, ``R x R`` eigenvalues ``R`` below ``min(m, n)``
subspace   filtered block iteration on ``P``, never formed, or formed once       ``R`` large, ``k`` small
dense_gram float64 Gram matrix of the shorter side, top eigenvectors             no gap after ``k``, or small sides
dense_svd  full SVD in float64                                                   anything else
========== ===================================================================== =================================

Every answer carries a ``Certificate``. With ``E_k`` the error of the best approximation of rank ``k`` (Eckart and
Young) it says ``||P - U S Vh|| <= (1 + excess) E_k + rounding``. A method that cannot keep ``excess`` within the
tolerance hands over to the next one down the table.
"""

# torch.linalg carries no type information.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportConstantRedefinition=false

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from math import frexp, hypot, ldexp, sqrt
from typing import TypeVar

import torch
from torch import Tensor

from flexlora.lora.certificate import ROUNDING, Accuracy, Certificate, lost_to_rounding, spread_of, together, verdict_on
from flexlora.lora.linalg import (
    SERIAL_SIDE,
    STEEP,
    Triple,
    cholesky,
    eigenvectors,
    full_precision,
    gram,
    one_thread,
    thin_svd,
    top_eigenvectors,
)
from flexlora.lora.operator import STACK_BYTES, Operator, Term
from flexlora.lora.subspace import MOST_PRODUCTS, block_size, by_subspace

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")

QR_COLUMNS = 96
GRAM_SHARE = 0.75
GRAM_COLUMNS = 4
"""Columns per direction asked for above which iterating costs less than Gram matrices of all of them."""
SMALL_SIDE = 768
SERIAL_WORK = 10**8
"""Operations on both stacks up to which one thread does it all."""
BATCH_BYTES = 2**30
"""Size of the float64 stacks of sums that are computed together."""
MEMORY_SHARE = 0.25
"""Of the machine's memory, that modules decomposed at the same time may take."""
MODERATE = 1e10
"""Largest size, and inverse of the smallest, of what float32 is trusted with."""


def truncated_svds(
    operators: Sequence[Operator],
    ks: Sequence[int | None],
    accuracy: Accuracy = "exact",
    starts: Sequence[Tensor | None] | None = None,
) -> Iterator[tuple[int, Triple, Certificate]]:
    """Yield the position of each sum, ``U``, ``S``, ``Vh`` (float64) of its leading directions, and its certificate.

    Sums of one shape, total rank and ``k`` for which QR or Gram matrices do are computed as one batch where a launch or
    a call costs more than the work: on an accelerator, and for small ones everywhere. Of larger ones on the CPU as many
    are decomposed at a time, on one thread each, as there are threads, if there are so many sums and memory for it.

    Args:
        operators: The sums; all their numbers finite.
        ks: Directions asked for; None is all of them.
        accuracy: Which ``TOLERANCE`` to meet.
        starts: Shape (in_features, any) each, directions to begin from, such as the right singular vectors of the last
            round. They cannot make the answer worse, only quicker.

    Raises:
        DecompositionError: If LAPACK finds no decomposition.
    """
    starts = [None] * len(operators) if starts is None else starts

    def decompose(members: list[int]) -> list[tuple[int, Triple, Certificate]]:
        tamed = [_tamed(operators[index]) for index in members]
        chosen, k = [operator for operator, _ in tamed], ks[members[0]]
        with one_thread(_is_little(chosen[0])):
            if len(members) > 1:
                batch = _by_stacks(chosen, _wanted(chosen[0], k), accuracy)
            else:
                batch = [_by_cheapest(chosen[0], k, accuracy, starts[members[0]])]
        for operator in chosen:
            operator.forget_copies()
        return [
            (index, *_trimmed(answer, certificate, k, unit))
            for index, (answer, certificate), (_, unit) in zip(members, batch, tamed, strict=True)
        ]

    batches = _batches(operators, ks)
    at_once = _num_at_once([operators[members[0]] for members in batches])
    with full_precision(), one_thread(at_once > 1):
        for found in _in_order(decompose, batches, at_once):
            yield from found


def _trimmed(triple: Triple, certificate: Certificate, k: int | None, unit: float) -> tuple[Triple, Certificate]:
    """Return ``unit`` times the first ``k`` directions, with no memory for the others, and what is left out then."""
    U, S, Vh = triple
    if k is not None and k < S.shape[0]:
        certificate = replace(certificate, tail=hypot(certificate.tail, float(S[k:].norm())))
        U, S, Vh = U[:, :k].clone(memory_format=torch.contiguous_format), S[:k], Vh[:k].clone()
    return (U, S * unit, Vh), certificate.scaled(unit)


def _in_order(decompose: Callable[[_Item], _Found], items: Sequence[_Item], at_once: int) -> Iterator[_Found]:
    """Yield what comes of each item, so many at a time."""
    if at_once == 1:
        yield from map(decompose, items)
        return
    waiting: deque[Future[_Found]] = deque()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for item in items:
                # Another round waits, so that nobody idles behind a slow one.
                if len(waiting) == 2 * at_once:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(decompose, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _num_at_once(operators: Sequence[Operator]) -> int:
    """Return how many to decompose at a time: one, on all threads, or as many as there are threads, on one each.

    The latter wherever there is memory and no thread goes without: threads share small LAPACK problems badly.
    """
    num_threads = torch.get_num_threads()
    large = [operator for operator in operators if operator.device.type == "cpu" and not _is_little(operator)]
    if num_threads == 1 or len(large) < num_threads:
        return 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return num_threads if num_threads * max(map(_most_bytes, large)) <= MEMORY_SHARE * memory else 1


def _most_bytes(operator: Operator) -> int:
    """Return about how much memory the costliest method takes: copies in both precisions, then a full SVD."""
    m, n = operator.out_features, operator.in_features
    return sum(min(STACK_BYTES, size * operator.columns * (m + n)) for size in (4, 8)) + 8 * 8 * m * n


def _batches(operators: Sequence[Operator], ks: Sequence[int | None]) -> list[list[int]]:
    """Return the positions of the sums, those that are computed together side by side."""
    batches: list[list[int]] = []
    open_batches: dict[tuple[object, ...], list[int]] = {}
    for index, (operator, k) in enumerate(zip(operators, ks, strict=True)):
        wanted = _wanted(operator, k)
        is_launched = operator.device.type != "cpu" or _is_little(operator)
        if not (is_launched and wanted and _stacks_do(operator, wanted)):
            batches.append([index])
            continue
        m, n, columns = operator.out_features, operator.in_features, operator.columns
        key = (m, n, columns, wanted, operator.device)
        batch = open_batches.get(key)
        if batch is None or (len(batch) + 1) * 8 * (m + n) * columns > BATCH_BYTES:
            batch = open_batches[key] = []
            batches.append(batch)
        batch.append(index)
    return batches


def _wanted(operator: Operator, k: int | None) -> int:
    side = min(operator.out_features, operator.in_features)
    top = operator.columns if operator.dense is None else side
    return min(side, top) if k is None else min(k, side, top)


def _stacks_do(operator: Operator, wanted: int) -> bool:
    """Return whether both stacks are small enough to work with themselves."""
    side, columns = min(operator.out_features, operator.in_features), operator.columns
    if operator.dense is not None:
        return False
    if columns <= QR_COLUMNS:
        return True
    return columns <= GRAM_SHARE * side and (
        wanted >= min(columns, side) or columns <= GRAM_COLUMNS * wanted or side <= SMALL_SIDE
    )


def _by_stacks(operators: Sequence[Operator], wanted: int, accuracy: Accuracy) -> list[tuple[Triple, Certificate]]:
    """Decompose sums of one shape and total rank by QR, or by Gram matrices where their precision does."""
    side, columns = min(operators[0].out_features, operators[0].in_features), operators[0].columns
    if columns <= QR_COLUMNS or wanted >= min(columns, side):
        return _by_qr(operators, f"total rank {columns} is small")
    reason = f"total rank {columns} is below the shorter side {side}"
    steep = f"{reason}; the spectrum is too steep for Gram matrices"
    found = _by_gram(operators, wanted, accuracy, reason)
    pairs = zip(operators, found, strict=True)
    return [_by_qr([operator], steep)[0] if answer is None else answer for operator, answer in pairs]


def _by_cheapest(
    operator: Operator, k: int | None, accuracy: Accuracy, start: Tensor | None
) -> tuple[Triple, Certificate]:
    """Decompose by the first method in the module's table that is worth trying and keeps the tolerance."""
    m, n = operator.out_features, operator.in_features
    side, columns, wanted = min(m, n), operator.columns, _wanted(operator, k)
    if wanted == 0:
        empty = torch.zeros(0, dtype=torch.float64, device=operator.device)
        triple = (empty.reshape(m, 0), empty, empty.reshape(0, n))
        return triple, Certificate("none", "there is nothing to decompose", 0.0, 0.0)
    if _stacks_do(operator, wanted):
        return _by_stacks([operator], wanted, accuracy)[0]
    notes: list[str] = []
    formed = None
    size = block_size(wanted)
    if 2 * size <= side and side > SMALL_SIDE:
        if _is_cheaper_formed(operator, size):
            formed = operator.formed(torch.float32)
        worth = min(float(MOST_PRODUCTS), _products_worth(operator, wanted, accuracy, formed is not None))
        found = by_subspace(operator, wanted, accuracy, start, formed, worth, notes)
        if found is not None:
            return found
    if operator.dense is None and columns <= GRAM_SHARE * side:
        answer = _by_gram([operator], wanted, accuracy, "; ".join(notes))[0]
        return _by_qr([operator], "; ".join(notes))[0] if answer is None else answer
    if 4 * wanted <= 3 * side:
        reason = "; ".join(notes) or f"the shorter side {side} is small"
        if (found := _by_dense_gram(operator, wanted, accuracy, reason, formed)) is not None:
            return found
        notes.append("the spectrum is too steep for a Gram matrix")
    formed = None  # It would lie in memory beside the largest of all decompositions.
    return _by_dense_svd(operator, "; ".join(notes) or f"{wanted} of {side} directions are asked for")


def _is_little(operator: Operator) -> bool:
    """Return whether the whole is less work than several threads cost."""
    m, n, columns = operator.out_features, operator.in_features, operator.columns
    return max(m, n) <= SERIAL_SIDE or (operator.dense is None and (m + n) * columns**2 <= SERIAL_WORK)


def _is_cheaper_formed(operator: Operator, size: int) -> bool:
    """Return whether multiplying the sum out pays for block products with it."""
    m, n, columns, products = operator.out_features, operator.in_features, operator.columns, 4
    if not columns:
        return True
    return columns * m * n + products * m * n * size < products * columns * (m + n) * size


def _products_worth(operator: Operator, wanted: int, accuracy: Accuracy, is_formed: bool) -> float:
    """Return how many products of the block iteration cost as much as the method that would follow.

    Counted in operations, one in float64 as two, LAPACK's by how much longer than products they were seen to take.
    """
    m, n, columns, size = operator.out_features, operator.in_features, operator.columns, block_size(wanted)
    side = min(m, n)
    product = 2 * size * (m * n if is_formed else columns * (m + n)) + 16 * size**2 * max(m, n)
    if operator.dense is None and columns <= GRAM_SHARE * side:
        return (2 * columns**2 * (m + n) + 30 * columns**3) / product
    if 4 * wanted > 3 * side:
        return 50 * side**3 / product
    forming = 4 * columns * m * n if accuracy == "exact" else 0 if is_formed else 2 * columns * m * n
    return (forming + 2 * side * m * n + 8 * side**3) / product


def _by_qr(operators: Sequence[Operator], reason: str) -> list[tuple[Triple, Certificate]]:
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


def _by_gram(
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


def _by_dense_gram(
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


def _by_dense_svd(operator: Operator, reason: str) -> tuple[Triple, Certificate]:
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


def _tamed(operator: Operator) -> tuple[Operator, float]:
    """Return the operator over a power of two, and that power: neither float32 nor a square overflows or vanishes.

    It is the operator itself, over 1, unless weights or factors are of sizes that no training arrives at.
    """
    unit = 1.0 if _is_moderate(operator.magnitude) else ldexp(1.0, frexp(operator.magnitude)[1] - 1)
    if unit == 1.0 and all(_is_tame(term) for term in operator.terms):
        return operator, 1.0
    terms: list[Term] = []
    for term in operator.terms:
        lengths = torch.where(term.right_sizes > 0, term.right_sizes, 1.0)
        left = term.left.double() * (lengths * (term.coefficient / unit)).to(term.left.device)
        right = term.right.double() / lengths[:, None].to(term.right.device)
        terms.append(Term(left, right, 1.0, term.sizes / unit, term.right_sizes / lengths))
    dense = None if operator.dense is None else operator.dense / unit
    return replace(operator, terms=terms, dense=dense, magnitude=operator.magnitude / unit), unit


def _is_tame(term: Term) -> bool:
    sizes = term.right_sizes[term.right_sizes > 0].tolist()
    return all(_is_moderate(size) for size in (abs(term.coefficient), *sizes))


def _is_moderate(size: float) -> bool:
    return size == 0 or 1 / MODERATE <= size <= MODERATE


def _double_rounding(operator: Operator) -> float:
    longer = max(operator.out_features, operator.in_features)
    return 4 * torch.finfo(torch.float64).eps * sqrt(longer) * operator.magnitude
