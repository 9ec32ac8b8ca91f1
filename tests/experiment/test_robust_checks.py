"""Settings that a robust rule does not fit are refused, each with what to change."""

import pytest

from flexlora.experiment.config import Config
from flexlora.experiment.robust_checks import robust_disagreements


def problems(robust: dict[str, object] | None, **sections: object) -> str:
    rounds = {"robust": robust, "cohort_size": 12, **sections.pop("rounds", {})}  # type: ignore[dict-item]
    return "\n".join(robust_disagreements(Config.model_validate({"rounds": rounds, **sections})))


@pytest.mark.parametrize("rule", ["norm_bound", "krum", "multi_krum", "trimmed_mean", "median_of_means"])
def test_every_rule_fits_methods_that_send_whole_changes(rule: str) -> None:
    assert problems({"rule": rule}, method={"name": "flexlora"}) == ""
    assert problems(None) == ""


@pytest.mark.parametrize(
    ("robust", "sections", "named"),
    [
        ({"rule": "krum"}, {"privacy": {"differential": {"clip": 1, "noise_multiplier": 1}}}, "set one of the two"),
        (
            {"rule": "krum"},
            {"privacy": {"secure_sum": {}}},
            "rule=krum compares the clients of a cohort",
        ),
        ({"rule": "krum"}, {"clock": {"policy": "async"}}, "set another clock.policy"),
        ({"rule": "krum"}, {"method": {"name": "ffa_lora"}}, "method.name=ffa_lora sends less"),
        ({"rule": "norm_bound"}, {"method": {"name": "het_lora"}}, "choose one of aligned, fedit, flexlora"),
        ({"rule": "krum", "max_norm": 2}, {}, "rounds.robust.max_norm=2 is for rule=norm_bound alone"),
        ({"rule": "krum", "num_malicious": 5}, {}, "rounds.cohort_size must be at least 13"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    robust: dict[str, object], sections: dict[str, object], named: str
) -> None:
    assert named in problems(robust, **sections)
