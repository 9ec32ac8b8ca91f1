"""Run folders as version 0.1.0 wrote them, byte for byte where a reader looks, are still reported and exported."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from flexlora.cli import app

pytestmark = pytest.mark.integration

# All settings of version 0.1.0 but those of the method.
CONFIG = """\
seed: 0
model:
  name_or_path: embedded
  revision: null
  dtype: float32
  device: auto
  attn_implementation: sdpa
  trust_remote_code: false
  num_threads: 1
  num_processes: null
  clients_per_group: null
ray: null
lora:
  target_modules: all-linear
  scaling: rslora
  lora_alpha: 2.0
  dropout: 0.0
data:
  template: alpaca
  max_length: 192
  loss_on: answers
  num_clients: null
  test_examples_per_task: 4
  validation_examples: 64
  cache: auto
  name: generated
  corpus_seed: 0
  examples_per_task: 60
  clients_per_task: 1
  num_unseen_tasks: 64
  unseen_categories: []
clients:
  ranks_from: types
  types: small
  distribution: heavy_tail_strong
  counts: {}
  assigned: {}
devices:
  profiles: null
  distribution: {}
  counts: {}
  assigned: {}
  types: {}
  max_rank: 64
  rank_choices: []
  round_seconds: null
  round_bytes: null
clock:
  policy: wait
  deadline_seconds: null
  over_selection: 1.3
  jitter: 0.0
  day_seconds: 86400.0
  buffer_size: null
  staleness: polynomial
  staleness_rate: 0.5
  max_staleness: null
training:
  optimizer: adamw
  learning_rate: 0.024
  schedule: linear
  halve_at:
  - 15
  warmup_rounds: 0
  num_epochs: 1.0
  max_steps: 4
  batch_size: 8
  gradient_accumulation_steps: 1
  weight_decay: 0.0
  momentum: 0.0
  max_grad_norm: 1.0
rounds:
  num_rounds: 8
  cohort_size: 12
  cohort_fraction: 0.05
  keep_checkpoints: 2
  checkpoint_every: 1
  patience: null
  max_failed_rounds: 3
  wire_dtype: float32
evaluation:
  every: 4
  max_new_tokens: 24
  batch_size: 64
  rank_group_clients: 3
  local_only_clients: 2
  local_only_epochs: 2.0
  fedit_reference: true
  fedit_learning_rate: null
  target_rouge_l: null
