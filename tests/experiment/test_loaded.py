"""Which modules of the base are adapted."""

import pytest

from flexlora.experiment.base import BaseModelError
from flexlora.experiment.loaded import adapted_shapes
from flexlora.federation.clients import RankPlan

SHAPES = {"l.0.q_proj": (8, 4), "l.0.up_proj": (16, 4), "l.1.q_proj": (8, 4)}


def test_a_plan_that_fits_no_module_is_named() -> None:
    with pytest.raises(BaseModelError, match=r"clients\.types\.phone adapts none of the 3 target modules"):
        adapted_shapes(SHAPES, [RankPlan("phone", (("c_attn", 4),))])
