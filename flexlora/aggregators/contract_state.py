"""Checks what a method is and keeps: its description, its states, what these share, and how it reads updates."""

import dataclasses

import torch

from flexlora.aggregators.base import Aggregator, check_state, state_types
from flexlora.aggregators.contract_case import Case, OneShot, initial_adapter
from flexlora.aggregators.contract_client import as_type, reply
from flexlora.aggregators.contract_compare import change_of, is_frozen, require, require_best, require_equal, tensors_of
from flexlora.aggregators.settings import options_of
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import LoraFactors


def it_describes_itself(case: Case) -> None:
    """A method is a frozen dataclass with described options, and keeps the protocol."""
    name = case.method.__name__
    require(dataclasses.is_dataclass(case.method), f"{name} must be a dataclass")
    require(is_frozen(case.method), f"{name} must be frozen: write @dataclass(frozen=True)")
    require((case.method.__doc__ or "").strip(), f"{name} needs a docstring that says what it does, with its source")
    for option_name, option in options_of(case.method).items():
        require(option.description, f"{name}.{option_name} needs a description: write option(DEFAULT, DESCRIPTION)")
    require(isinstance(case.aggregator, Aggregator), f"{name} must have init, aggregate, broadcast and spectra")
    adds = hasattr(case.aggregator, "add_changes")
    require(adds or not case.traits.adds_changes, f"{name} needs add_changes, as its traits say adds_changes")


def its_states_can_be_saved(case: Case) -> None:
    """A state holds nothing but what a checkpoint saves: frozen dataclasses, tensors as they lie in a file."""
    types = state_types(case.aggregator)
    for kind in types:
        require(is_frozen(kind), f"{kind.__name__}, part of a state, must be a frozen dataclass")
    initial = initial_adapter(case.scaling, case.server_rank, case.shapes)
    adapter = reply(Broadcast(initial), "client-0", 1.0, seed=1).payload
    by_columns = {
        module: LoraFactors(factors.A.T.contiguous().T, factors.B.T.contiguous().T, factors.scaling)
        for module, factors in adapter.items()
    }
    for make in (case.start, lambda: case.aggregator.init(by_columns), case.after_a_round):
        state = make()
        check_state(state, types)
        for name, tensor in tensors_of(state):
            require(not tensor.requires_grad, f"{name} of a state must not require a gradient")
            rows = torch.empty(tensor.shape).stride()
            require(
                tensor.stride() == rows, f"{name} of a state must be contiguous, or it rounds differently when resumed"
            )


def spectra_are_those_of_the_change(case: Case) -> None:
    """Spectra are sorted, by module and by size, and orthonormal; their product is what the largest rank receives."""
    state = case.after_a_round()
    spectra = case.aggregator.spectra(state)
    modules = sorted(case.shapes)
    require(list(spectra) == modules, f"spectra must have the modules {modules}; got {list(spectra)}")
    for module, spectrum in spectra.items():
        require((spectrum.S.diff() <= 0).all(), f"{module}: singular values must descend")
        for basis in (spectrum.U.T, spectrum.Vh):
            identity = torch.eye(basis.shape[0], dtype=torch.float64)
            require(torch.allclose(basis @ basis.T, identity, atol=1e-9), f"{module}: U and Vh must be orthonormal")
    found = change_of(case.aggregator.broadcast(state, case.all_modules(case.global_rank)))
    expected = {module: spectrum.delta().numpy() for module, spectrum in spectra.items()}
    rule = "spectra must be those of what a client of the server's rank receives"
    if case.traits.fewer_directions:
        require_best(found, expected, rule)
    else:
        require_equal(found, expected, rule)


def updates_are_read_once(case: Case) -> None:
    """Updates arrive as a stream: they are read once, one at a time, and not counted beforehand."""
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    expected = case.deltas(case.aggregator.aggregate(state, updates))
    stream = OneShot(updates)
    found = case.deltas(case.aggregator.aggregate(state, stream))
    require_equal(found, expected, "a stream of updates must give what a list gives", rtol=0.0)
    require(stream.num_readers == 1, f"updates must be read once; they were read {stream.num_readers} times")


def nothing_is_changed_or_shared(case: Case) -> None:
    """A state shares no memory with what came in or goes out, and nothing that came in is changed."""
    aggregator, adapter = case.aggregator, initial_adapter(case.scaling, case.server_rank, case.shapes)
    state = aggregator.init(adapter)
    updates = case.updates(state)
    copies = [as_type(update, torch.float32) for update in updates]
    before = case.deltas(state)
    after = aggregator.aggregate(state, updates)
    expected = case.deltas(after)
    for update, copy in zip(updates, copies, strict=True):
        for (name, tensor), (_, kept) in zip(_tensors(update), _tensors(copy), strict=True):
            require(torch.equal(tensor, kept), f"{name}: aggregate must not change the updates it is given")
    broadcast = case.broadcast(after)
    for given in (adapter, broadcast.trainable, broadcast.frozen or {}, broadcast.cores or {}):
        _overwrite(given)
    for update in updates:
        _overwrite(update.payload)
        _overwrite(update.cores or {})
    rule = "a state must not share memory with what came in or went out"
    require_equal(case.deltas(state), before, rule, rtol=0.0)
    require_equal(case.deltas(after), expected, rule, rtol=0.0)


def gradients_do_not_reach_the_state(case: Case) -> None:
    """Factors that still require a gradient leave none behind."""
    state = case.start()
    updates = case.updates(state)
    for update in updates:
        for _, tensor in _tensors(update):
            tensor.requires_grad_()
    after = case.aggregator.aggregate(state, updates)
    broadcast = case.broadcast(after)
    for name, tensor in [*tensors_of(broadcast.trainable), *tensors_of(broadcast.cores or {}), *tensors_of(after)]:
        require(not tensor.requires_grad, f"{name}: a state must not require a gradient")


def _tensors(update: Update) -> list[tuple[str, torch.Tensor]]:
    return [*tensors_of(update.payload, "payload"), *tensors_of(update.cores or {}, "cores")]


def _overwrite(tensors: object) -> None:
    for _, tensor in tensors_of(tensors):
        tensor.fill_(7)
