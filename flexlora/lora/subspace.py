"""What are the leading singular values of an operator that can only be multiplied with, and how good is the answer?

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
from math import acosh, ceil, exp, inf, lgamma, log, sqrt

import torch
from torch import Tensor

from flexlora.lora.certificate import (
    FLOOR,
    ROUNDING,
    TOLERANCE,
    Accuracy,
    Certificate,
    lost_to_rounding,
    together,
    verdict_on,
)
from flexlora.lora.linalg import Triple, gram, orthonormal, ritz
from flexlora.lora.operator import Operator

FAILURE_PROBABILITY = 1e-9
"""Chance that a certificate of the randomised method does not hold."""

NUM_PROBES = 32
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
    m, n = operator.out_features, operator.in_features
    # Multiplied out, the sum has errors of float32, which only the sum itself can mend.
    exact, operator = operator, formed or operator
    reason = f"{k} of {min(m, n)} directions, {'multiplied out once' if formed else 'never multiplied out'}"
    left, probes, products = _first_block(exact, operator, k, start)
    scale2, dtype, before, edge2 = exact.scale**2, torch.float32, inf, 0.0
    most_factors = min(MOST_FACTORS, max(LEAST_FACTORS, 2 + 2 * left.shape[1] // NUM_PROBES))
    num_blocks = 0
    previous: Tensor | None = None
    probed: Tensor | None = None
    while True:
        columns = left if probed is not None else torch.cat([left, probes], 1)
        images = operator.apply_transposed(columns.to(dtype)).to(torch.float64)
        Z, probed = images[:, : left.shape[1]], images[:, left.shape[1] :] if probed is None else probed
        theta, rotation, (basis, mixture) = ritz(Z, gram(Z))
        rounding2 = (ROUNDING * torch.finfo(dtype).eps) ** 2 * (scale2 + float(theta.sum()))
        if float(theta[0]) <= rounding2:
            notes.append("the sum cancels to nothing but rounding")
            return None
        left, right = left @ rotation, basis @ mixture
        num_blocks += 1
        chance = FAILURE_PROBABILITY / (num_blocks**2 * (num_blocks + 1))
        rest = _Remainder(operator, dtype, k, theta, left, right, rounding2, chance)
        image = rest.examine(probes, probed)
        products += 2
        lost = lost_to_rounding(theta, k, rounding2)
        verdict = rest.verdict(lost, accuracy, most_factors)
        if verdict is not None:
            break
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
        following = image * (2 * theta.sqrt() / edge2) - left
        following = following if previous is None else 2 * following - previous @ rotation
        following, upper = orthonormal(following)
        previous = torch.linalg.solve_triangular(upper, left, upper=True, left=False)
        left = following
    excess, rounding = verdict
    theta, rotation, (basis, mixture) = ritz(image, gram(image))
    S = theta.sqrt()
    kept = min(k, int((S > S[0] * torch.finfo(dtype).eps).sum()))
    triple = (basis @ mixture[:, :kept], S[:kept], (right @ rotation[:, :kept]).T)
    reason = f"{reason}; {products} products with it"
    rounding += float(S[kept:k].norm())
    chance = FAILURE_PROBABILITY
    return triple, Certificate("subspace", reason, sqrt(rest.total), rest.tail, excess, rounding, chance, rest.spread)


class _Remainder:
    """``P_d`` and ``E``: what the leading Ritz vectors of a block leave of ``P``, and what that says of the answer.

    Attributes:
        kept: Number of vectors taken away, at least ``k``.
        eta: Upper bound of the squared spectral norm of ``P_d``.
        energy: Estimate of its squared Frobenius norm.
    """

    def __init__(
        self,
        operator: Operator,
        dtype: torch.dtype,
        k: int,
        theta: Tensor,
        left: Tensor,
        right: Tensor,
        rounding2: float,
        chance: float,
    ) -> None:
        """Take ``theta`` squared Ritz values, descending, with all left and right vectors; ``P^T left = right s``.

        ``chance`` is that of any bound not to hold.
        """
        self._chance = chance
        self._operator, self._dtype, self._k, self._rounding2 = operator, dtype, k, rounding2
        self._theta = theta
        self._all_right = right
        self.kept = _cut(theta, k)
        self._left, self._right = left[:, : self.kept], right[:, : self.kept]
        self._num_factors, self._log_scale, self._reached = 0, 0.0, 0.0
        self._block = left[:, :0]
        self.eta, self.energy = inf, 0.0
        # Squared norms of the columns of E.
        self._strays = theta[:0]

    def examine(self, probes: Tensor, probed: Tensor) -> Tensor:
        """Return ``P`` times all right vectors, having bounded norm and energy of the rest on the way.

        Args:
            probes: ``G``.
            probed: ``P^T G``.
        """
        self._multiplied(self._outside_right(probed))
        self.energy = float(self._block.square().sum()) * exp(self._log_scale) / probes.shape[1]
        columns = torch.cat([self._all_right, self._block], 1).to(self._dtype)
        images = self._operator.apply(columns).to(torch.float64)
        image, narrow = images[:, : self._all_right.shape[1]], images[:, self._all_right.shape[1] :]
        E = torch.addcmul(image[:, : self.kept], self._left, self._theta[: self.kept].sqrt(), value=-1.0)
        self._strays = E.square_().sum(0)
        self._multiplied(self._outside_left(narrow))
        return image

    @property
    def total(self) -> float:
        """Estimate of the energy of ``P``."""
        return float(self._theta[: self.kept].sum() + self._strays.sum()) + self.energy

    @property
    def tail(self) -> float:
        """Estimate of the norm of what the answer leaves out."""
        beyond = slice(self._k, self.kept)
        return sqrt(float(self._theta[beyond].sum() + self._strays[beyond].sum()) + self.energy)

    @property
    def spread(self) -> float:
        """How far from ``tail`` the norm of what the answer leaves out may be, or that of what the best one does."""
        low, high = self._energy_bounds()
        return max(sqrt(self.tail**2 - self.energy + high) - self.tail, self.tail - sqrt(self._best2(low)))

    def verdict(self, lost: float, accuracy: Accuracy, most_factors: int) -> tuple[float, float] | None:
        """Return excess and rounding as ``verdict_on`` does, after as many products with ``G`` as are worth it."""
        while True:
            low, high = self._energy_bounds()
            missed = together(min(self._missed(self.eta), high), lost)
            found = verdict_on(missed, self._best2(low) + missed, self.total, accuracy)
            is_met = found is not None and found[1] == 0.0
            is_hopeless = max(lost, 2 * self.hoped()) > (self._share(accuracy) if found else self.allowed(accuracy))
            if is_met or is_hopeless or self._num_factors >= most_factors:
                return found
            self._multiply()

    def hoped(self) -> float:
        """Return what would be missed if ``eta`` were as small as what is known of it allows."""
        following = float(self._theta[self.kept]) if self.kept < self._theta.shape[0] else 0.0
        return self._missed(min(self.eta, max(1.1 * following, self._reached)))

    def allowed(self, accuracy: Accuracy) -> float:
        """Return about how much may be missed for a verdict."""
        return max(self._share(accuracy), FLOOR[accuracy] ** 2 * self.total)

    def _share(self, accuracy: Accuracy) -> float:
        """Return how much of the best error's square may be missed."""
        return ((1 + TOLERANCE[accuracy]) ** 2 - 1) * self._best2(self._energy_bounds()[0])

    def _best2(self, energy: float) -> float:
        """Return a lower bound of what the answer leaves out when ``P_d`` has this energy, rounding allowed for."""
        left_out = float(self._theta[self._k : self.kept].sum()) + energy
        return max(0.0, sqrt(left_out) - sqrt(self._rounding2)) ** 2

    def _missed(self, eta: float) -> float:
        """Return the bound of what the answer misses."""
        values = self._theta[: self._k]
        values = values[values > eta]
        numbers = torch.arange(values.shape[0] + 1, dtype=torch.float64, device=values.device)
        angles = (self._strays / self._theta[: self.kept].clamp_min(1e-300)).sum()
        shares = (values / (values - eta)).square() * torch.minimum(angles, self._strays.sum() / values)
        return float((eta * torch.nn.functional.pad(shares, (1, 0)) + (self._k - numbers) * eta).min())

    def _energy_bounds(self) -> tuple[float, float]:
        """Return what the energy of ``P_d`` lies between: no direction of it carries more than ``eta``."""
        x = -log(self._chance / 4)
        spread = sqrt(self.eta * x / NUM_PROBES)
        low = max(0.0, sqrt(max(0.0, self.energy - spread**2)) - spread) ** 2
        worst = self.energy * NUM_PROBES / (NUM_PROBES + 2 * sqrt(NUM_PROBES * x) + 2 * x)
        return max(low, worst), (spread + sqrt(spread**2 + self.energy)) ** 2

    def _outside_left(self, block: Tensor) -> Tensor:
        return block - self._left @ (self._left.T @ block)

    def _outside_right(self, block: Tensor) -> Tensor:
        """Return ``P_d^T Y`` of ``block = P^T Y``: the part that ``U`` takes of it lies within ``V``."""
        return block - self._right @ (self._right.T @ block)

    def _multiply(self) -> None:
        """Multiply ``G`` with one more factor."""
        block = self._block.to(self._dtype)
        if self._num_factors % 2:
            self._multiplied(self._outside_left(self._operator.apply(block).to(torch.float64)))
        else:
            self._multiplied(self._outside_right(self._operator.apply_transposed(block).to(torch.float64)))

    def _multiplied(self, block: Tensor) -> None:
        """Take the next product and bound the norm with it."""
        self._num_factors += 1
        size = float(torch.linalg.eigvalsh(gram(block))[-1])
        if self._num_factors > 1:
            self._reached = max(self._reached, size)
        self._log_scale += log(max(size, 1e-300))
        self._block = block / sqrt(max(size, 1e-300))
        if self._num_factors > 1:
            share = 0.5 / (self._num_factors * (self._num_factors - 1))
            chi2 = _least_chi2(block.shape[1], self._chance * share)
            bound = exp((self._log_scale - log(chi2)) / self._num_factors)
            self.eta = min(self.eta, (sqrt(bound) + sqrt(self._rounding2)) ** 2)


