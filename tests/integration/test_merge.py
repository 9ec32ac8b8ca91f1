"""``flexlora merge`` as a process: what it prints and where, its exit codes, and what it leaves when it is killed."""

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from flexlora.adapters.folder import read_adapter
from flexlora.adapters.write import write_adapter
from flexlora.lora.factors import LoraFactors

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
STAGE = "Loading libraries\n"
PATHS = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "v_proj")]


def flexlora(*arguments: str | Path, folder: Path, columns: int = 100) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flexlora.cli", *(str(argument) for argument in arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": str(columns), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A folder with the adapters a, b and c of ranks 2, 3 and 8."""
    generator = torch.Generator().manual_seed(0)
    for name, rank in (("a", 2), ("b", 3), ("c", 8)):
        adapter = {
            path: LoraFactors(
                torch.randn(rank, 24, generator=generator), torch.randn(16, rank, generator=generator), 4 / rank
            )
            for path in PATHS
        }
        write_adapter(tmp_path / name, adapter, "us/llama")
    return tmp_path


def test_a_merge_prints_a_table_and_writes_the_weighted_mean(adapters: Path) -> None:
    done = flexlora("merge", "a", "b", "c", "--weights", "1,2,5", "--exact", "--out", "out", folder=adapters)
    assert (done.returncode, done.stderr) == (0, STAGE)
    assert "model.layers.2.self_attn.v_proj" in done.stdout and "2 + 3 + 8" in done.stdout
    assert "Wrote out: mean of 3 adapters (weights 1, 2, 5) for us/llama" in done.stdout
    given = [read_adapter(adapters / name) for name in "abc"]
    for path, factors in read_adapter(adapters / "out").items():
        expected = sum(w / 8 * adapter[path].delta().numpy() for w, adapter in zip((1, 2, 5), given, strict=True))
        np.testing.assert_allclose(factors.delta().numpy(), expected, atol=1e-5)


def test_a_pipe_gets_whole_names_and_every_column(adapters: Path) -> None:
    for arguments in (("a", "b", "--explain", "--out", "out"), ("--inspect", "a", "--explain")):
        done = flexlora("merge", *arguments, folder=adapters, columns=40)
        assert (done.returncode, done.stderr) == (0, STAGE)
        assert all(done.stdout.count(path) == (2 if "--out" in arguments else 1) for path in PATHS)
        assert "over best" in done.stdout or "spectrum" in done.stdout


def test_json_goes_to_stdout_alone(adapters: Path) -> None:
    done = flexlora(
        *("merge", "a", "b", "--method", "sum", "--weights", "-1,0.5", "--rank", "2", "--json", "--out", "out"),
        folder=adapters,
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert (result["method"], result["weights"], len(result["modules"])) == ("sum", [-1.0, 0.5], 6)
    assert all(module["rank"] == 2 and 0 < module["energy_kept"] < 1 for module in result["modules"])


def test_explain_says_how_each_module_was_decomposed(adapters: Path) -> None:
    done = flexlora("merge", "a", "b", "--energy", "0.9", "--explain", "--out", "out", folder=adapters)
    assert done.returncode == 0, done.stderr
    assert "why" in done.stdout and "best possible" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "gone", "--out", "out"), "Error: gone must be a PEFT adapter folder"),
        (("a", "us/gone", "--out", "out"), "Error: us/gone is no local folder, and the hub did not give it"),
        (("a", "torn", "--out", "out"), "Error: torn: adapter_model.safetensors is not a whole safetensors file"),
        (("a", "other", "--out", "out"), "Error: adapters must share one base model; got us/llama (a) and them"),
        (("a", "--out", "b"), "Error: --out must not exist yet; b does"),
        (("a", "--weights", "1,x", "--out", "out"), "Error: --weights must be numbers separated by commas"),
        (("a", "--rank", "2", "--exact", "--out", "out"), "Error: only one of rank, energy and exact"),
        (("a",), "Error: merging needs adapters and the folder to write"),
        (("--inspect", "a", "b"), "Error: --inspect shows one adapter"),
        (("--inspect", "a", "--rank", "2"), "Error: --inspect shows one adapter and merges nothing; got --"),
        (("--inspect", "a", "--out", "a.jpg"), "Error: --out must be a new file that ends in .svg, .png, .pdf with"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value).replace("/", "-"),
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    adapters: Path, arguments: tuple[str, ...], message: str
) -> None:
    write_adapter(adapters / "torn", read_adapter(adapters / "a"), "us/llama")
    weights = adapters / "torn" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    write_adapter(adapters / "other", read_adapter(adapters / "a"), "them/llama")
    before = sorted(adapters.rglob("*"))
    done = flexlora("merge", *arguments, folder=adapters)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.removeprefix(STAGE).startswith(message)
    assert done.stderr.removeprefix(STAGE).count("\n") == 1
    assert sorted(adapters.rglob("*")) == before


def test_an_adapter_is_inspected_with_a_picture(adapters: Path) -> None:
    done = flexlora("merge", "--inspect", "c", "--out", "pictures/c.svg", folder=adapters)
    assert (done.returncode, done.stderr) == (0, STAGE)
    assert "self_attn.q_proj  (3)" in done.stdout and "Wrote pictures/c.svg" in done.stdout
    assert "█" in done.stdout
    assert ElementTree.parse(adapters / "pictures" / "c.svg").getroot().tag.endswith("svg")
    done = flexlora("merge", "--inspect", "c", "--json", "--out", "c.png", folder=adapters)
    assert (adapters / "c.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(done.stdout)
    assert found["picture"] == "c.png"
    factors = read_adapter(adapters / "c")[PATHS[0]]
    expected = np.linalg.svd(factors.delta().numpy(), compute_uv=False)[:8]
    np.testing.assert_allclose(found["modules"][0]["singular_values"], expected, rtol=1e-6)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_merge_that_is_killed_leaves_nothing(adapters: Path, number: int, code: int) -> None:
    # The signal comes between two modules, where a person's would most likely come too.
    program = f"""
import os, sys
import flexlora.adapters.merge
decompose, done = flexlora.adapters.merge.certified_decomposition, []
def killed(*arguments, **options):
    done.append(1)
    if len(done) == 4:
        os.kill(os.getpid(), {int(number)})
    return decompose(*arguments, **options)
flexlora.adapters.merge.certified_decomposition = killed
sys.argv = ["flexlora", "merge", "a", "b", "c", "--out", "parent/out"]
from flexlora.cli import main
main()
"""
    before = sorted(adapters.rglob("*"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=adapters,
        env=environment,
        timeout=120,
        # Shells start background jobs, such as a test run may be, with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == code, done.stderr
    if code == 130:
        assert "Interrupted; nothing was written." in done.stderr
    assert sorted(adapters.rglob("*")) == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory where the system tells it")
def test_memory_does_not_grow_with_the_number_of_adapters(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "merge_memory.py", "--cases", "8x2,64x2", "--hidden", "512"]
    command += ["--spectrum", "flat", "--folder", tmp_path, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    peaks = [row["grown_bytes"] for row in json.loads(done.stdout)]
    assert list(tmp_path.iterdir()) == []
    # 56 more adapters hold 56 x 2 modules x (4 + ... + 64) x 1024 x 2 bytes, some 5 MB each: 280 MB if all were kept.
    assert peaks[1] - peaks[0] < 60e6
