"""Weights become the shares of a mean or stay as they are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from transformers import (
    PreTrainedModel,
)

from flexlora.adapters.coefficients import COEFFICIENTS
from flexlora.adapters.merge import merge
from flexlora.verbs.merge import merge as merge_verb

Helper = Callable[..., Any]
Check = Callable[..., None]


def test_a_missing_module_counts_as_unchanged_or_is_left_out_of_the_mean(
    network: PreTrainedModel,
    mixed: list[Path],
    tmp_path: Path,
    deltas: Helper,
    dense_sum: Helper,
    assert_same_changes: Check,
) -> None:
    weights = (1.0, 2.0, 5.0)
    zero = merge(mixed, weights, exact=True, out=tmp_path / "zero")
    merge(mixed, weights, exact=True, missing="renormalise", out=tmp_path / "renormalise")
    changes = [deltas(network, folder) for folder in mixed]
    unchanged = dense_sum(changes, [weight / 8 for weight in weights])
    assert_same_changes(deltas(network, tmp_path / "zero"), unchanged)
    having = {
        path: sum(weight for change, weight in zip(changes, weights, strict=True) if path in change)
        for path in unchanged
    }
    assert set(having.values()) == {2.0, 3.0, 7.0, 8.0}
    averaged = {path: matrix * 8 / having[path] for path, matrix in unchanged.items()}
    assert_same_changes(deltas(network, tmp_path / "renormalise"), averaged)
    assert any("modules are missing in some adapters, which count as unchanged" in note for note in zero.notes)


@pytest.mark.parametrize("weights", [(1e308, 1e308), (5e-324, 5e-324)])
def test_weights_whose_sum_leaves_the_range_of_numbers_are_still_shares(
    plain: Path,
    tmp_path: Path,
    network: PreTrainedModel,
    weights: Sequence[float],
    deltas: Helper,
    assert_same_changes: Check,
) -> None:
    for missing in ("zero", "renormalise"):
        merge([plain, plain], weights, missing=missing, out=tmp_path / missing)
        assert_same_changes(deltas(network, tmp_path / missing), deltas(network, plain))


def test_the_command_line_offers_every_method() -> None:
    assert get_args(get_type_hints(merge_verb)["method"]) == tuple(COEFFICIENTS)
