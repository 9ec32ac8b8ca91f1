"""The example job in NVFlare's simulator: a server and two clients of different ranks, each a process of its own."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.numpy import load_file
from transformers import AutoTokenizer

pytest.importorskip("nvflare")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "nvflare-app"
ROUNDS = 2

pytestmark = [
    pytest.mark.integration,
    # The example's scripts run within the test too, with the warnings that stock libraries have for them.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Run the example as its README says and return the arrays of the adapter that it leaves."""
    workspace = tmp_path_factory.mktemp("nvflare")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, str(EXAMPLE / "job.py"), "--workspace", str(workspace), "--rounds", str(ROUNDS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    told = done.stdout + done.stderr
    assert done.returncode == 0 and told.count("ACCEPTED by the aggregator") == 2 * ROUNDS, told[-4000:]
    return load_file(workspace / "server" / "simulate_job" / "adapter" / "adapter_model.safetensors")


def expected() -> dict[str, np.ndarray]:
    """Return what the same clients make of the same rounds: module -> its change, in numpy.

    Training is the example's own; averaging the products, the SVD and the cut to each rank are numpy's.
    """
    client: dict[str, Any] = runpy.run_path(str(EXAMPLE / "client.py"))
    sys.path.insert(0, str(EXAMPLE))
    try:
        sites: dict[str, tuple[int, int]] = runpy.run_path(str(EXAMPLE / "job.py"))["SITES"]
    finally:
        sys.path.remove(str(EXAMPLE))
    tokenizer, alpha, most = AutoTokenizer.from_pretrained(client["BASE"]), client["LORA_ALPHA"], 8
    torch.manual_seed(0)
    first = {
        key: value.double().numpy() for key, value in get_peft_model_state_dict(client["load_model"](most)).items()
    }
    keys = sorted(key for key in first if "lora_A" in key)
    parts = {key: (first[key], np.zeros((first[key.replace("_A", "_B")].shape[0], most))) for key in keys}
    for _ in range(ROUNDS):
        sums = {key: np.zeros((parts[key][1].shape[0], parts[key][0].shape[1])) for key in keys}
        for site, (rank, num_texts) in sites.items():
            model = client["load_model"](rank)
            start = {key: parts[key][0][:rank] for key in keys}
            start |= {key.replace("_A", "_B"): parts[key][1][:, :rank] * rank / alpha for key in keys}
            set_peft_model_state_dict(model, {key: torch.from_numpy(value).float() for key, value in start.items()})
            client["train"](model, tokenizer, client["texts"](site, num_texts))
            trained = {key: value.double().numpy() for key, value in get_peft_model_state_dict(model).items()}
            for key in keys:
                sums[key] += num_texts * alpha / rank * trained[key.replace("_A", "_B")] @ trained[key]
        weight = sum(num_texts for _, num_texts in sites.values())
        for key in keys:
            U, S, Vh = np.linalg.svd(sums[key] / weight, full_matrices=False)
            parts[key] = Vh[:most], U[:, :most] * S[:most]
    return {key: B @ A for key, (A, B) in parts.items()}


def test_the_example_ends_where_the_same_rounds_in_numpy_do(result: dict[str, np.ndarray]) -> None:
    wanted = expected()
    assert {key for key in result if "lora_A" in key} == set(wanted)
    for key, delta in wanted.items():
        found = 16 / 8 * result[key.replace("_A", "_B")].astype(np.float64) @ result[key].astype(np.float64)
        assert np.linalg.norm(found - delta) <= 1e-3 * np.linalg.norm(delta), key
