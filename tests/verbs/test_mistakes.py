"""Mistakes in a path, a key or a method are told before torch is imported, and name what was meant."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexlora.cli import app
from flexlora.verbs.group import MEANT

# What is typed, and a word of the answer. {run} is the folder of a run, {tmp} an empty one.
MISTAKES = (
    ("run nowhere.yaml", "there is no such file"),
    ("run {tmp}", "there is no such file"),
    ("run demo rounds.num_round=3", "did you mean num_rounds?"),
    ("run demo method.name=flexlra", "did you mean flexlora?"),
    ("run demo model.name_or_path=/no/where", "there is no folder /no/where"),
    ("run demo devices.profiles=no.csv", "there is no file no.csv"),
    ("run demo --out {run}", "already holds a run"),
    ("run demo --out {tmp}/new --resume", "there is no run to resume"),
    ("run demo training.momentum=0.5", "training.momentum is 0.5"),
    ("plan nowhere.yaml", "there is no such file"),
    ("plan demo data.nam=x", "did you mean name?"),
    ("compare nowhere.yaml", "there is no such file"),
    ("compare demo --methods flexlra", "did you mean flexlora?"),
    ("compare demo --reference nobody", "--reference must be the label of an arm"),
    ("export {tmp} --out {tmp}/new", "the folder of a run holds a config.yaml"),
    ("export {run} --out {tmp}", "must not exist yet"),
    ("eval {tmp}", "the folder of a run holds a config.yaml"),
    ("eval {run} evaluation.evry=2", "did you mean every?"),
    ("merge {tmp} {tmp} --out {tmp}/new", "must be a PEFT adapter folder"),
    ("merge a/b/c --out {tmp}/new", "must be a PEFT adapter folder"),
    ("merge {tmp} --out {tmp}", "must be a PEFT adapter folder"),
    ("merge a b", "merging needs adapters and the folder to write"),
    ("merge a/b --weights x --out {tmp}/new", "--weights must be numbers"),
    ("merge --inspect {tmp}", "must be a PEFT adapter folder"),
    ("report {tmp}/new", "there is no folder"),
    ("methods nosuch", "must be"),
)

ALL_IN_ONE = """
import io, sys
from contextlib import redirect_stderr
from flexlora.verbs.leaving import guarded
from flexlora import cli
from flexlora.verbs import terminal
for line in sys.stdin.read().splitlines():
    terminal.err.file = io.StringIO()
    sys.argv = ["flexlora", *line.split()]
    code = guarded(cli.app)
    heavy = {"torch", "transformers", "scipy", "matplotlib"} & sys.modules.keys()
    print(code, " ".join(terminal.err.file.getvalue().split()), *(f"LOADED {name}" for name in heavy))
"""


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    return {"run": str(tmp_path / "run"), "tmp": str(tmp_path / "empty")}


def test_mistakes_are_told_without_torch(places: dict[str, str], tmp_path: Path) -> None:
    typed = [line.format(**places) for line, _ in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", ALL_IN_ONE],
        input="\n".join(typed),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    answers = done.stdout.splitlines()
    assert len(answers) == len(MISTAKES), done.stderr
    wrong = [
        (line, answer)
        for (line, word), answer in zip(MISTAKES, answers, strict=True)
        if not answer.startswith("2 ") or word not in answer or "LOADED" in answer
    ]
    assert wrong == []


def test_a_mistake_takes_little_time() -> None:
    # In seconds of the processor: others may use it too while tests run.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "flexlora.cli", "run", "demo", "lora.rank=8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and "clients.types" in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


def test_the_version_is_told_alone_and_at_once() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    import flexlora

    assert done.stdout == f"flexlora {flexlora.__version__}\n"


@pytest.mark.parametrize("typed", ["train", "Train", "finetune", "evaluate", "average", "resume"])
def test_another_word_for_a_verb_is_answered_by_the_verb(typed: str) -> None:
    done = CliRunner().invoke(app, [typed, "demo"], env={"COLUMNS": "150"})
    assert done.exit_code == 2
    assert f"Did you mean 'flexlora {MEANT[typed.lower()]}'?" in done.stderr


def test_what_other_words_stand_for_exists() -> None:
    verbs = {command.name for command in app.registered_commands}
    assert not MEANT.keys() & verbs
    assert {meant.split()[0] for meant in MEANT.values()} <= {*verbs, "--version", "--help"}


def test_a_misspelt_verb_is_answered_by_the_nearest() -> None:
    done = CliRunner().invoke(app, ["exprot"], env={"COLUMNS": "150"})
    assert done.exit_code == 2 and "Did you mean 'export'?" in done.stderr
