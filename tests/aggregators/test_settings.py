"""Options and traits of methods."""

from dataclasses import dataclass
from typing import Literal

import pytest

from flexlora.aggregators.settings import Option, Traits, option, options_of, traits_of


@dataclass(frozen=True)
class Described:
    scaling: object
    momentum: float = option(0.5, "Share kept.", ge=0, lt=1)
    split: Literal["b", "balanced"] = option("b", "Where values go.")
    plain: int | None = None


def test_every_field_but_the_scaling_is_an_option() -> None:
    assert options_of(Described) == {
        "momentum": Option(float, 0.5, "Share kept.", {"ge": 0, "lt": 1}),
        "split": Option(Literal["b", "balanced"], "b", "Where values go.", {}),
        "plain": Option(int | None, None, "", {}),
    }


def test_an_option_without_a_default_is_refused_with_the_remedy() -> None:
    @dataclass(frozen=True)
    class Bare:
        scaling: object
        momentum: float

    with pytest.raises(TypeError, match=r"Bare\.momentum needs a default: write option\(DEFAULT, DESCRIPTION\)"):
        options_of(Bare)


def test_a_class_that_is_no_dataclass_and_an_unknown_rule_are_refused() -> None:
    with pytest.raises(TypeError, match="object must be a dataclass"):
        options_of(object)
    with pytest.raises(TypeError, match=r"rules of an option must be among gt, ge.*got least"):
        option(1, "A number.", least=0)


def test_traits_may_depend_on_options_or_be_left_out() -> None:
    class Switched:
        def __init__(self, folds: bool) -> None:
            self.folds = folds

        @property
        def traits(self) -> Traits:
            return Traits(folds_tail=self.folds)

    assert traits_of(Switched(True)).folds_tail
    assert not traits_of(Switched(False)).folds_tail
    assert traits_of(Described(None)) == Traits()


def test_traits_of_another_kind_are_refused() -> None:
    class Wrong:
        traits = ("needs_one_rank",)

    with pytest.raises(TypeError, match="must be a Traits object; got tuple"):
        traits_of(Wrong())
