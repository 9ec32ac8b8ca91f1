"""What need not travel is the same wherever it is made."""

import math

import pytest
import torch
from torch import nn

from flexlora.federation.known_rows import MaskError, known_rows, mask_of, num_chosen
from flexlora.federation.messages import SparseMask


def test_a_smaller_rank_has_the_first_rows_of_a_larger_one() -> None:
    for in_features in (3, 16, 257):
        large = known_rows(7, "layer", 64, in_features)
        for rank in (1, 2, 5, 33):
            assert torch.equal(known_rows(7, "layer", rank, in_features), large[:rank])


def test_rows_depend_on_seed_and_module_and_are_drawn_as_peft_draws_them() -> None:
    rows = known_rows(7, "layer", 200, 50)
    assert not torch.equal(rows, known_rows(8, "layer", 200, 50)) and not torch.equal(rows, known_rows(7, "m", 200, 50))
    # PEFT: Kaiming-uniform with slope sqrt(5), whose bound is 1 / sqrt(in_features).
    assert rows.dtype == torch.float32 and rows.abs().max() <= 1 / math.sqrt(50)
    assert abs(float(rows.var()) - 1 / (3 * 50)) < 3e-4
    reference = nn.init.kaiming_uniform_(torch.empty(200, 50), a=math.sqrt(5))
    assert abs(float(reference.var() - rows.var())) < 5e-4


def test_the_identity_is_the_identity() -> None:
    assert torch.equal(known_rows("identity", "layer", 5, 5), torch.eye(5))


def test_everybody_draws_the_same_mask_with_exactly_its_share_of_entries() -> None:
    mask = SparseMask(0.1, 3)
    chosen = mask_of(mask, "layer", (40, 30))
    assert torch.equal(chosen, mask_of(mask, "layer", (40, 30)))
    assert chosen.sum() == num_chosen(mask, (40, 30)) == 120
    assert not torch.equal(chosen, mask_of(mask, "other", (40, 30)))
    assert not torch.equal(chosen, mask_of(SparseMask(0.1, 4), "layer", (40, 30)))
    assert mask_of(SparseMask(1e-6, 0), "layer", (4, 3)).sum() == 1 and mask_of(SparseMask(1.0, 0), "m", (4, 3)).all()


def test_every_entry_is_as_likely_as_any_other() -> None:
    times = sum(mask_of(SparseMask(0.25, seed), "layer", (4, 5)).double() for seed in range(2000))
    # Binomial: mean 500, standard deviation sqrt(2000 / 4 * 3 / 4) = 19.4.
    assert isinstance(times, torch.Tensor) and (times - 500).abs().max() < 5 * 19.4


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_a_mask_chooses_something_and_not_more_than_everything(density: float) -> None:
    with pytest.raises(MaskError, match="density of a mask must be above 0 and at most 1; got"):
        mask_of(SparseMask(density, 0), "layer", (4, 3))
