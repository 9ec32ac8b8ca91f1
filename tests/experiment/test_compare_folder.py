"""What the folder of a comparison takes up, what it refuses, and what it never mixes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexlora.experiment.compare import _in_known_order
from flexlora.experiment.compare_arms import CompareError, read_arms
from flexlora.experiment.compare_folder import append_rows, known_distributions, locked_comparison, open_comparison
from flexlora.experiment.compare_jobs import Study
from flexlora.experiment.compare_study import make_study

DEMO = "configs/demo.yaml"
OWN_METHOD = """
from dataclasses import dataclass
from flexlora import Traits, aggregation_method


@aggregation_method("own")
@dataclass(frozen=True)
class Own:
    scaling: object
    traits = Traits(needs_one_rank=True)
"""


def study(methods: str = "flexlora", *overrides: str, **changes: Any) -> Study:
    settings: dict[str, Any] = {"draws": 2, "with_controls": False}
    return make_study(DEMO, overrides, read_arms(methods), **(settings | changes))


def row(draw: int, failure: str | None = None) -> dict[str, Any]:
    return {
        "kind": "run",
        "phase": "test",
        "draw": draw,
        "seed": 1000 + draw,
        "distribution": "configured",
        "arm": "flexlora",
        "learning_rate": 0.1,
        "rounds": 1,
        "curve": [],
        "failure": failure,
    }


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Returns a function that opens one folder for a comparison."""

    def open_it(of: Study, **options: Any) -> list[dict[str, Any]]:
        with locked_comparison(tmp_path / "cmp"):
            return open_comparison(of, tmp_path / "cmp", **({"overwrite": False} | options))

    return open_it


def test_two_comparisons_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        locked_comparison(tmp_path / "cmp"),
        pytest.raises(CompareError, match="is running"),
        locked_comparison(tmp_path / "cmp"),
    ):
        pass
    with locked_comparison(tmp_path / "cmp"):
        pass


def test_a_folder_of_something_else_or_a_file_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("{}")
    with pytest.raises(CompareError, match="something else"), locked_comparison(tmp_path):
        pass
    with pytest.raises(CompareError, match="is a file"), locked_comparison(tmp_path / "records.jsonl"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_methods_draws_and_distributions_may_be_added(opened: Any) -> None:
    opened(study())
    opened(study("flexlora,aligned", draws=5, distributions=["configured", "uniform"]))
    opened(study("flexlora"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda: study("flexlora", "training.batch_size=2"), "training.batch_size differ"),
        (lambda: study(trials=7), "--trials differ"),
        (lambda: study("flexlora:fold_tail=true"), None),
        (lambda: study("flexlora=flexlora:fold_tail=true"), "another flexlora .method.fold_tail"),
        (lambda: study("flexlora", "data.cache=elsewhere"), None),
    ],
)
def test_what_changed_is_named(opened: Any, changed: Callable[[], Study], message: str | None) -> None:
    opened(study())
    if message is None:
        opened(changed())
        return
    with pytest.raises(CompareError, match=message):
        opened(changed())


def test_a_method_file_that_changed_is_another_arm(opened: Any, tmp_path: Path) -> None:
    own_method = tmp_path / "own.py"
    own_method.write_text(OWN_METHOD)
    opened(study(f"own:path={own_method}:clients=smallest"))
    own_method.write_text(own_method.read_text() + "\n# another\n")
    with pytest.raises(CompareError, match="code differ"):
        opened(study(f"own:path={own_method}:clients=smallest"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": "a", "arms": [3], "distributions": []}', "\x00"])
def test_a_damaged_description_is_named_and_can_be_overwritten(opened: Any, tmp_path: Path, content: str) -> None:
    opened(study())
    (tmp_path / "cmp/study.json").write_text(content)
    with pytest.raises(CompareError, match="study\\.json is damaged"):
        opened(study())
    assert opened(study(), overwrite=True) == []


def test_overwriting_forgets_checkpoints_too(opened: Any, tmp_path: Path) -> None:
    opened(study())
    stale = tmp_path / "cmp/scratch/test-0"
    stale.mkdir(parents=True)
    append_rows(tmp_path / "cmp", [row(0)])
    assert opened(study("flexlora", "training.batch_size=2"), overwrite=True) == []
    assert not stale.exists()


def test_failed_runs_are_made_again_only_if_asked(opened: Any, tmp_path: Path) -> None:
    opened(study())
    append_rows(tmp_path / "cmp", [row(0), row(1, "a bug")])
    assert len(opened(study())) == 2
    assert [one["draw"] for one in opened(study(), retry_failed=True)] == [0]
    assert [one["draw"] for one in opened(study())] == [0]


def test_the_configuration_lies_beside_the_rows(opened: Any, tmp_path: Path) -> None:
    of = study("flexlora", "training.batch_size=2")
    opened(of)
    assert "batch_size: 2" in (tmp_path / "cmp/config.yaml").read_text()
    assert json.loads((tmp_path / "cmp/study.json").read_text())["config"] == of.settings


def test_runs_of_earlier_sittings_go_on_serving_distributions_that_are_named_before_them(
    opened: Any, tmp_path: Path
) -> None:
    opened(study(distributions=["normal"]))
    later = _in_known_order(study(distributions=["uniform", "normal"]), known_distributions(tmp_path / "cmp"))
    assert later.distributions == ("normal", "uniform")


def test_settings_that_came_later_have_their_defaults_in_earlier_folders(opened: Any, tmp_path: Path) -> None:
    def rewrite(every: int) -> None:
        """Let the folder look as an earlier version wrote it, which had not all settings."""
        known = json.loads((tmp_path / "cmp/study.json").read_text(encoding="utf-8"))
        config = yaml.safe_load(known["config"])
        for name in ("fedit_largest_reference", "large_alone_learning_rate"):
            config["evaluation"].pop(name, None)
        config["evaluation"]["every"] = every
        (tmp_path / "cmp/study.json").write_text(json.dumps({**known, "config": yaml.safe_dump(config)}))

    of = make_study("configs/study.yaml", [], read_arms("flexlora"), draws=1)
    opened(of)
    rewrite(every=4)
    assert opened(of) == []
    rewrite(every=5)
    with pytest.raises(CompareError, match="evaluation\\.every differ"):
        opened(of)
