"""Finds the leading singular values of sums of products at the least cost, and certifies how good the answer is.

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

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from math import hypot
from typing import TypeVar

import torch
from torch import Tensor

from flexlora.limits import memory_bytes
from flexlora.lora.certificate import Accuracy, Certificate
from flexlora.lora.dense_methods import by_dense_gram, by_dense_svd, by_gram, by_qr
from flexlora.lora.linalg import (
    SERIAL_SIDE,
    Triple,
    full_precision,
    one_thread,
)
from flexlora.lora.operator import STACK_BYTES, Operator, tamed
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
        """Return position, answer and certificate of the sums of one batch."""
        scaled = [tamed(operators[index]) for index in members]
        chosen, k = [operator for operator, _ in scaled], ks[members[0]]
        with one_thread(_is_little(chosen[0])):
            if len(members) > 1:
                batch = _by_stacks(chosen, _wanted(chosen[0], k), accuracy)
            else:
                batch = [_by_cheapest(chosen[0], k, accuracy, starts[members[0]])]
        for operator in chosen:
            operator.forget_copies()
        return [
            (index, *_trimmed(answer, certificate, k, unit))
            for index, (answer, certificate), (_, unit) in zip(members, batch, scaled, strict=True)
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
    """Yield results in order, ``at_once`` computed at a time."""
    if at_once == 1:
        yield from map(decompose, items)
        return
    waiting: deque[Future[_Found]] = deque()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for item in items:
                # As many again wait, so that no thread idles behind a slow one.
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

    The latter wherever there is memory and every thread has work: threads share small LAPACK problems badly.
    """
    num_threads = torch.get_num_threads()
    large = [operator for operator in operators if operator.device.type == "cpu" and not _is_little(operator)]
    if num_threads == 1 or len(large) < num_threads:
        return 1
    return num_threads if num_threads * max(map(_most_bytes, large)) <= MEMORY_SHARE * memory_bytes() else 1


def _most_bytes(operator: Operator) -> int:
    """Return about how much memory the costliest method takes: copies in both precisions, then a full SVD."""
    m, n = operator.out_features, operator.in_features
    return sum(min(STACK_BYTES, size * operator.columns * (m + n)) for size in (4, 8)) + 8 * 8 * m * n


def _batches(operators: Sequence[Operator], ks: Sequence[int | None]) -> list[list[int]]:
    """Return the positions of the sums in batches, each computed together."""
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
        return by_qr(operators, f"total rank {columns} is small")
    reason = f"total rank {columns} is below the shorter side {side}"
    steep = f"{reason}; the spectrum is too steep for Gram matrices"
    found = by_gram(operators, wanted, accuracy, reason)
    pairs = zip(operators, found, strict=True)
    return [by_qr([operator], steep)[0] if answer is None else answer for operator, answer in pairs]


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
        answer = by_gram([operator], wanted, accuracy, "; ".join(notes))[0]
        return by_qr([operator], "; ".join(notes))[0] if answer is None else answer
    if 4 * wanted <= 3 * side:
        reason = "; ".join(notes) or f"the shorter side {side} is small"
        if (found := by_dense_gram(operator, wanted, accuracy, reason, formed)) is not None:
            return found
        notes.append("the spectrum is too steep for a Gram matrix")
    formed = None  # It would lie in memory beside the largest of all decompositions.
    return by_dense_svd(operator, "; ".join(notes) or f"{wanted} of {side} directions are asked for")


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
