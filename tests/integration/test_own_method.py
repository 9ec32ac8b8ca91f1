"""The example of docs/own-method.md does what its page says: checked, run, killed, resumed, exported, reported."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own-method.md").read_text(encoding="utf-8")
SMALL = [
    "data.num_clients=60",
    "data.num_unseen_tasks=8",
    "data.test_examples_per_task=2",
    "data.validation_examples=16",
    "rounds.cohort_size=4",
    "rounds.num_rounds=6",
    "training.max_steps=1",
    "evaluation.every=6",
    "evaluation.max_new_tokens=4",
    "evaluation.rank_group_clients=0",
    "evaluation.local_only_clients=0",
    "evaluation.fedit_reference=false",
    "evaluation.fedit_largest_reference=false",
    "evaluation.large_alone_reference=false",
    "model.num_processes=1",
    "clients.distribution={type2: 1}",
]

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def method(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page's file, written where its reader would."""
    path = tmp_path_factory.mktemp("researcher") / "median_b.py"
    path.write_text(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0], encoding="utf-8")
    return path


def flexlora(*arguments: object, at: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flexlora.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=at, check=False)


def bytes_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}


def test_the_method_keeps_the_contract(method: Path) -> None:
    (check,) = re.findall(r"python -c \"(.*)\"", PAGE)
    done = subprocess.run([sys.executable, "-c", check], cwd=method.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_the_page_says_of_a_forgotten_check_is_what_happens(method: Path) -> None:
    broken = re.sub(r"\n +require_server_ranks\([^\n]*", "", method.read_text(encoding="utf-8"))
    folder = method.parent / "broken"
    folder.mkdir()
    (folder / "median_b.py").write_text(broken, encoding="utf-8")
    (check,) = re.findall(r"python -c \"(.*)\"", PAGE)
    done = subprocess.run([sys.executable, "-c", check], cwd=folder, capture_output=True, text=True, check=False)
    (words,) = re.findall(r"answers «(.*?)»", PAGE.replace("\n", " "))
    assert done.returncode == 1 and words in done.stderr


def test_a_run_with_it_is_killed_and_resumed_to_the_same_bytes_and_reported(method: Path) -> None:
    at = method.parent
    run = ["run", ROOT / "configs" / "demo.yaml", "method.path=median_b.py", "method.name=median_b", *SMALL]
    whole = flexlora(*run, "--out", "whole", "--quiet", "--json", at=at)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "flexlora.cli", *map(str, run), "--out", "killed", "--quiet"]
    with subprocess.Popen(command, cwd=at, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (at / "killed" / "checkpoints" / "round-0002").is_dir():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    resumed = flexlora(*run, "--out", "killed", "--resume", "--quiet", at=at)
    assert resumed.returncode == 0, resumed.stderr
    assert bytes_of(at / "killed") == bytes_of(at / "whole")
    manifest = json.loads((at / "killed" / "manifest.json").read_text())
    assert manifest["method"] == "median_b" and "median_b.py" in manifest["packages"]
    assert "median_b" in (at / "killed" / "report.html").read_text(encoding="utf-8")
    # Only B has moved: A is as the first round was sent it.
    records = [json.loads(line) for line in (at / "killed" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 7 and records[-1]["num_ok"] == 4
    exported = flexlora("export", "killed", "--rank", 2, "--out", "adapter", at=at)
    assert exported.returncode == 0, exported.stderr


def test_a_changed_file_is_noticed_when_resuming_and_a_lost_one_is_named(method: Path) -> None:
    at = method.parent
    run = [
        "run",
        ROOT / "configs" / "demo.yaml",
        "method.path=changing.py",
        "method.name=median_b",
        *SMALL,
        "rounds.num_rounds=1",
    ]
    changing = at / "changing.py"
    changing.write_text(method.read_text(encoding="utf-8"), encoding="utf-8")
    assert flexlora(*run, "--out", "changed", "--quiet", at=at).returncode == 0
    changing.write_text(method.read_text(encoding="utf-8") + "\n# another word\n", encoding="utf-8")
    again = flexlora(*run, "rounds.num_rounds=2", "--out", "changed", "--resume", "--quiet", at=at)
    assert again.returncode == 0, again.stderr
    warnings = json.loads((at / "changed" / "manifest.json").read_text())["warnings"]
    assert any("Resumed with changing.py" in warning for warning in warnings)
    changing.unlink()
    lost = flexlora("export", "changed", "--out", "adapter-2", at=at)
    assert lost.returncode == 2 and "method.path: there is no file changing.py in " in lost.stderr


def test_mistakes_in_its_settings_are_told_before_anything_is_loaded(method: Path) -> None:
    run = ["run", ROOT / "configs" / "demo.yaml", "method.path=median_b.py", "method.name=median_b", "--out", "wrong"]
    wrong = flexlora(*run, "method.momentum=0.5", at=method.parent)
    assert wrong.returncode == 2 and "method.momentum: there is no such setting" in wrong.stderr
    several = flexlora(*run, "data.num_clients=20", at=method.parent)
    assert several.returncode == 2 and "method.name=median_b needs one rank for all clients" in several.stderr
