"""Finds the leading singular values of an operator that can only be multiplied with, and proves how good they are.

A block of orthonormal columns is multiplied with ``P P^T``, filtered by Chebyshev polynomials that hold down what the
block does not catch. ``P^T`` times the block gives Ritz triples ``(s_j, u_j, v_j)`` with ``P^T U = V diag(s)``, and
``P V`` the answer. Keep the leading ``kept >= k`` triples, and let ``E = (1 - U U^T) P V`` and ``P_d = (1 - U U^T) P (1
- V V^T)``, so that ``P V = U diag(s) + E`` and ``P - P V V^T = P_d``. Let ``eta`` be at least the squared spectral norm
of ``P_d``. For a singular triple ``(sigma, u, v)`` of ``P`` write ``a = V^T v``, ``b = U^T u``, and ``z``, ``w`` for
the parts of ``v``, ``u`` outside ``V``, ``U``. Then ``sigma b = diag(s) a``, ``sigma w = E a + P_d z`` and ``sigma z =
P_d^T w``, so that ``sigma |z| <= eta^(1/2) |w|`` and, for ``sigma^2 > eta``,

    |w| <= sigma / (sigma^2 - eta) |E a| = sigma^2 / (sigma^2 - eta) |E diag(s)^-1 b|.

``P V`` captures at least ``sum_(i<=j) sigma_i^2 (1 - |z_i|^2)`` in ``j`` directions, because ``P^T P`` is at least its
leading part, and ``sigma_i^2`` exceeds the square ``theta_i`` of the ``i``-th singular value of ``P V`` by at most
``eta``, because ``P P^T = (P V) (P V)^T + P_d P_d^T``. The ``a_i``, and the ``b_i``, are projections of orthonormal
vectors. So for any ``j <= k`` with ``s_j^2 > eta``

    sum_(i<=k) (sigma_i^2 - theta_i) <= eta (s_j^2 / (s_j^2 - eta))^2 min(||E diag(s)^-1||^2, ||E||^2 / s_j^2)
                                        + (k - j) eta                                             (Frobenius norms).

``eta`` comes from a few random vectors ``G`` that have nothing to do with ``U`` and ``V``. With ``N`` the product of
``P_d^T`` and ``P_d`` in turn, ``d`` factors, and ``g`` the coefficients of ``G`` at the leading left vector of ``P_d``,
``||N G||^2 >= ||P_d||^(2 d) |g|^2`` in spectral norms, where ``|g|^2`` is chi-squared and exceeds a value that is not
small except with a chance of our choice. The first two factors ride along with products that are needed anyway; more of
them, which cost little for so few columns, make the bound tighter. The first one also gives the energy of ``P_d``
(Laurent and Massart 2000, lemma 1). The chance is shared out: the ``t``-th block, which may be any of ``t`` depending
on when float32 was given up, gets ``1 / (t^2 (t + 1))`` of it for each of them; half of that goes to the two bounds of
the energy, and ``1 / (d (d - 1))`` of the other half to the bound with ``d`` factors.
"""

# torch.linalg carries no type information.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportConstantRedefinition=false

from hashlib import blake2b
from math import acosh, ceil, hypot, inf, log, sqrt

import torch
from torch import Tensor

from flexlora.lora.certificate import ROUNDING, Accuracy, Certificate, lost_to_rounding
from flexlora.lora.linalg import Triple, gram, orthonormal, ritz
from flexlora.lora.operator import Operator
from flexlora.lora.remainder import NUM_PROBES, Remainder

FAILURE_PROBABILITY = 1e-9
"""Chance that a certificate of the randomised method does not hold."""

LEAST_OVERSAMPLING = 16
MANY_COLUMNS = 64
"""Columns of the terms per direction asked for from which on their means need no product to begin with."""
FILTERED_FROM = 5
"""Products after which the edge of the filter stays where it is."""
MOST_PRODUCTS = 25
LEAST_FACTORS = 8
MOST_FACTORS = 32
"""Factors of the product that bounds a spectral norm."""


