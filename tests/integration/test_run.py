"""Whole runs: real processes, the embedded base, what is left behind, and being killed."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexlora.data.pretraining import BASE_FOLDER
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import load_config
from flexlora.experiment.run import run_experiment
from flexlora.federation.messages import Broadcast
from flexlora.uplink.wire import encode, encode_broadcast

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SMALL = (
    "data.num_clients=24",
    "data.examples_per_task=20",
    "data.num_unseen_tasks=4",
    "data.test_examples_per_task=2",
    "data.validation_examples=4",
    "rounds.num_rounds=3",
    "rounds.cohort_size=5",
    "training.max_steps=2",
    "evaluation.every=2",
    "evaluation.max_new_tokens=6",
    "evaluation.local_only_clients=1",
    "evaluation.local_only_epochs=1",
    "evaluation.rank_group_clients=1",
    "model.num_threads=1",
)


def flexlora(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flexlora.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "demo"
    done = flexlora("run", "configs/demo.yaml", *SMALL, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    for row in (
        "Federated (aligned)",
        "FedIT at the smallest rank",
        "Large clients alone",
        "FedIT at the largest rank",
    ):
        assert row in done.stdout
    return folder


def records_of(folder: Path) -> list[dict[str, object]]:
    """Return the records with everything that is a time taken out."""
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def references_of(folder: Path) -> dict[str, Any]:
    """Return the references with everything that is a time, and the digest of it, taken out."""
    found = json.loads((folder / "references.json").read_text())
    del found["digest"]
    for reference in found.values():
        if reference is not None:
            reference.pop("seconds", None)
    return found


def adapters_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("adapters/*/*.safetensors"))
    }


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    for name in ("config.yaml", "records.jsonl", "report.html", "manifest.json", "references.json"):
        assert (finished / name).stat().st_size > 0
    assert {path.name for path in (finished / "adapters").iterdir()} == {"rank-1", "rank-4", "rank-16"}
    for folder in (finished / "adapters").iterdir():
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    records = records_of(finished)
    assert [record["server_round"] for record in records] == [0, 1, 2, 3]
    assert [record["evaluation"] is not None for record in records] == [True, False, True, True]
    assert records[-1]["evaluation"]["rank_groups"]


def test_clients_have_the_ranks_of_their_plans_and_bytes_are_those_serialised(finished: Path) -> None:
    from flexlora.experiment.loaded import LoadedRun
    from flexlora.experiment.participants import gather_participants

    config = load_config(finished / "config.yaml")
    loaded = LoadedRun.load(config, gather_participants(config))
    plans = loaded.participants.plans
    expected = {"type1": (1, 1), "type2": (4, 4), "type3": (4, 16), "type4": (16, 16)}
    for record in records_of(finished)[1:]:
        assert record["clients"]
        for client in record["clients"]:
            attention, ffn = expected[client["plan"]]
            names = {"q_proj": attention, "k_proj": attention, "v_proj": attention, "o_proj": attention}
            assert client["ranks"] == {**names, "gate_proj": ffn, "up_proj": ffn, "down_proj": ffn}
            ranks = plans[client["plan"]].resolve(loaded.shapes)
            adapter = loaded.model.initial_adapter(ranks, loaded.scaling, 0)
            assert client["up_bytes"] == len(encode(adapter, "float32"))
            # From the second round on, each client is also sent the directions above its rank.
            above = {module: 16 - rank for module, rank in ranks.items() if rank < 16}
            tail = loaded.model.initial_adapter(above, loaded.scaling, 0) if record["server_round"] > 1 else {}
            frozen = {module: factors.with_scaling(1.0) for module, factors in tail.items()} or None
            assert client["down_bytes"] == len(encode_broadcast(Broadcast(adapter, frozen), "float32"))


def test_references_are_runs_of_their_own_among_who_takes_part_in_them(finished: Path) -> None:
    references = json.loads((finished / "references.json").read_text())
    plans = json.loads((finished / "manifest.json").read_text())["plan_counts"]
    for name, rank, num_clients in (
        ("fedit_smallest_rank", 1, None),
        ("fedit_largest_rank", 16, None),
        ("large_clients_alone", 16, plans["type4"]),
    ):
        found, records = references[name], records_of(finished / "references" / name)
        assert set(found["ranks"].values()) == {rank} and found["num_clients"] == num_clients
        assert [line["server_round"] for line in found["evaluations"]] == [0, 2, 3]
        assert found["final"]["unseen"] == records[-1]["evaluation"]["unseen"]
        assert found["up_bytes"] == sum(record["up_bytes"] for record in records)
        cohort = 5 if num_clients is None else max(1, round(5 * num_clients / 24))
        for record in records[1:]:
            assert len(record["clients"]) == cohort
            assert all(set(client["ranks"].values()) == {rank} for client in record["clients"])
    cohorts = {
        name: [[client["client_id"] for client in record["clients"]] for record in records_of(folder)]
        for name, folder in (("run", finished), ("all", finished / "references" / "fedit_largest_rank"))
    }
    assert cohorts["run"] == cohorts["all"]


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_exported_adapters_give_the_same_logits_in_stock_peft(finished: Path, tmp_path: Path, rank: int) -> None:
    for arguments in ((), ("--merged",)):
        folder = tmp_path / ("merged" if arguments else "adapter")
        done = flexlora("export", str(finished), "--rank", str(rank), "--out", str(folder), *arguments)
        assert done.returncode == 0, done.stderr
    tokens = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(BASE_FOLDER)
    with torch.no_grad():
        plain = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=1e-4)
    assert (adapted - plain).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("round trip")["input_ids"]


def test_export_refuses_what_it_cannot_do(finished: Path, tmp_path: Path) -> None:
    done = flexlora("export", str(finished), "--rank", "17", "--out", str(tmp_path / "a"))
    assert done.returncode == 2
    assert "the rank must be in 1..16" in done.stderr and "got 17" in done.stderr
    done = flexlora("export", str(tmp_path), "--out", str(tmp_path / "a"))
    assert done.returncode == 2
    assert "the folder of a run holds a config.yaml" in done.stderr


def test_eval_repeats_the_scores_of_the_run(finished: Path) -> None:
    done = flexlora("eval", str(finished), "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    records = records_of(finished)
    assert scores["base model"]["unseen"] == records[0]["evaluation"]["unseen"]
    for key, value in records[-1]["evaluation"]["unseen"].items():
        assert scores["rank 16"]["unseen"][key] == pytest.approx(value, rel=1e-4)


def test_report_and_plan_and_doctor_work_on_their_own(finished: Path) -> None:
    (finished / "report.html").unlink()
    assert flexlora("report", str(finished)).returncode == 0
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"https?:", page)
    done = flexlora("plan", "configs/demo.yaml", *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)["types"]
    measured = {client["plan"]: client["up_bytes"] for record in records_of(finished) for client in record["clients"]}
    for name, up_bytes in measured.items():
        assert planned[name]["transfer_bytes"] == pytest.approx(up_bytes, rel=0.02)
    assert json.loads(flexlora("doctor", "--json").stdout)


def test_a_ray_cluster_leaves_the_same_behind(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    done = flexlora("run", "configs/demo.yaml", *SMALL, "ray.num_actors=1", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert records_of(tmp_path / "run") == records_of(finished)
    assert adapters_of(tmp_path / "run") == adapters_of(finished)


def test_a_folder_with_a_run_is_neither_overwritten_nor_mixed(finished: Path, tmp_path: Path) -> None:
    done = flexlora("run", "configs/demo.yaml", *SMALL, "--out", str(finished))
    assert done.returncode == 2
    assert "already holds a run; resume it (--resume" in done.stderr
    done = flexlora("run", "configs/demo.yaml", *SMALL, "seed=5", "--out", str(finished), "--resume")
    assert done.returncode == 2
    assert "differs in seed" in done.stderr
    (tmp_path / "notes.txt").write_text("mine")
    done = flexlora("run", "configs/demo.yaml", *SMALL, "--out", str(tmp_path), "--overwrite")
    assert done.returncode == 2
    assert "also holds notes.txt" in done.stderr


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    records, adapters = (finished / "records.jsonl").read_bytes(), adapters_of(finished)
    done = flexlora("run", "configs/demo.yaml", *SMALL, "--out", str(finished), "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["server_round"] == 3
    assert (finished / "records.jsonl").read_bytes() == records
    assert adapters_of(finished) == adapters


def test_a_run_without_progress_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    # A learning rate no number survives: every client's loss leaves the finite ones.
    diverging = ("training.learning_rate=1e30", "training.max_grad_norm=null", "rounds.max_failed_rounds=2")
    options = (*SMALL, *diverging)
    done = flexlora("run", "configs/demo.yaml", *options, "training.max_steps=4", "--out", str(tmp_path / "run"))
    assert done.returncode == 3, done.stderr
    assert "No progress" in done.stderr and "no update could be used in 2 rounds" in done.stderr
    assert all(client["outcome"] == "failed" for client in records_of(tmp_path / "run")[1]["clients"])
    assert (tmp_path / "run" / "report.html").exists()


def _run_in_child(config: Config, folder: Path) -> None:
    torch.set_num_threads(1)
    # A kill before anything was written leaves no run to resume.
    run_experiment(config, folder, resume=folder.is_dir() and any(folder.iterdir()))


def test_twenty_kills_at_random_moments_change_nothing(finished: Path, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "demo.yaml", SMALL)
    folder, rng, num_kills = tmp_path / "killed", random.Random(7), 0
    # Forked, so that each life starts with everything imported and the kills fall into the run itself.
    context = multiprocessing.get_context("fork")
    longest = 4.0
    while True:
        child = context.Process(target=_run_in_child, args=(config, folder))
        child.start()
        child.join(rng.uniform(0.05, longest) if num_kills < 20 else None)
        if child.exitcode is not None:
            assert child.exitcode == 0
            if num_kills >= 20:
                break
            # It got through before its time: start over, more impatient.
            assert records_of(folder) == records_of(finished)
            assert adapters_of(folder) == adapters_of(finished)
            subprocess.run(["rm", "-r", str(folder)], check=True)
            longest *= 0.7
            continue
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        num_kills += 1
    assert records_of(folder) == records_of(finished)
    assert adapters_of(folder) == adapters_of(finished)
    assert references_of(folder) == references_of(finished)
    assert (folder / "answers.jsonl").read_bytes() == (finished / "answers.jsonl").read_bytes()


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flexlora.cli", "run", "configs/demo.yaml", *SMALL, "rounds.num_rounds=500"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # Shells start background jobs, such as a test run may be, with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 120
    while not (tmp_path / "run" / "records.jsonl").exists() and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume continues" in messages
