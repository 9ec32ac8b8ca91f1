"""The doctor: what it finds here, and what it says when something is missing."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexlora import cli
from flexlora.experiment import doctor
from flexlora.experiment.doctor import Finding, examine
from flexlora.verbs.leaving import EXIT_MACHINE


def test_the_doctor_names_extras_and_folders_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("ray", "in /opt/[/old]", False, "pip install 'flexlora[ray]', for clusters")]
    monkeypatch.setattr("flexlora.experiment.doctor.examine", lambda: found)
    text = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "150"}, catch_exceptions=False).stdout
    assert "in /opt/[/old]" in text and "pip install 'flexlora[ray]', for clusters" in text


def test_a_machine_that_runs_the_tests_is_fit_to_run() -> None:
    findings = {finding.check: finding for finding in examine()}
    assert not [finding for finding in findings.values() if finding.is_fatal]
    assert set(doctor.REQUIRED) | set(doctor.OPTIONAL) <= set(findings)
    assert all(finding.fix for finding in findings.values() if not finding.is_fine)
    assert findings["embedded model"].found.endswith(" MB")


def test_a_package_that_is_missing_is_fatal_and_an_extra_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package",))
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_extra": ("flexlora[some]", "something")})
    told = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert told.exit_code == EXIT_MACHINE
    found = {one["check"]: one for one in json.loads(told.stdout)}
    missing, extra = found["no-such-package"], found["no_such_extra"]
    assert (missing["is_fine"], missing["is_fatal"], missing["fix"]) == (False, True, "pip install no-such-package")
    assert (extra["is_fine"], extra["is_fatal"]) == (False, False)
    assert extra["fix"] == "pip install 'flexlora[some]', for something"


def test_a_missing_base_model_and_a_full_disk_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10**12, 10**12 - 1, 1)
    monkeypatch.setattr(doctor, "BASE_FOLDER", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    findings = {finding.check: finding for finding in examine()}
    assert findings["embedded model"].is_fatal and findings["embedded model"].fix == "reinstall flexlora"
    assert not findings["disk"].is_fine and "--out" in findings["disk"].fix


@pytest.mark.parametrize(("value", "expected"), [("1", "only local folders"), ("true", "only local")])
def test_the_offline_setting_is_understood_as_the_hub_does(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert expected in next(finding.found for finding in examine() if finding.check == "hub")


@pytest.mark.parametrize(("is_reached", "expected"), [(True, "answers"), (False, "does not answer within 2 s")])
def test_without_the_offline_setting_the_hub_is_asked(
    monkeypatch: pytest.MonkeyPatch, is_reached: bool, expected: str
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(doctor, "hub_is_reached", lambda seconds: is_reached)
    found = next(finding for finding in examine() if finding.check == "hub")
    assert expected in found.found and found.is_fine == is_reached and not found.is_fatal