def _cut(theta: Tensor, k: int) -> int:
    """Return after which Ritz value, the ``k``-th or a later one, to cut.

    What follows should be far below the ``k``-th, and what comes before well known: far above the end of the block.
    """
    here = float(theta[k - 1])
    best, least = k, inf
    unknown = (theta[-1] / theta.clamp_min(1e-300)).square().cumsum(0).tolist()
    for kept, following in enumerate(theta[k:].tolist(), start=k):
        if here > 1.1 * following:
            cost = (here / (here - 1.1 * following)) ** 2 * unknown[kept - 1]
            best, least = (kept, cost) if cost < least else (best, least)
    return best


def _further_products(gap: float, ratio: float) -> float:
    """Return about how many products take the squared error down by ``ratio``.

    Args:
        gap: Last wanted over first unwanted squared singular value; each step multiplies with the growth of the
            Chebyshev polynomials there.
        ratio: At least 1 where there is anything left to do.
    """
    growth = acosh(max(1.0, 2 * gap - 1))
    return 2.0 * ceil(log(max(ratio, 1.0)) / (2 * growth)) if growth > 0 else inf


def _least_chi2(b: int, chance: float) -> float:
    """Return a value that a chi-squared variable with ``b`` degrees of freedom falls below with at most ``chance``.

    From ``P(chi2_b < x) <= (x / 2)^(b / 2) / Gamma(b / 2 + 1)``.
    """
    return 2 * exp(2 / b * (log(chance) + lgamma(b / 2 + 1)))


def _first_block(exact: Operator, operator: Operator, k: int, start: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Return orthonormal columns on the left to begin with, probes ``G``, and the number of products that took.

    Without ``start`` what is known are means of the terms. Of very many terms the columns on the left are good enough
    as they are, of fewer the rows on the right are, after one product. The numbers of the probes do not depend on what
    the block is made from, but are the same for the same sum. From a fixed seed they would depend on it: last round's
    directions were found with the very block that is to judge them now. And nobody who knows only a part of the sum can
    tell what they will be.
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
    """Return a number that every part of the sum has a say in, and the directions to begin with."""
    digest = blake2b(known.cpu().contiguous().numpy().tobytes(), digest_size=8)
    digest.update(operator.sizes.cpu().numpy().tobytes())
    if operator.dense is not None:
        for dim in (0, 1):
            digest.update(operator.dense.sum(dim, dtype=torch.float64).cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()) >> 1
