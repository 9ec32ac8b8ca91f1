"""Bounds what the leading Ritz vectors of a block leave of a sum, from a few random vectors.

``subspace`` explains the letters and proves the bounds.
"""

# torch.linalg carries no type information.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportConstantRedefinition=false

from math import exp, inf, lgamma, log, sqrt

import torch
from torch import Tensor

from flexlora.lora.certificate import FLOOR, TOLERANCE, Accuracy, together, verdict_on
from flexlora.lora.linalg import gram
from flexlora.lora.operator import Operator

NUM_PROBES = 32


class Remainder:
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


def _least_chi2(b: int, chance: float) -> float:
    """Return a value that a chi-squared variable with ``b`` degrees of freedom falls below with at most ``chance``.

    From ``P(chi2_b < x) <= (x / 2)^(b / 2) / Gamma(b / 2 + 1)``.
    """
    return 2 * exp(2 / b * (log(chance) + lgamma(b / 2 + 1)))
