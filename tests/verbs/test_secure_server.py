"""Six real clients whose updates a real server sees only as sums, while one of them and the server are killed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")
pytest.importorskip("cryptography")

from safetensors.numpy import load_file

from flexlora.rounds.records import RoundRecord, read_records

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="tells listening sockets apart by /proc"),
]

RANKS = {"a": 1, "b": 2, "c": 4, "d": 8, "e": 16, "f": 4}
KILLED, NUM_ROUNDS = "f", 10
CONFIG = """
model: {num_threads: 1}
lora: {scaling: rslora, lora_alpha: 2}
data: {name: instructions, path: a.jsonl, label_column: task, max_length: 96}
clients: {types: {any: {attention: 16, ffn: 16}}, distribution: {any: 1}}
method: {name: aligned}
privacy: {secure_sum: {}}
training: {learning_rate: 0.01, batch_size: 2, max_steps: 2}
rounds: {num_rounds: 10, cohort_fraction: 1.0}
deployment: {min_clients: 6, rejoin_seconds: 60}
"""


@dataclass
class Story:
    """What happened in one run."""

    rounds: list[RoundRecord]
    codes: dict[str, int]


@pytest.fixture(scope="module")
def place(make_place: Any) -> Any:
    return make_place(CONFIG, list(RANKS))


@pytest.fixture(scope="module")
def story(place: Any) -> Story:
    server = place.serve()
    port = place.port(server.pid)
    clients = {name: place.client(name, port, "--rank", str(rank)) for name, rank in RANKS.items()}
    place.wait("round 3", lambda: len(place.rounds()) >= 4)
    clients[KILLED].kill()
    clients[KILLED].wait()
    clients[KILLED] = place.client(KILLED, port, "--rank", str(RANKS[KILLED]))
    place.wait("round 6", lambda: len(place.rounds()) >= 7)
    place.kill_server(server)
    server = place.start("server", "server", "config.yaml", "--port", str(port), "--out", "run", "--resume")
    place.port(server.pid)
    codes = {name: process.wait(180) for name, process in {**clients, "server": server}.items()}
    return Story(read_records(place.folder / "run" / "records.jsonl"), codes)


def test_all_rounds_are_summed_and_every_process_ends_well(story: Story, place: Any) -> None:
    assert story.codes == dict.fromkeys((*RANKS, "server"), 0), place.said("server")
    assert [record.server_round for record in story.rounds] == list(range(NUM_ROUNDS + 1))
    for record in story.rounds[1:]:
        assert record.secure_sum is not None
        assert record.secure_sum.num_summed == record.num_ok >= len(RANKS) - 1


def test_only_the_client_that_was_killed_missed_a_round(story: Story) -> None:
    failed = [
        (record.server_round, client.client_id)
        for record in story.rounds
        for client in record.clients
        if client.outcome != "ok"
    ]
    assert {name for _, name in failed} <= {KILLED}
    assert len(failed) <= 1, failed


def test_the_model_of_the_sums_has_learned(story: Story, place: Any) -> None:
    losses = [record.secure_sum.train_loss for record in story.rounds[1:] if record.secure_sum is not None]
    assert np.mean(losses[-3:]) < losses[0]
    tensors = load_file(place.folder / "run" / "adapters" / "rank-16" / "adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert any(np.abs(tensor).max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