def block_size(k: int) -> int:
    """Return the number of columns to iterate with for ``k`` directions."""
    return k + max(LEAST_OVERSAMPLING, k // 12)


def by_subspace(
    operator: Operator,
    k: int,
    accuracy: Accuracy,
    start: Tensor | None,
    formed: Operator | None,
    worth: float,
    notes: list[str],
) -> tuple[Triple, Certificate] | None:
    """Decompose by block iteration with the certificate of the module's docstring; None where it is not met.

    Args:
        operator: The sum.
        k: Directions asked for.
        accuracy: Which tolerance to meet.
        start: Columns of length ``in_features`` to begin from, or None: from the terms themselves.
        formed: The same sum multiplied out in float32, if that is cheaper to multiply with.
        worth: Products with the sum that cost as much as another method would.
        notes: Where to say why there is no answer.
    """
    side = min(operator.out_features, operator.in_features)
    # Multiplied out, the sum has errors of float32, which only products with the sum itself can correct.
    exact, operator = operator, formed or operator
    reason = f"{k} of {side} directions, {'multiplied out once' if formed else 'never multiplied out'}"
    left, probes, products = _first_block(exact, operator, k, start)
    scale2, dtype, before, edge2 = exact.scale**2, torch.float32, inf, 0.0
    most_factors = min(MOST_FACTORS, max(LEAST_FACTORS, 2 + 2 * left.shape[1] // NUM_PROBES))
    num_blocks, previous, probed = 0, None, None
    while True:
        Z, probed = _transposed(operator, dtype, left, probes, probed)
        theta, rotation, (basis, mixture) = ritz(Z, gram(Z))
        rounding2 = (ROUNDING * torch.finfo(dtype).eps) ** 2 * (scale2 + float(theta.sum()))
        if float(theta[0]) <= rounding2:
            notes.append("the sum cancels to nothing but rounding")
            return None
        left, right = left @ rotation, basis @ mixture
        num_blocks, products = num_blocks + 1, products + 2
        chance = FAILURE_PROBABILITY / (num_blocks**2 * (num_blocks + 1))
        rest = Remainder(operator, dtype, k, theta, left, right, rounding2, chance)
        image = rest.examine(probes, probed)
        lost = lost_to_rounding(theta, k, rounding2) + _lost_by_dropping(theta, k, dtype)
        verdict = rest.verdict(lost, accuracy, most_factors)
        if verdict is not None:
            return _answered(rest, image, right, k, dtype, verdict, f"{reason}; {products} products with it")
        hoped, allowed = rest.hoped(), rest.allowed(accuracy)
        if products <= FILTERED_FROM:
            # The edge of what is unwanted is known better than before, so the polynomial begins anew.
            edge2, previous = max(float(theta[-1]), 1e-30 * float(theta[0])), None
        is_stuck = hoped > 0.5 * before
        is_too_coarse = max(lost, rounding2) > allowed and (is_stuck or hoped <= max(10 * rounding2, allowed))
        # What the first block shows of the gap is too little to judge by.
        further = 2.0 if num_blocks == 1 else _further_products(float(theta[k - 1]) / edge2, hoped / allowed)
        if dtype == torch.float32 and is_too_coarse:
            dtype, operator, probed, hoped = torch.float64, exact, None, inf
            reason += f", in float64 after {products} products that left too few digits"
        elif is_stuck or products + further > worth:
            notes.append(f"no gap after direction {k} that {products} products with the sum could use")
            return None
        before = hoped
        left, previous = _filtered(image * (2 * theta.sqrt() / edge2) - left, left, previous, rotation)


def _transposed(
    operator: Operator, dtype: torch.dtype, left: Tensor, probes: Tensor, probed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``P^T`` times the block, and times the probes where that is not known yet."""
    columns = left if probed is not None else torch.cat([left, probes], 1)
    images = operator.apply_transposed(columns.to(dtype)).to(torch.float64)
    return images[:, : left.shape[1]], images[:, left.shape[1] :] if probed is None else probed


def _filtered(step: Tensor, left: Tensor, previous: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next block of the Chebyshev recurrence, orthonormal, and this one in the same coordinates.

    Args:
        step: ``left`` times the variable of the polynomials, ``2 P P^T / edge^2 - 1``.
        left: This block.
        previous: The block before, None at the beginning.
        rotation: From the coordinates of ``previous`` to those of ``left``.
    """
    following = step if previous is None else 2 * step - previous @ rotation
    following, upper = orthonormal(following)
    return following, torch.linalg.solve_triangular(upper, left, upper=True, left=False)


def _lost_by_dropping(theta: Tensor, k: int, dtype: torch.dtype) -> float:
    """Return what ``_answered`` can lose in captured energy by leaving out directions that are nothing but rounding.

    Args:
        theta: Squared singular values, descending, of one product less than ``_answered`` sees.
        k: Directions asked for.
        dtype: Of the products.
    """
    least = torch.finfo(dtype).eps ** 2 * float(theta[0])
    # Which ones are left out is decided one product later, so whatever is near counts as well.
    return least * int((theta[:k] < 100 * least).sum())


def _answered(
    rest: Remainder,
    image: Tensor,
    right: Tensor,
    k: int,
    dtype: torch.dtype,
    verdict: tuple[float, float],
    reason: str,
) -> tuple[Triple, Certificate]:
    """Return the singular triples of ``P`` within the right vectors, ``image`` being ``P`` times these."""
    excess, rounding = verdict
    theta, rotation, (basis, mixture) = ritz(image, gram(image))
    S = theta.sqrt()
    kept = min(k, int((S > S[0] * torch.finfo(dtype).eps).sum()))
    triple = (basis @ mixture[:, :kept], S[:kept], (right @ rotation[:, :kept]).T)
    tail = hypot(rest.tail, float(S[kept:k].norm()))
    return triple, Certificate(
        "subspace", reason, sqrt(rest.total), tail, excess, rounding, FAILURE_PROBABILITY, rest.spread
    )


def _further_products(gap: float, ratio: float) -> float:
    """Return about how many products take the squared error down by ``ratio``.

    Args:
        gap: Last wanted over first unwanted squared singular value; each step multiplies with the growth of the
            Chebyshev polynomials there.
        ratio: At least 1 where there is anything left to do.
    """
    growth = acosh(max(1.0, 2 * gap - 1))
    return 2.0 * ceil(log(max(ratio, 1.0)) / (2 * growth)) if growth > 0 else inf


def _first_block(exact: Operator, operator: Operator, k: int, start: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Return orthonormal columns on the left to begin with, probes ``G``, and the number of products that took.

    Without ``start`` what is known are means of the terms. Of very many terms the columns on the left are good enough
    as they are, of fewer the rows on the right are, after one product. The numbers of the probes do not depend on what
    the block is made from, but are the same for the same sum. From a fixed seed they would depend on it: last round's
    directions were found with the very block that is to judge them now. And a
    client, which knows only a part of the sum, cannot tell what they will be.
    """
    has_terms = start is None and bool(exact.terms) and exact.dense is None
    is_left = has_terms and exact.columns >= MANY_COLUMNS * k
    if has_terms:
        start = exact.mean_columns(k) if is_left else exact.mean_rows(k)
    known = torch.zeros(operator.in_features, 0) if start is None else start[:, :k]
    known = torch.nan_to_num(known.to(operator.device, torch.float64), 0.0, 0.0, 0.0)
    known = (known / known.abs().amax(0).clamp_min(1e-300)).to(torch.float32) if known.shape[1] else known.float()
    generator = torch.Generator().manual_seed(_seed(exact, known))
    others = torch.randn(known.shape[0], block_size(k) - known.shape[1], generator=generator).to(operator.device)
    probes = torch.randn(operator.out_features, NUM_PROBES, generator=generator, dtype=torch.float64)
    block = torch.cat([known, others], 1)
    left, _ = orthonormal(block if is_left else operator.apply(block))
    return left, probes.to(operator.device), 0 if is_left else 1


def _seed(operator: Operator, known: Tensor) -> int:
    """Return a number that depends on every part of the sum and on the directions to begin with."""
    digest = blake2b(known.cpu().contiguous().numpy().tobytes(), digest_size=8)
    digest.update(operator.sizes.cpu().numpy().tobytes())
    if operator.dense is not None:
        for dim in (0, 1):
            digest.update(operator.dense.sum(dim, dtype=torch.float64).cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()) >> 1
