"""Servers and clients as a user starts them: real processes, TLS on loopback, kills and rubbish, one long-lived run."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from flexlora.engines.flower.certificates import make_certificates
from flexlora.experiment.demo_data import write_client_rows

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="tells listening sockets apart by /proc"),
]

RANKS = {"a": 2, "b": 4, "c": 8, "d": 16}
KILLED, ROGUE, NUM_ROUNDS = "d", "b", 6
CONFIG = """
model: {num_threads: 1}
lora: {scaling: rslora, lora_alpha: 2}
data: {name: instructions, path: a.jsonl, label_column: task, max_length: 128}
clients: {types: {any: {attention: 16, ffn: 16}}, distribution: {any: 1}}
method: {name: flexlora}
training: {learning_rate: 0.01, batch_size: 4, max_steps: 3}
rounds: {num_rounds: 6, cohort_fraction: 1.0}
deployment: {min_clients: 4, rejoin_seconds: 60}
"""
_KEY = ("--key", "others/clients/stranger.key")
STRANGERS = {
    "unknown-key": ("--ca", "certificates/ca.pem", *_KEY),
    "wrong-certificate": ("--ca", "others/ca.pem", *_KEY),
    "no-tls": ("--insecure",),
}
# The command line, with a worker whose update of round 2 is not a number.
ROGUE_SCRIPT = """
from dataclasses import replace
from flexlora.cli import main
from flexlora.engines.flower.envelope import from_bytes, to_bytes
from flexlora.engines.flower.resident import Resident

honest = Resident.answer

def answer(self, request):
    reply = from_bytes(honest(self, request))
    if reply.kind == "update" and reply.fields["server_round"] == 2:
        from flexlora.uplink.blob import pack, unpack
        blob = unpack(reply.payload)
        tensors = {name: tensor * float("nan") for name, tensor in blob.tensors.items()}
        reply = replace(reply, payload=pack(replace(blob, tensors=tensors)))
    return to_bytes(reply)

Resident.answer = answer
main()
"""


@pytest.fixture(scope="module")
def place(make_place: Any) -> Any:
    place = make_place(CONFIG, list(RANKS))
    make_certificates(place.folder / "others", [], ["stranger"])
    write_client_rows(place.folder / "stranger.jsonl", "stranger")
    (place.folder / "rogue.py").write_text(ROGUE_SCRIPT)
    return place


@dataclass
class Story:
    """What happened in one run."""

    listening: list[str]
    strangers: dict[str, tuple[int, str]]
    rounds: list[dict[str, Any]]
    codes: dict[str, int]
    status: dict[str, Any]
    left: list[int]


@pytest.fixture(scope="module")
def story(place: Any) -> Story:
    """Run a federation in which a client and the server are killed and another client sends rubbish."""
    server = place.serve()
    port = place.port(server.pid)
    clients = {
        name: place.client(name, port, "--rank", str(RANKS[name])) for name in RANKS if name not in (ROGUE, KILLED)
    }
    clients[ROGUE] = place.client(ROGUE, port, "--rank", str(RANKS[ROGUE]), script=("rogue.py",))
    strangers = {name: place.stranger(name, port, *proofs) for name, proofs in STRANGERS.items()}
    refused = {name: (process.wait(60), place.said(name)) for name, process in strangers.items()}
    clients[KILLED] = place.client(KILLED, port, "--rank", str(RANKS[KILLED]))
    place.wait("round 3", lambda: len(place.rounds()) >= 4)
    listening = place.listening_addresses(server.pid)
    clients[KILLED].kill()
    clients[KILLED].wait()
    clients[KILLED] = place.client(KILLED, port, "--rank", str(RANKS[KILLED]))
    place.wait("round 4", lambda: len(place.rounds()) >= 5)
    place.kill_server(server)
    server = place.start("server", "server", "config.yaml", "--port", str(port), "--out", "run", "--resume")
    place.port(server.pid)
    place.wait("all clients back", lambda: len(place.deployment().get("clients", ())) == 4)
    shown = subprocess.run(
        [sys.executable, "-m", "flexlora.cli", "status", "run", "--json"], cwd=place.folder, capture_output=True
    )
    everybody = {**clients, "server": server}
    codes = {name: process.wait(120) for name, process in everybody.items()}
    own = [pid for process in everybody.values() for pid in place.descendants(process.pid)]
    return Story(listening, refused, place.rounds(), codes, json.loads(shown.stdout or b"{}"), own)


def test_the_run_completes_and_every_process_ends_well(story: Story, place: Any) -> None:
    assert story.codes == dict.fromkeys((*RANKS, "server"), 0), place.said("server")
    assert [record["server_round"] for record in story.rounds] == list(range(NUM_ROUNDS + 1))
    assert not story.left
    assert not (place.folder / "run" / "server" / "deployment.json").exists()
    assert "The run is over." in place.said("a")


def test_records_tell_who_took_part_at_which_rank_and_why_somebody_did_not(story: Story) -> None:
    failures = {}
    for record in story.rounds[1:]:
        assert sorted(client["client_id"] for client in record["clients"]) == sorted(RANKS)
        for client in record["clients"]:
            assert set(client["ranks"].values()) == {RANKS[client["client_id"]]}
            if client["outcome"] != "ok":
                failures[record["server_round"], client["client_id"]] = client["reason"]
    assert "finite" in failures.pop((2, ROGUE))
    # The client that was killed in its training lost that round at most, and the killed server lost none.
    assert {name for _, name in failures} <= {KILLED} and len(failures) <= 1, failures
    assert all(record["num_ok"] >= 3 for record in story.rounds[1:])


def test_strangers_are_refused_and_told_why(story: Story) -> None:
    told = {name: said for name, (code, said) in story.strangers.items() if code == 2}
    assert "does not know the key of this client" in told["unknown-key"]
    assert "was not signed by the authority in --ca" in told["wrong-certificate"]
    assert "speaks TLS" in told["no-tls"]


def test_nothing_listens_beyond_loopback_unless_asked(story: Story) -> None:
    assert story.listening
    assert set(story.listening) == {"127.0.0.1"}


def test_status_shows_who_is_connected(story: Story) -> None:
    assert {one["client_id"]: one["plan"] for one in story.status["clients"]} == {
        name: f"rank-{rank}" for name, rank in RANKS.items()
    }
