"""Mistakes in a path, a key or a method are told before torch is imported, and name what was meant."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexlora.cli import app
from flexlora.rounds.records import ManifestRecord, RoundRecord, append_record, write_manifest
from flexlora.verbs.group import MEANT

# What is typed, and a word of the answer. {run} is the folder of a run, {tmp} an empty one.
MISTAKES = (
    ("run nowhere.yaml", "there is no such file"),
    ("run {tmp}", "it is a folder, and a configuration is a YAML file; it holds none"),
    ("run {gone}", "name {gone}/config.yaml; to continue that run: flexlora run {gone}/config.yaml --out {gone} "),
    ("plan {run}", "a configuration is a file: name {run}/config.yaml"),
    ("plan " + 300 * "x", "there is no such file"),
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
    ("export {done} --out {new} --pad-to 7", "pad_to must be a rank that vLLM makes room for"),
    ("export {done} --out {new} --pad-to 8", "pad_to must be at least 12"),
    ("export {done} --out {new} --rank 10 --pad-to 8", "pad_to must be at least 10"),
    ("export {done} --out {new} --pad-to 16 --ranks exact", "pad_to gives all modules one rank"),
    ("export {done} --out {new} --merged --pad-to 16", "a merged model has none"),
    ("export {done} --out {new} --rank 13", "the rank must be in 1..12"),
    ("export {done} --push-to-hub ../x", "the hub id must look like org/name"),
    ("export {run} --out {new}", "has no round to take an adapter from yet"),
    ("export {gone} --out {new}", "the checkpoints of {gone} are gone: it has records of 3 rounds"),
    ("eval {gone}", "the checkpoints of {gone} are gone"),
    ("eval {done} rounds.num_rounds=9", "scoring a run again can change"),
    ("eval {done} seed=5", "got seed"),
    ("eval {done} --rank 13", "the rank must be in 1..12"),
    ("compare demo --out {done}", "holds something else than a comparison"),
    ("compare demo --out {file}", "is a file"),
    ("compare demo --jobs 100000", "--jobs must be in 1.."),
    ("merge {adapter} {adapter} --weights 1 --out {new}", "weights must be one per adapter, 2 here; got 1"),
    ("merge {adapter} {adapter} --weights 1,-1 --out {new}", "weights must be finite and positive"),
    ("merge {adapter} --energy 99 --out {new}", "energy must be a share above 0 and up to 1; got 99"),
    ("merge {adapter} --energy 0.9 --exact --out {new}", "only one of rank, energy and exact"),
    ("merge {adapter} --device gpu --out {new}", "device must be cpu, cuda or cuda:N; got gpu"),
    ("merge {adapter} --pad-to 7 --out {new}", "pad_to must be a rank that vLLM makes room for"),
    ("merge {adapter} --missing renormalise --method sum --out {new}", "use method=mean"),
    ("merge --inspect {adapter} --out {new}.txt", "--out must be a new file that ends in"),
    ("report {tmp}", "a run folder holds records.jsonl"),
    ("report {done} {tmp}", "a run folder holds records.jsonl"),
    ("report {done} {done}", "a comparison needs two different runs"),
    ("report {done} --out {new}.txt", "a file that ends in .html"),
    ("report {done} --target 101", "--target must be a ROUGE-L"),
    # A file stands where a folder is needed.
    ("run demo --out {file}/x/y", "{file} is a file; a folder is needed there"),
    ("compare demo --out {file}/x", "{file} is a file; a folder is needed there"),
    ("export {done} --out {file}/x", "{file} is a file; a folder is needed there"),
    ("merge {adapter} --out {file}/x", "{file} is a file; a folder is needed there"),
    ("merge --inspect {adapter} --out {file}/x.svg", "{file} is a file; a folder is needed there"),
    ("report {done} --out {file}/x.html", "{file} is a file; a folder is needed there"),
    ("report {done} {run} --out {file}/x.html", "{file} is a file; a folder is needed there"),
    ("init own-data {file}/x", "{file} is a file; a folder is needed there"),
    ("init own-data {half}", "data is a file; a folder is needed there"),
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
def places(tmp_path: Path, make_manifest: Callable[..., ManifestRecord]) -> dict[str, str]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "data").write_text("text")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "b", "target_modules": ["q"]}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    for name in ("done", "gone"):
        _write_run(tmp_path / name, make_manifest)
    (tmp_path / "done" / "checkpoints" / "round-0003").mkdir(parents=True)
    names = {name: str(tmp_path / name) for name in ("run", "done", "gone", "half", "adapter", "new")}
    return {**names, "tmp": str(tmp_path / "empty"), "file": str(tmp_path / "file.txt")}


def _write_run(folder: Path, make_manifest: Callable[..., ManifestRecord]) -> None:
    """Write what a run of 3 rounds leaves, whose server has rank 12 in one module and 4 in another."""
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1\n")
    manifest = make_manifest(num_rounds=3, plan_ranks={"small": {"q": 2, "v": 1}, "large": {"q": 12, "v": 4}})
    write_manifest(folder / "manifest.json", manifest)
    for number in range(4):
        append_record(folder / "records.jsonl", RoundRecord(server_round=number))


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
        if not answer.startswith("2 ") or word.format(**places) not in answer or "LOADED" in answer
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
