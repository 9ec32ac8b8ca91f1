"""Servers and clients as a user starts them: real processes, TLS on loopback, kills and rubbish, one long-lived run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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


@dataclass
class Place:
    """A folder with certificates, data and a configuration, and the processes that were started in it."""

    folder: Path
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def start(self, name: str, *arguments: str, script: tuple[str, ...] = ("-m", "flexlora.cli")) -> "subprocess.Popen":
        with (self.folder / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *script, *arguments], cwd=self.folder, stdout=output, stderr=output
            )
        self.processes.append(process)
        return process

    def serve(self, *more: str) -> "subprocess.Popen":
        return self.start("server", "server", "config.yaml", "--port", "0", "--out", "run", *more)

    def client(self, name: str, port: int, *more: str, **options: Any) -> "subprocess.Popen":
        arguments = ["client", "--server", f"localhost:{port}", "--data", f"{name}.jsonl", "--wait", "90"]
        arguments += ["--ca", "certificates/ca.pem", "--key", f"certificates/clients/{name}.key", *more]
        return self.start(name, *arguments, **options)

    def stranger(self, name: str, port: int, *proofs: str) -> "subprocess.Popen":
        return self.start(
            name, "client", "--server", f"localhost:{port}", "--data", "stranger.jsonl", "--name", name, *proofs
        )

    def said(self, name: str) -> str:
        path = self.folder / f"{name}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def deployment(self) -> dict[str, Any]:
        path = self.folder / "run" / "server" / "deployment.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def rounds(self) -> list[dict[str, Any]]:
        path = self.folder / "run" / "records.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, what: str, holds: Callable[[], Any], seconds: float = 120) -> Any:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if value := holds():
                return value
            if self.processes and (self.processes[0].poll() or 0) > 0:
                break  # The server has ended with an error; it is not one that was killed.
            time.sleep(0.1)
        everything = "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')}" for path in self.folder.glob("*.out")
        )
        raise AssertionError(f"{what} did not happen within {seconds} s\n{everything}")

    def port(self, process: int) -> int:
        self.wait("the server listening", lambda: self.deployment().get("process") == process)
        return int(self.deployment()["address"].rpartition(":")[2])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("federation"))
    make_certificates(place.folder / "certificates", [], list(RANKS))
    make_certificates(place.folder / "others", [], ["stranger"])
    for name in (*RANKS, "stranger"):
        write_client_rows(place.folder / f"{name}.jsonl", name)
    (place.folder / "config.yaml").write_text(CONFIG)
    (place.folder / "rogue.py").write_text(ROGUE_SCRIPT)
    yield place
    for process in place.processes:
        if process.poll() is None:
            process.kill()
        process.wait()


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
def story(place: Place) -> Story:
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
    listening = listening_addresses(server.pid)
    clients[KILLED].kill()
    clients[KILLED].wait()
    clients[KILLED] = place.client(KILLED, port, "--rank", str(RANKS[KILLED]))
    place.wait("round 4", lambda: len(place.rounds()) >= 5)
    children = descendants(server.pid)
    server.kill()
    server.wait()
    place.wait("the end of the server's children", lambda: not [pid for pid in children if is_alive(pid)], 30)
    server = place.start("server", "server", "config.yaml", "--port", str(port), "--out", "run", "--resume")
    place.port(server.pid)
    place.wait("all clients back", lambda: len(place.deployment().get("clients", ())) == 4)
    shown = subprocess.run(
        [sys.executable, "-m", "flexlora.cli", "status", "run", "--json"], cwd=place.folder, capture_output=True
    )
    everybody = {**clients, "server": server}
    codes = {name: process.wait(120) for name, process in everybody.items()}
    own = [pid for process in everybody.values() for pid in descendants(process.pid)]
    return Story(listening, refused, place.rounds(), codes, json.loads(shown.stdout or b"{}"), own)


def test_the_run_completes_and_every_process_ends_well(story: Story, place: Place) -> None:
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


def descendants(process: int) -> list[int]:
    """Return the processes that a process has started, and those that these have."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == process:
            found += [int(status.parent.name), *descendants(int(status.parent.name))]
    return found


def is_alive(process: int) -> bool:
    try:
        # Who waits for orphans differs from machine to machine; a zombie has ended.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listening_addresses(process: int) -> list[str]:
    """Return the addresses at which a process and those that it has started listen over IPv4 or IPv6."""
    own = set()
    for pid in (process, *descendants(process)):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(entry) if entry.is_symlink() else ""
            if target.startswith("socket:["):
                own.add(target[8:-1])
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in own:
                digits = local.partition(":")[0]
                bytes_of = bytes.fromhex(digits)[::-1]
                addresses.append(".".join(map(str, bytes_of)) if len(bytes_of) == 4 else digits)
    return addresses
