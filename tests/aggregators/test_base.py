"""What states may be made of, derived from type hints, and the checks that methods share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch

from flexlora.aggregators.base import (
    AggregationError,
    check_state,
    require_rank_within,
    require_server_ranks,
    state_types,
    weighed,
)
from flexlora.aggregators.flexlora import FlexLora, FlexLoraState
from flexlora.federation.messages import Update
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.lora.product import Spectrum


@dataclass(frozen=True)
class Inner:
    values: tuple[LoraFactors, ...]


@dataclass(frozen=True)
class Outer:
    by_module: Mapping[str, Inner | None]
    count: int = 0


class Named(NamedTuple):
    count: int


@dataclass(frozen=True)
class Derived:
    count: int = field(default=0, init=False)


class Method(FlexLora):
    def init(self, adapter: object) -> Outer: ...  # type: ignore[override,empty-body]


SCALING = Scaling("rslora", 4.0)


def test_state_types_are_those_that_type_hints_lead_to() -> None:
    assert state_types(Method(scaling=SCALING)) == (Outer, Inner, LoraFactors)
    assert state_types(FlexLora(scaling=SCALING)) == (FlexLoraState, Spectrum)


def test_a_method_without_a_return_type_is_refused() -> None:
    class Untyped(FlexLora):
        def init(self, adapter): ...

    class Unresolved(FlexLora):
        def init(self, adapter) -> "NoSuchState": ...  # type: ignore[name-defined]

    with pytest.raises(AggregationError, match=r"Untyped\.init must have a return type"):
        state_types(Untyped(scaling=SCALING))
    with pytest.raises(AggregationError, match=r"type hints of Unresolved and of its state must resolve.*NoSuchState"):
        state_types(Unresolved(scaling=SCALING))


def test_a_state_that_a_checkpoint_cannot_hold_is_refused_by_its_part() -> None:
    factors = LoraFactors(torch.zeros(1, 2), torch.zeros(3, 1), 1.0)
    types = state_types(Method(scaling=SCALING))
    check_state(Outer({"a": Inner((factors,)), "b": None}, 3), types)
    for broken, words in (
        (Outer({"a": Inner([factors])}), "state/by_module/a/values: .*got list"),  # type: ignore[arg-type]
        (Outer({1: None}), "state/by_module: keys of mappings in a state must be strings; got 1"),  # type: ignore[dict-item]
        (Scaling("rslora", 4.0), "state: .*got Scaling"),
        (Outer({"a": Named(1)}), "state/by_module/a: .*plain tuples.*got Named"),  # type: ignore[dict-item]
        (Outer({"a": Derived()}), "state/by_module/a/count: .*init=False"),  # type: ignore[dict-item]
        (Outer({"a": {1, 2}}), "state/by_module/a: .*got set"),  # type: ignore[dict-item]
    ):
        with pytest.raises(AggregationError, match=words):
            check_state(broken, (*types, Derived))


def test_ranks_are_checked_against_the_server_by_name() -> None:
    server = {"a": LoraFactors(torch.zeros(4, 5), torch.zeros(6, 4), 1.0)}
    require_server_ranks(server, {"a": 4}, "client 'ann'")
    with pytest.raises(AggregationError, match=r"one rank per module on every client, 4 in 'a'; client 'ann' has 2"):
        require_server_ranks(server, {"a": 2}, "client 'ann'")
    require_rank_within(server["a"], "a", 4)
    for rank in (0, 5):
        with pytest.raises(AggregationError, match=rf"ranks in 1\.\.4.*'a'; got {rank}"):
            require_rank_within(server["a"], "a", rank)


def test_updates_pass_one_at_a_time_until_one_breaks_a_rule() -> None:
    passed = []
    with pytest.raises(AggregationError, match="finite weight of at least 0; got nan from 'bad'"):
        passed.extend(weighed({"a": 1}, [Update("good", {}, 1.0), Update("bad", {}, float("nan"))]))
    stream = weighed({"a": 1}, iter([Update("good", {}, 1.0), Update("bad", {}, -1.0)]))
    assert next(stream).client_id == "good"
