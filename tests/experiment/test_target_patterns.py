"""Patterns of client types that match no module of the base model."""

import pytest

from flexlora.experiment.base import BaseModelError
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.target_patterns import check_patterns
from flexlora.training.targets import UNREACHED, Targets

TARGETS = Targets(
    {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.mlp.up_proj": (8, 8)},
    {"model.vision_tower.fc1": UNREACHED},
)


def config_of(patterns):
    types = {"small": {"attention": 2, "ffn": 2}, "large": {"attention": 8, "ffn": 8, "patterns": patterns}}
    return parse_config({"clients": {"types": types, "distribution": {"small": 1}}}, "test")


@pytest.mark.parametrize("patterns", [{}, {r"layers\.0\.": 4}, {"q_proj$": 0}, {"vision_tower": 0}])
def test_patterns_that_decide_something_or_leave_out_what_is_left_out_pass(patterns):
    check_patterns(config_of(patterns), TARGETS)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({r"layers\.7\.": 4}, r"clients.types.large.patterns must match .* got 'layers.*7.*it matches none of the 2"),
        ({"q_porj": 0}, "got 'q_porj': it matches none of the 2, such as model.layers.0.self_attn.q_proj"),
        ({"vision_tower": 4}, f"it matches 1 that get no adapter, such as model.vision_tower.fc1 .{UNREACHED}"),
    ],
)
def test_patterns_that_match_no_module_are_refused_even_for_types_that_no_client_has(patterns, message):
    with pytest.raises(BaseModelError, match=message):
        check_patterns(config_of(patterns), TARGETS)
