"""The contract finds what is wrong with a method, and names it."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from flexlora.aggregators.fedit import FedIt, FedItState
from flexlora.aggregators.flexlora import FlexLora, FlexLoraState
from flexlora.aggregators.settings import Traits
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import LoraFactors
from flexlora.testing import ContractError, check_method


def test_methods_of_the_package_pass() -> None:
    check_method(FedIt)
    check_method(FlexLora, error_compensation=True, fold_tail=True)


@dataclass(frozen=True)
class Undescribed(FedIt):
    """FedIT with an option that nobody can understand."""

    momentum: float = 0.0


@dataclass(frozen=True)
class FirstClientOnly(FedIt):
    """Takes the first client for all of them."""

    def aggregate(self, state: FedItState, updates: Iterable[Update]) -> FedItState:
        first = next(iter(list(updates)))
        return FedIt.aggregate(self, state, [first])


@dataclass(frozen=True)
class CountsClients(FedIt):
    """Weighs all clients alike."""

    def aggregate(self, state: FedItState, updates: Iterable[Update]) -> FedItState:
        return FedIt.aggregate(self, state, [replace(update, weight=1.0) for update in updates])


@dataclass(frozen=True)
class ForgetsScaling(FlexLora):
    """Leaves out alpha / r on arrival."""

    def aggregate(self, state: FlexLoraState, updates: Iterable[Update]) -> FlexLoraState:
        return FlexLora.aggregate(self, state, [replace(u, payload=_unscaled(u)) for u in updates])


@dataclass(frozen=True)
class ServesFullRank(FlexLora):
    """Never applies the rank of a client."""

    def broadcast(self, state: FlexLoraState, ranks: Any) -> Broadcast:
        return FlexLora.broadcast(self, state, dict.fromkeys(ranks, 5))


@dataclass(frozen=True)
class ReadsTwice(FedIt):
    """Looks at the updates once before it averages them."""

    def aggregate(self, state: FedItState, updates: Iterable[Update]) -> FedItState:
        if sum(1 for _ in updates) == 0:
            raise ValueError("nobody came")
        return FedIt.aggregate(self, state, updates)


@dataclass(frozen=True)
class SharesMemory(FedIt):
    """Hands out the server's own tensors."""

    def broadcast(self, state: FedItState, ranks: Any) -> Broadcast:
        sent = FedIt.broadcast(self, state, ranks).trainable
        for module, factors in sent.items():
            kept = self._cache().setdefault(module, factors)
            sent[module].A.copy_(kept.A) if kept is not factors else None
        return Broadcast({module: self._cache()[module] for module in sent})

    def _cache(self) -> dict[str, LoraFactors]:
        return _CACHE


_CACHE: dict[str, LoraFactors] = {}


@dataclass(frozen=True)
class Boasts(FedIt):
    """Claims what averaging factors is not."""

    traits = Traits(needs_one_rank=True, linear_in_products=True)


@dataclass(frozen=True)
class ListState:
    values: list[int]


@dataclass(frozen=True)
class KeepsLists(FedIt):
    """Holds a list in its state."""

    def init(self, adapter: Any) -> ListState:  # type: ignore[override]
        return ListState([1])


def _unscaled(update: Update) -> dict[str, LoraFactors]:
    return {module: LoraFactors(factors.A, factors.B, 1.0) for module, factors in update.payload.items()}


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (object, "object must be a dataclass"),
        (Undescribed, r"Undescribed\.momentum needs a description"),
        (FirstClientOnly, "the order of clients must not matter"),
        (CountsClients, "a client of weight 0 must change nothing"),
        (ForgetsScaling, "one client must get back what it sent"),
        (ServesFullRank, r"A and B at rank 1 must have the shapes"),
        (ReadsTwice, "updates must be|got ValueError|add up to more than 0"),
        (Boasts, "linear_in_products: factors"),
        (KeepsLists, "got list|state"),
    ],
)
def test_a_broken_method_is_found_by_the_rule_it_breaks(method: type, words: str) -> None:
    with pytest.raises((ContractError, ValueError), match=words):
        check_method(method)


def test_a_method_that_is_not_frozen_or_has_no_docstring_is_told_so() -> None:
    @dataclass
    class Loose:
        """Not frozen."""

        scaling: object

    with pytest.raises(ContractError, match=r"Loose must be frozen: write @dataclass\(frozen=True\)"):
        check_method(Loose)
    nameless = dataclasses.make_dataclass("Nameless", [("scaling", object)], frozen=True)
    nameless.__doc__ = None
    with pytest.raises(ContractError, match="Nameless needs a docstring"):
        check_method(nameless)


def test_gradients_and_strides_of_states_are_checked() -> None:
    @dataclass(frozen=True)
    class Columns(FedIt):
        """Keeps its tensors by columns."""

        def init(self, adapter: Any) -> FedItState:
            state = FedIt.init(self, adapter)
            turned = {m: LoraFactors(f.A.T.contiguous().T, f.B, f.scaling) for m, f in state.adapter.items()}
            return FedItState(turned)

    with pytest.raises(ContractError, match="must be contiguous"):
        check_method(Columns)
    assert torch.zeros(1) == 0
