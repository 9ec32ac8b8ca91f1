"""The verb ``round`` says what to do next, and a mistake ends in one line and exit code 2."""

import json
from pathlib import Path

import pytest

from flexlora.cli import app
from flexlora.verbs.leaving import guarded

CONFIG = """
clients: {types: {small: {attention: 1, ffn: 0}}, distribution: {small: 1}}
training: {max_steps: 1}
data: {name: generated, max_length: 64}
model: {num_threads: 1}
rounds: {num_rounds: 1}
"""


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = guarded(lambda: app(["round", *map(str, words)]))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_three_commands_make_a_round_and_each_says_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "federation.yaml").write_text(CONFIG)
    rows = [json.dumps({"instruction": f"say {number}", "response": f"{number}"}) for number in range(12)]
    (tmp_path / "north.jsonl").write_text("\n".join(rows))
    run, broadcast = tmp_path / "run", tmp_path / "run" / "broadcasts" / "round-0001" / "small"
    code, out, _ = call(capsys, "init", tmp_path / "federation.yaml", "--out", run)
    assert code == 0 and f"{broadcast}  (rank 1, " in out and "unsigned" in out
    code, out, _ = call(
        capsys, "train", broadcast.parent, "--rank", 1, "--data", tmp_path / "north.jsonl", "--out", tmp_path / "reply"
    )
    assert code == 0 and "Trained north on 10 examples at rank 1 for round 1" in out
    code, out, _ = call(capsys, "aggregate", run, tmp_path / "reply", tmp_path / "reply", "--json")
    told = json.loads(out)
    assert (code, told["round"], told["used"], told["broadcasts"]) == (0, 1, ["north"], None)
    assert "counts once" in told["refused"][0]["reason"]
    code, out, _ = call(capsys, "aggregate", run, tmp_path / "reply")
    assert code == 0 and "was over before" in out and "flexlora export" in out


def test_mistakes_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "federation.yaml").write_text(CONFIG)
    for words, why in (
        (("init", tmp_path / "federation.yaml", "method.name=fedsa_lora"), "method.name=fedsa_lora lets clients keep"),
        (("train", tmp_path, "--data", tmp_path / "x", "--out", tmp_path / "r", "--name", "x"), "it has none"),
        (("train", tmp_path, "--data", tmp_path / "x", "--out", tmp_path), "must not exist yet"),
        (("aggregate", tmp_path, tmp_path / "nobody"), "not there"),
    ):
        code, _, err = call(capsys, *words)
        assert code == 2 and why in " ".join(err.split()), words
    pytest.importorskip("cryptography")
    code, out, _ = call(capsys, "key", tmp_path / "north")
    assert code == 0 and str(tmp_path / "north.pub") in out
