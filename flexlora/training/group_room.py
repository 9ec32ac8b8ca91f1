"""Decides whether another client may enter a group."""

from collections.abc import Sequence

import torch

from flexlora.limits import memory_bytes, num_cores
from flexlora.training.group_passes import GroupJob
from flexlora.training.length_runs import LARGER
from flexlora.training.one_client import LocalTraining

MOST_CLIENTS = 256
"""Most clients of a group, unless the caller sets a number."""

# Clients enter while a step of all of them has fewer tokens than this, and while there is memory. A larger base has
# full passes with fewer, and the factors of each client take more memory.
_POOL_TOKENS = {"cpu": 4096, LARGER: 512, "cuda": 65536}
_MEMORY_SHARE = 0.25
# Weights, gradients and two moments.
_BYTES_PER_FACTOR = 16


def has_room(
    training: Sequence[GroupJob],
    job: GroupJob,
    settings: LocalTraining,
    device: torch.device,
    most_clients: int | None,
    pace: str | None = None,
) -> bool:
    """Return whether ``job`` may enter beside those that train; one always may.

    Args:
        training: Jobs of the clients that train at present.
        job: Of the client that waits.
        settings: How clients train.
        device: Where the base is.
        most_clients: Largest group; None decides by tokens and memory.
        pace: What passes cost with this base; None is that of a small one.
    """
    if not training or most_clients is not None:
        return len(training) < (most_clients or 1)
    jobs = [job, *training]
    return (
        len(jobs) <= MOST_CLIENTS
        and sum(_step_tokens(job, settings) for job in jobs) <= _POOL_TOKENS.get(pace or device.type, 0)
        and sum(map(_factor_bytes, jobs)) <= _MEMORY_SHARE * _memory_bytes(device)
    )


def _step_tokens(job: GroupJob, settings: LocalTraining) -> float:
    """Return about how many tokens one optimiser step of a client has."""
    size = min(settings.batch_size * settings.gradient_accumulation_steps, len(job.examples))
    return size * sum(len(example.input_ids) for example in job.examples) / max(1, len(job.examples))


def _factor_bytes(job: GroupJob) -> int:
    adapters = (job.broadcast.trainable, job.broadcast.frozen or {})
    return _BYTES_PER_FACTOR * sum(
        factors.rank * sum(factors.shape) for adapter in adapters for factors in adapter.values()
    )


def _memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    # There may be a process a core.
    return memory_bytes() / num_cores()