"""
METHODS = {
    "flexlora": {
        "name": "flexlora",
        "server_rank": None,
        "split": "b",
        "error_compensation": False,
        "fold_tail": False,
        "accuracy": "exact",
        "most_directions": None,
    },
    "fedit": {"name": "fedit"},
    "zero_pad": {"name": "zero_pad"},
}
SHAPES = {"model.layers.0.mlp.down_proj": (128, 344), "model.layers.0.self_attn.q_proj": (128, 128)}
RANK = 4
SINGULAR_VALUES = np.array([3.0, 2.0, 0.5, 0.25])
SCORE = {"rouge_l": 40.0, "exact_match": 20.0, "loss": 2.0, "num_examples": 8, "num_tasks": 2}
SCORES = {
    "unseen": SCORE,
    "unseen_unweighted": SCORE,
    "categories": {"Translation": SCORE},
    "validation_loss": 2.5,
    "rank_groups": {},
}
CLIENT = {
    "client_id": "edit-0034",
    "plan": "type2",
    "ranks": {"down_proj": RANK, "q_proj": RANK},
    "num_examples": 48,
    "up_bytes": 640448,
    "down_bytes": 640640,
    "outcome": "ok",
    "stage": None,
    "reason": None,
    "loss": 0.25,
    "steps": 4,
    "device": None,
    "virtual_seconds": None,
    "staleness": None,
}


def round_line(server_round: int) -> str:
    record = {
        "server_round": server_round,
        "learning_rate": 0.003 if server_round else None,
        "clients": [CLIENT] * server_round,
        "up_bytes": 640448 * server_round,
        "down_bytes": 640640 * server_round,
        "num_ok": server_round,
        "num_failed": 0,
        "train_loss": 0.25 if server_round else None,
        "spectra": {module: {"singular_values": SINGULAR_VALUES.tolist(), "tail": 0.0} for module in SHAPES}
        if server_round
        else {},
        "energy_kept": {"type2": 1.0} if server_round else {},
        "energy_above_smallest": 0.0 if server_round else None,
        "evaluation": SCORES,
        "note": None,
        "stopped": None,
        "seconds": {"train": 2.0, "total": 3.0},
        "virtual_seconds": None,
        "virtual_clock_seconds": None,
    }
    return json.dumps(record, separators=(",", ":"))


MANIFEST = {
    "flexlora_version": "0.1.0",
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
    "python": "3.11.7",
    "platform": "Linux",
    "seed": 0,
    "config_hash": "a2cb63d5",
    "data_hashes": {"clients": "3345d30d", "unseen": "1a32a353"},
    "base_model": "embedded",
    "num_parameters": 1416832,
    "method": "flexlora",
    "num_clients": 1963,
    "num_unseen_tasks": 64,
    "num_rounds": 1,
    "cohort_size": 12,
    "device": "cpu",
    "num_threads": 1,
    "plan_counts": {"type2": 1963},
    "plan_ranks": {"type2": dict.fromkeys(SHAPES, RANK)},
    "device_counts": {},
    "policy": None,
    "target_rouge_l": None,
    "warnings": [],
    "started": "2025-01-01T10:00:00+00:00",
    "seconds": {},
}


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


CHANGES = {
    module: (orthonormal(rows, RANK, 1), orthonormal(columns, RANK, 2).T) for module, (rows, columns) in SHAPES.items()
}
"""Module -> U and Vh of the change; `SINGULAR_VALUES` lie between them."""


def state_of(method: str, tensors: dict[str, np.ndarray]) -> dict[str, object]:
    """Return the tree of a state, and put its tensors into ``tensors``."""

    def tensor(name: str, value: np.ndarray) -> dict[str, str]:
        tensors[name] = np.ascontiguousarray(value)
        return {"tensor": name}

    def spectrum(module: str) -> dict[str, object]:
        (U, Vh), name = CHANGES[module], f"state/spectra/{module}"
        fields = {
            "U": tensor(f"{name}/U", U),
            "S": tensor(f"{name}/S", SINGULAR_VALUES),
            "Vh": tensor(f"{name}/Vh", Vh),
            "tail": {"value": 0.0},
        }
        return {"type": "Spectrum", "fields": fields}

    def factors(module: str) -> dict[str, object]:
        (U, Vh), name = CHANGES[module], f"state/adapter/{module}"
        # The singular values shared between B and the scaling.
        A, B = tensor(f"{name}/A", Vh), tensor(f"{name}/B", U * SINGULAR_VALUES / 2.0)
        return {"type": "LoraFactors", "fields": {"A": A, "B": B, "scaling": {"value": 2.0}}}

    if method != "flexlora":
        kind = {"fedit": "FedItState", "zero_pad": "ZeroPadState"}[method]
        return {"type": kind, "fields": {"adapter": {"items": {module: factors(module) for module in SHAPES}}}}
    rows = {
        module: tensor(f"state/initial_rows/{module}", np.ones((RANK, columns), np.float32))
        for module, (_, columns) in SHAPES.items()
    }
    fields = {
        "spectra": {"items": {module: spectrum(module) for module in SHAPES}},
        "initial_rows": {"items": rows},
        "max_ranks": {"items": {module: {"value": RANK} for module in SHAPES}},
    }
    return {"type": "FlexLoraState", "fields": fields}


@pytest.fixture(params=METHODS)
def earlier_run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "round-0001"
    checkpoint.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG + yaml.safe_dump({"method": METHODS[request.param]}))
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, "method": request.param}))
    (folder / "records.jsonl").write_text("".join(f"{round_line(number)}\n" for number in range(2)))
    tensors: dict[str, np.ndarray] = {}
    state = state_of(request.param, tensors)
    save_file(tensors, checkpoint / "state.safetensors")
    loop = {
        "best_validation_loss": 2.5,
        "evaluations_without_gain": 0,
        "failed_rounds_in_a_row": 0,
        "num_updates": 1,
        "stopped": None,
        "clock": {"now": 0.0, "num_sent": 0, "trips": []},
        "sent": {},
    }
    tree = {
        "format_version": 1,
        "server_round": 1,
        "sha256": hashlib.sha256((checkpoint / "state.safetensors").read_bytes()).hexdigest(),
        "progress": {"loop": loop, "record": round_line(1), "server_ranks": dict.fromkeys(SHAPES, RANK)},
        "state": state,
        "sent": {"items": {}},
    }
    (checkpoint / "state.json").write_text(json.dumps(tree))
    return folder


def test_an_earlier_run_is_reported(earlier_run: Path) -> None:
    told = CliRunner().invoke(app, ["report", str(earlier_run)], catch_exceptions=False)
    assert told.exit_code == 0
    page = (earlier_run / "report.html").read_text(encoding="utf-8")
    assert "with 1\u202f963 clients" in page and "edit-0034" not in page
    assert "ROUGE-L on unseen tasks stayed at 40.0" in page


@pytest.mark.parametrize("rank", [2, RANK])
def test_an_earlier_run_is_exported_as_the_best_approximation_of_its_change(earlier_run: Path, rank: int) -> None:
    out = earlier_run.parent / "adapter"
    command = ["export", str(earlier_run), "--rank", str(rank), "--out", str(out)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    written, config = (
        load_file(out / "adapter_model.safetensors"),
        json.loads((out / "adapter_config.json").read_text()),
    )
    assert config["r"] == rank and not config["rank_pattern"] and not config["alpha_pattern"]
    # PEFT's own rule, and Eckart and Young.
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
    for module, (U, Vh) in CHANGES.items():
        A, B = (written[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
        expected = (U[:, :rank] * SINGULAR_VALUES[:rank]) @ Vh[:rank]
        np.testing.assert_allclose(scaling * B.astype(np.float64) @ A, expected, atol=1e-6)


def test_a_setting_that_no_version_had_is_named(earlier_run: Path) -> None:
    with (earlier_run / "config.yaml").open("a") as file:
        file.write("no_such_section: 1\n")
    told = CliRunner().invoke(app, ["export", str(earlier_run), "--out", str(earlier_run.parent / "adapter")])
    assert "no_such_section" in str(told.exception)
