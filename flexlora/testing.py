"""Checks code of other people: whether an aggregation method keeps what the rest of the package relies on."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from flexlora.aggregators.base import state_types
from flexlora.aggregators.contract import CHECKS
from flexlora.aggregators.contract_case import SCALINGS, Case
from flexlora.aggregators.contract_client import reply
from flexlora.aggregators.contract_compare import ContractError, require, tensors_of
from flexlora.aggregators.contract_messages import sent
from flexlora.aggregators.measures import floats_down, floats_up
from flexlora.rounds.checkpoint import Checkpoint, load_latest, save_checkpoint
from flexlora.uplink.wire import encode_broadcast, encode_update

__all__ = ["ContractError", "check_method"]


def check_method(method: type[Any], **options: Any) -> None:
    """Raise unless an aggregation method keeps the contract of ``flexlora.aggregators.contract``.

    Every check runs under the three scaling rules, with unequal ranks, ``lora_alpha != rank``, modules that are not
    square or missing, and a checkpoint on disk. Takes some seconds.

    Args:
        method: A frozen dataclass with ``scaling`` and the functions of ``flexlora.aggregators.base.Aggregator``.
        options: Of the method; those left out have their defaults.

    Raises:
        ContractError: Naming the rule that is broken, and what was found.
    """
    for scaling in SCALINGS:
        case = Case(method, options, scaling)
        for check in CHECKS:
            check(case)
        its_checkpoints_come_back(case)
        messages_have_the_size_that_their_fields_say(case)


def its_checkpoints_come_back(case: Case) -> None:
    """A state that was saved and read back is the same bits.

    Raises:
        ContractError: Naming a tensor that changed.
    """
    for server_round, state in enumerate((case.start(), case.after_a_round())):
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), Checkpoint(server_round, state, {}), keep=1)
            found = load_latest(Path(folder), state_types(case.aggregator))
            require(found is not None, "a checkpoint must be readable")
            before, after = dict(tensors_of(state)), dict(tensors_of(found.state if found else None))
            require(before.keys() == after.keys(), "a checkpoint must hold every tensor of a state")
            for name, tensor in before.items():
                require(torch.equal(tensor, after[name]), f"{name} must come back from a checkpoint as it was")


def messages_have_the_size_that_their_fields_say(case: Case) -> None:
    """What travels of broadcasts and updates is what the other end cannot make, counted by formula.

    Raises:
        ContractError: Naming the message and both sizes.
    """
    for plan, broadcast in sent(case, 2):
        update = reply(broadcast, "client-0", 1.0, seed=0)
        for name, blob, floats in (
            ("a broadcast", encode_broadcast(broadcast, "float32"), floats_down(broadcast)),
            ("an update", encode_update(update, broadcast, "float32"), floats_up(broadcast)),
        ):
            found = len(_numbers_in(blob))
            require(found == 4 * floats, f"{name} at ranks {plan} must have {4 * floats} bytes of numbers; got {found}")


def _numbers_in(blob: bytes) -> bytes:
    """Return a safetensors blob without its header, whose length is in the first eight bytes."""
    return blob[8 + int.from_bytes(blob[:8], "little") :]
