"""Settings that differential privacy does not fit are refused before anything is loaded, each with what to change."""

import pytest

from flexlora.experiment.config import Config
from flexlora.experiment.differential_checks import differential_disagreements

PRIVATE = {"clip": 1.0, "noise_multiplier": 1.0}


def test_secure_sums_show_no_change_to_clip_and_need_cohorts_of_one_size() -> None:
    made = Config.model_validate(
        {"privacy": {"differential": PRIVATE, "secure_sum": {}}, "rounds": {"sampling": "poisson"}}
    )
    found = "\n".join(differential_disagreements(made))
    assert "privacy.differential clips each client's change at the server" in found
    assert "set rounds.sampling=fixed or privacy.secure_sum=null" in found


def problems(differential: dict[str, object] | None = None, **sections: object) -> str:
    made = Config.model_validate({"privacy": {"differential": differential}, **sections})
    return "\n".join(differential_disagreements(made))


@pytest.mark.parametrize("method", ["flexlora", "aligned", "fedit"])
def test_methods_that_take_clipped_changes_fit(method: str) -> None:
    pytest.importorskip("dp_accounting")
    assert problems(PRIVATE, method={"name": method}) == ""
    assert problems() == ""


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ({"name": "het_lora"}, "method.name=het_lora, as it is set, has none"),
        ({"name": "aligned", "holder_exponent": 1.0}, "choose one of aligned, fedit, flexlora"),
        ({"name": "flexlora", "most_directions": 64}, "one client's share of a round has a bound"),
    ],
)
def test_methods_in_which_a_client_has_no_bound_are_refused_by_name(method: dict[str, object], named: str) -> None:
    assert named in problems(PRIVATE, method=method)


@pytest.mark.parametrize(
    ("differential", "sections", "named"),
    [
        ({"clip": 1.0}, {}, "needs noise_multiplier, target_epsilon or both"),
        (PRIVATE, {"rounds": {"patience": 2}}, "set rounds.patience=null"),
        (PRIVATE, {"rounds": {"min_updates": 2}}, "set rounds.min_updates=1"),
        (PRIVATE, {"devices": {"profiles": "built_in"}}, "set devices.profiles=null"),
        (None, {"devices": {"profiles": "built_in"}, "rounds": {"sampling": "poisson"}}, "rounds.sampling=fixed"),
        ({**PRIVATE, "adaptive": {"count_noise": 0.5}}, {}, "above half of noise_multiplier, 0.5; got 0.5"),
    ],
)
def test_settings_that_would_break_the_guarantee_are_refused(
    differential: dict[str, object] | None, sections: dict[str, object], named: str
) -> None:
    assert named in problems(differential, **sections)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexlora.experiment.differential_checks.find_spec", lambda name: None)
    assert "pip install 'flexlora[privacy]'" in problems(PRIVATE)
