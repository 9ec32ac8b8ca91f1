"""Chooses at random which directions of the server's factors a client trains in a round, so that it can be repeated."""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor

from flexlora.aggregators.base import AggregationError
from flexlora.federation.messages import Update
from flexlora.federation.streams import stream
from flexlora.lora.factors import AdapterState


def seed_of(adapter: AdapterState) -> int:
    """Return 63 bits that depend on the initial ``A`` and on nothing else: the seed of a method's own choices.

    A run with another seed starts from another ``A``, so its choices differ too, without an option to set.
    """
    digest = hashlib.sha256()
    for module in sorted(adapter):
        rows = adapter[module].A.detach().to("cpu", torch.float32).contiguous()
        digest.update(module.encode())
        digest.update(rows.numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def chosen_directions(
    seed: int, server_round: int, client_id: str, module: str, server_rank: int, rank: int
) -> Int[Tensor, " rank"]:
    """Return ``rank`` different directions out of ``0..server_rank - 1``, ascending, each set as likely as any other.

    Args:
        seed: Of the run, as ``seed_of`` returns it.
        server_round: As the state counts rounds.
        client_id: Every client of a round draws for itself.
        module: Every module draws for itself.
        server_rank: Number of directions there are, at least ``rank``.
        rank: Number of directions to choose.
    """
    order = stream(seed, "directions", server_round, client_id, module).permutation(server_rank)
    return torch.tensor(sorted(order[:rank].tolist()), dtype=torch.int64)


def sender_of(update: Update) -> str:
    """Return the client id of an update, from which its choice of directions is repeated.

    Raises:
        AggregationError: If a step of the uplink has folded several clients into one update.
    """
    if update.client_id is None:
        raise AggregationError(
            "this method needs to know which client sent an update, because each trains directions of its own; got a "
            "sum of several clients. Leave secure sums out or choose another method, such as flexlora"
        )
    return update.client_id
