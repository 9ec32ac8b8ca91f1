"""Decides from distances between clients' changes whom of a cohort to believe, so that a few who lie do little harm.

All rules see the matrix of inner products ``<D_i, D_j>`` of the changes of products (``flexlora.lora.change_gram``) and
nothing else, and give each client a multiplier from 0 to 1. With ``n`` clients, ``f`` of them malicious at most, and
``d_ij = ||D_i - D_j||``:

- ``norm_bound``: ``min(1, M / ||D_i||)``, ``M`` fixed or the median norm (arXiv:1911.07963).
- ``krum``: 1 for the client with the least sum of ``d_ij^2`` over its ``n - f - 2`` nearest others, else 0
  (arXiv:1703.02757).
- ``multi_krum``: 1 for the ``n - f`` best of that score.
- ``trimmed_mean``: 0 for the ``f`` clients farthest from the client in the middle, which has the least sum of distances
  to all. The coordinate-wise rule of that name (arXiv:1803.01498) would need dense matrices; this one trims clients.
- ``median_of_means``: clients are dealt into ``2 f + 1`` groups, most of which hold no liar, and the group whose mean
  has the least median distance to the other means speaks for all (arXiv:1307.1827).

Every client counts the same: an example count is a claim. A rule needs the cohort in the clear, and the whole of it in
memory. With very different data, the honest are far apart and distances tell less.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.errors import FlexLoraError
from flexlora.uplink.robust_settings import RobustSettings, least_clients


class RobustError(FlexLoraError, ValueError):
    """Too few clients for a rule to hold against those it is to bear."""


def robust_multipliers(
    settings: RobustSettings, gram: Float[Tensor, "clients clients"], rng: np.random.Generator
) -> Float[Tensor, " clients"]:
    """Return what the change of each client is multiplied by, 0 to 1, at least one of them above 0.

    Args:
        settings: The rule.
        gram: Inner products of the changes.
        rng: Deals the groups of ``median_of_means``.

    Raises:
        RobustError: If there are fewer clients than the rule needs.
    """
    n, f = gram.shape[0], settings.num_malicious
    if n < least_clients(settings):
        raise RobustError(
            f"{settings.rule} needs at least {least_clients(settings)} clients against {f} that are malicious; got {n}"
        )
    norms = gram.diagonal().clamp_min(0).sqrt()
    if settings.rule == "norm_bound":
        bound = float(norms.median()) if settings.max_norm is None else settings.max_norm
        return torch.where(norms > bound, bound / norms.clamp_min(1e-300), torch.ones_like(norms))
    if settings.rule == "trimmed_mean":
        distances = _distances(gram)
        middle = int(distances.sum(dim=1).argmin())
        return _ones_at(distances[middle].argsort(stable=True)[: n - f], n)
    if settings.rule == "median_of_means":
        return _median_of_means(gram, 2 * f + 1, rng)
    kept = 1 if settings.rule == "krum" else n - f
    nearest = _distances(gram).square().sort(dim=1).values[:, 1 : n - f - 1]
    return _ones_at(nearest.sum(dim=1).argsort(stable=True)[:kept], n)


def _median_of_means(gram: Tensor, num_groups: int, rng: np.random.Generator) -> Tensor:
    """Return 1 for the clients of the group whose mean is in the middle of all means, else 0."""
    n = gram.shape[0]
    groups = torch.tensor(rng.permutation(np.arange(n) % num_groups))
    member = torch.nn.functional.one_hot(groups, num_groups).T.to(gram)
    means = member / member.sum(dim=1, keepdim=True)
    distances = _distances(means @ gram @ means.T).sort(dim=1).values
    return member[int(distances[:, num_groups // 2].argmin())]


def _distances(gram: Tensor) -> Tensor:
    """Return the distances between the rows that a Gram matrix is of."""
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp_min(0).sqrt().fill_diagonal_(0)


def _ones_at(indices: Tensor, n: int) -> Tensor:
    """Return a vector of zeros with ones at the indices."""
    return torch.zeros(n, dtype=torch.float64).index_fill_(0, indices, 1.0)
