"""Clips what each client changed and makes the noise of a round: the Gaussian mechanism on a cohort's sum.

With ``D_i`` the change of client ``i`` against what it was sent, measured in the space that the method names, ``C`` the
clip and ``N`` a denominator that does not depend on who takes part:

    mean = (sum_i min(1, C / ||D_i||) D_i + z C gaussian) / N

- Norm: Frobenius, joint over all modules (``flexlora.lora.change``). Change of the sum: two cohorts that differ by one
  client more or less differ by at most ``C``; if one client takes the place of another, by at most ``2 C``.
- Every client counts the same, whatever its number of examples: a weight of its own would be a sensitivity of its own.
- ``N`` is the expected size of the cohort. The number of those who really came is not divided by: it would be private.
- Clipping is done by the server, which therefore sees updates in the clear: the guarantee is against everybody else.

``AdaptiveClip`` follows a quantile of the norms (arXiv:1905.03871, algorithm 1): with ``b`` the noisy share of clients
within the clip, ``C <- C exp(-step (b - quantile))``. Counting them is a second release. Both together cost what one
with noise multiplier ``z`` costs if the sum has ``(z^-2 - (2 z_b)^-2)^-1/2`` and the count, of sensitivity 1/2, noise
of standard deviation ``z_b`` (theorem 1 there).

Noise is drawn from a seed, so that a run can be repeated and resumed to the same bits. It protects nobody from a party
that knows the seed, and is as good as the generator and as double precision are: no defence against attacks on the
low-order bits of samples (Mironov 2012).
"""

# torch.from_numpy carries no type information.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import exp, isfinite

import torch
from torch import Tensor

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Change
from flexlora.federation.streams import stream
from flexlora.lora.change import ChangeSpace, change_norm


class ClipError(FlexLoraError, ValueError):
    """A clip or a noise that is impossible as asked for, or a change that cannot be clipped."""


@dataclass(frozen=True)
class AdaptiveClip:
    """How the clip follows the norms of the clients' changes (arXiv:1905.03871).

    Attributes:
        quantile: Share of the clients whose changes the clip is to leave alone, 0 to 1 (the paper's gamma).
        step: How fast the clip moves, in the exponent (the paper's eta_C, 0.2 there).
        count_noise: Standard deviation of the noise on the number of clients within the clip (the paper's sigma_b).
    """

    quantile: float
    step: float
    count_noise: float


@dataclass(frozen=True)
class ClipAndNoise:
    """The mechanism of a run.

    Attributes:
        clip: Largest joint norm of a client's change; with ``adaptive``, that of round 1.
        noise_multiplier: ``z``: what a round is accounted with.
        denominator: Expected size of a cohort.
        space: What changes are measured in.
        seed: Of the noise.
        adaptive: None keeps the clip.
    """

    clip: float
    noise_multiplier: float
    denominator: float
    space: ChangeSpace
    seed: int
    adaptive: AdaptiveClip | None = None

    def __post_init__(self) -> None:
        """Refuse what bounds or hides nothing.

        Raises:
            ClipError: Naming the value and what to change.
        """
        for name in ("clip", "noise_multiplier", "denominator"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise ClipError(f"{name} must be finite and above 0; got {value}")
        if self.adaptive is not None and not 2 * self.adaptive.count_noise > self.noise_multiplier:
            raise ClipError(
                f"the noise of the count must be above half the noise multiplier, {self.noise_multiplier / 2:g}, or "
                f"counting alone would cost more than a round may; got {self.adaptive.count_noise:g}: raise it"
            )

    @property
    def sum_multiplier(self) -> float:
        """Standard deviation of the noise on the sum over the clip: more than ``z`` if clients are counted too."""
        if self.adaptive is None:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 - (2 * self.adaptive.count_noise) ** -2) ** -0.5


@dataclass
class ClipTally:
    """What clipping saw of a round; changed in place as changes pass.

    Attributes:
        norms: Of the changes before clipping, in order.
        num_within: Changes whose norm is at most the clip.
    """

    norms: list[float] = field(default_factory=list[float])
    num_within: int = 0


def clipped(changes: Iterable[Change], clip: float, space: ChangeSpace, tally: ClipTally) -> Iterator[Change]:
    """Yield the changes with the discount that brings each to a norm of at most ``clip``.

    A discount that a change has already, 0 to 1, makes it smaller still.

    Raises:
        ClipError: At a change whose norm is not finite.
    """
    for change in changes:
        norm = change_norm(change.start, change.update.payload, space)
        if not isfinite(norm):
            raise ClipError(f"a change must be finite to be clipped; that of {change.update.client_id!r} is {norm}")
        tally.norms.append(norm)
        tally.num_within += norm <= clip
        scale = 1.0 if norm <= clip else clip / norm
        yield Change(change.update, change.start, change.discount * scale)


def round_noise(mechanism: ClipAndNoise, clip: float, server_round: int) -> Callable[[str, int, int], Tensor]:
    """Return name, height, width -> the noise of a round on the sum of a matrix, float64.

    Independent entries of standard deviation ``sum_multiplier * clip``.
    """
    deviation = mechanism.sum_multiplier * clip

    def noise(name: str, height: int, width: int) -> Tensor:
        """Return the noise of one matrix, a function of the seed, the round and its name."""
        # Not torch's generator: on a CPU it takes 32 bits of a seed, which can all be tried.
        rng = stream(mechanism.seed, "privacy-noise", server_round, name)
        return torch.from_numpy(deviation * rng.standard_normal((height, width)))

    return noise


def next_clip(mechanism: ClipAndNoise, clip: float, tally: ClipTally, server_round: int) -> float:
    """Return the clip of the next round, from the noisy share of the clients that were within this one's.

    Each client adds 1/2 or -1/2 to the count, and nobody who stays away anything: the number of those who came is
    hidden too.
    """
    adaptive = mechanism.adaptive
    if adaptive is None:
        return clip
    count = tally.num_within - 0.5 * len(tally.norms)
    count += adaptive.count_noise * stream(mechanism.seed, "privacy-count", server_round).standard_normal()
    share = count / mechanism.denominator + 0.5
    return clip * exp(-adaptive.step * (share - adaptive.quantile))
