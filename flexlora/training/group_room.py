"""Decides whether another client may enter a group, and how many tokens a pass may have."""

from collections.abc import Sequence

import torch

from flexlora.limits import memory_bytes, num_cores
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.common_ranks import OWN_RANKS, CommonRanks
from flexlora.training.group_passes import GroupJob
from flexlora.training.length_runs import LARGER
from flexlora.training.one_client import LocalTraining

MOST_CLIENTS = 256
"""Most clients of a group, unless the caller sets a number."""

# Clients enter while a step of all of them has fewer tokens than this, and while there is memory. A larger base has
# full passes with fewer, and the factors of each client take more memory.
_POOL_TOKENS = {"cpu": 4096, LARGER: 512, "cuda": 65536}
_MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.4}
# Two moments and, in banks that are at most half empty, weights and gradients; a frozen branch has weights alone.
_BYTES_PER_FACTOR = {True: 24, False: 8}
# A pass with more tokens no longer fits into the caches, and keeps more activations.
_MOST_PASS_TOKENS = {"cpu": 1024, LARGER: 512, "cuda": 32768}
# What a block keeps of a token for the backward pass: so many times its width and its inner width.
_KEPT_WIDTHS, _KEPT_INNER_WIDTHS = 12, 4
# Bytes for each entry of the vocabulary kept at a token of an answer, and the share of such tokens.
_BYTES_PER_LOGIT, _ANSWER_SHARE = 10, 0.2
_ACTIVATION_SHARE = 0.4


def has_room(
    training: Sequence[GroupJob],
    job: GroupJob,
    settings: LocalTraining,
    device: torch.device,
    most_clients: int | None,
    pace: str | None = None,
    ranks: CommonRanks = OWN_RANKS,
) -> bool:
    """Return whether ``job`` may enter beside those that train; one always may.

    Args:
        training: Jobs of the clients that train at present.
        job: Of the client that waits.
        settings: How clients train.
        device: Where the base is.
        most_clients: Largest group; None decides by tokens and memory.
        pace: What passes cost with this base; None is that of a small one.
        ranks: At which factors are stored.
    """
    if not training or most_clients is not None:
        return len(training) < (most_clients or 1)
    jobs = [job, *training]
    return (
        len(jobs) <= MOST_CLIENTS
        and sum(_step_tokens(job, settings) for job in jobs) <= _POOL_TOKENS.get(pace or device.type, 0)
        and sum(_factor_bytes(job, ranks) for job in jobs)
        <= _MEMORY_SHARE.get(device.type, 0.25) * _memory_bytes(device)
    )


def _step_tokens(job: GroupJob, settings: LocalTraining) -> float:
    """Return about how many tokens one optimiser step of a client has."""
    size = min(settings.batch_size * settings.gradient_accumulation_steps, len(job.examples))
    return size * sum(len(example.input_ids) for example in job.examples) / max(1, len(job.examples))


def _factor_bytes(job: GroupJob, ranks: CommonRanks) -> int:
    branches = ((job.broadcast.trainable, True), (job.broadcast.frozen or {}, False))
    return sum(
        _BYTES_PER_FACTOR[is_trained] * rank * sum(adapter[path].shape)
        for adapter, is_trained in branches
        for path, rank in ranks.stored(adapter, is_trained=is_trained).items()
    )


def tokens_with_memory(model: AdaptedModel) -> int:
    """Return how many tokens a pass through ``model`` may have: on a GPU, as many as it has memory for."""
    most = _MOST_PASS_TOKENS.get(model.pace, 1024)
    if model.device.type != "cuda":
        return most
    config = model.network.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    size = torch.empty((), dtype=model.network.dtype).element_size()
    per_token = size * config.num_hidden_layers * (_KEPT_WIDTHS * width + _KEPT_INNER_WIDTHS * inner)
    per_token += _ANSWER_SHARE * _BYTES_PER_LOGIT * config.vocab_size
    left = _memory_bytes(model.device) - size * model.num_parameters
    return min(most, max(1, int(_ACTIVATION_SHARE * left / per_token)))


def _memory_bytes(device: torch.device) -> float:
    """Return what this process may use of a device: on a GPU the share that PyTorch was told, else one of a core."""
    if device.type == "cuda":
        return torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.mem_get_info(device)[1]
    return memory_bytes() / num_cores()
