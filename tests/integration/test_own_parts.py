"""Methods that train cores, keep factors or send to each client go through a whole run, references and export too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.num_clients=60",
    "data.num_unseen_tasks=8",
    "data.test_examples_per_task=2",
    "data.validation_examples=16",
    "rounds.cohort_size=4",
    "rounds.num_rounds=2",
    "training.max_steps=1",
    "training.proximal=0.1",
    "evaluation.every=2",
    "evaluation.max_new_tokens=4",
    "evaluation.rank_group_clients=1",
    "evaluation.local_only_clients=1",
    "evaluation.local_only_epochs=0.1",
    "evaluation.fedit_reference=false",
    "evaluation.fedit_largest_reference=false",
    "evaluation.large_alone_reference=false",
    "model.num_processes=1",
    "clients.distribution={type2: 1}",
]
FILE = """
import dataclasses
from dataclasses import dataclass

import torch

from flexlora import Broadcast, LoraFactors, Scaling, SparseMask, TailPenalty, Traits, aggregation_method, known_rows
from flexlora import mask_of
from flexlora.aggregators.fedit import FedIt

@aggregation_method("core")
@dataclass(frozen=True)
class Core(FedIt):
    "The mean of cores between known rows; it takes a random B for its column space."
    traits = Traits(needs_one_rank=True)

    def init(self, adapter) -> dict:
        return {
            module: (torch.zeros(own.rank, own.rank).double(), torch.tensor(own.shape))
            for module, own in sorted(adapter.items())
        }

    def aggregate(self, state, updates):
        updates = list(updates)
        total = sum(update.weight for update in updates)
        return {
            module: (sum(update.weight * update.cores[module].double() for update in updates) / total, shape)
            for module, (_, shape) in state.items()
        }

    def broadcast(self, state, ranks):
        trainable = {}
        for module, rank in sorted(ranks.items()):
            high, wide = state[module][1].tolist()
            B = known_rows(1, module, rank, high).T.contiguous()
            trainable[module] = LoraFactors(known_rows(0, module, rank, wide), B, self.scaling(rank))
        cores = {module: state[module][0].float() for module in trainable}
        return Broadcast(trainable, train_factors="core", cores=cores, known_A=0)

    def spectra(self, state):
        from flexlora import spectrum_of
        sent = self.broadcast(state, {module: core.shape[0] for module, (core, _) in state.items()})
        return {module: spectrum_of(own) for module, own in sent.adapter.items()}

@aggregation_method("own_b")
@dataclass(frozen=True)
class OwnB(FedIt):
    "The mean of A; every client keeps its B."
    traits = Traits(needs_one_rank=True, personal=True, per_client=True)

    def broadcast(self, state, ranks):
        return dataclasses.replace(super().broadcast(state, ranks), kept="B", tail_penalty=TailPenalty(0.01, 0.5))

    def broadcast_to(self, state, ranks, client_id):
        return self.broadcast(state, ranks)
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "down", "up"),
    # Values per module of rank r: B and core down, a core up; both factors down, A up.
    [
        ("core", lambda h, w, r: h * r + r * r, lambda h, w, r: r * r),
        ("own_b", lambda h, w, r: (h + w) * r, lambda h, w, r: w * r),
    ],
)
def test_a_run_records_bytes_by_formula_and_can_be_exported(tmp_path: Path, name: str, down, up) -> None:
    (tmp_path / "own.py").write_text(FILE)

    def flexlora(*arguments: object) -> str:
        command = [sys.executable, "-m", "flexlora.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    config = ROOT / "configs" / "demo.yaml"
    flexlora("run", config, *SMALL, "method.path=own.py", f"method.name={name}", "--out", "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    clients = [client for record in records[1:] for client in record["clients"]]
    assert len(clients) == 8 and {client["outcome"] for client in clients} == {"ok"}
    flexlora("export", "run", "--out", "adapter")
    from flexlora import read_adapter

    whole = read_adapter(str(tmp_path / "adapter"))
    shapes = {module: (*own.shape, own.rank) for module, own in whole.items()}
    for client in clients:
        for key, values in (("down_bytes", down), ("up_bytes", up)):
            num_bytes = 4 * sum(values(*shape) for shape in shapes.values())
            # Names, shapes and scalings of about 100 to 300 bytes a tensor.
            assert num_bytes < client[key] < num_bytes + 600 * len(shapes) + 1000
    references = json.loads((tmp_path / "run" / "references.json").read_text())
    assert [row["failure"] for row in references["local_only"]["clients"]] == [None]
    assert any(own.B.any() for own in whole.values()) == (name == "core")
