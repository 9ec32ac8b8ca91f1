"""What a round of a real federation costs beyond the training itself, with a resident worker and without.

    python benchmarks/deployment.py --clients 4 --rounds 8 --repeats 3      # needs flexlora[flower]

A server and its clients run as processes of their own on this machine, over TLS on loopback. Each client notes how long
its worker was busy with a message: unpacking, training, packing. What a round takes beyond the slowest of them is what
the deployment costs: Flower, the way to the worker, and the server's own work, without evaluations and checkpoints.
Without a resident worker each message starts a process that imports and loads everything, as Flower's own ClientApps
do. The first round is left out: models are loaded in it. Every figure is a median over rounds, with the lowest and
the highest.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import yaml

from flexlora.engines.flower.certificates import make_certificates
from flexlora.experiment.demo_data import write_client_rows
from flexlora.rounds.records import read_records

RANKS = (2, 4, 8, 16)
SECONDS_TO_START = 120
# The command line, with a worker that notes how long each message keeps it busy, in a new process each time if asked.
CLIENT = """
import json, sys, time
from flexlora.cli import main
from flexlora.engines.flower.envelope import from_bytes
from flexlora.engines.flower.resident import Resident

honest, times, is_new = Resident.answer, sys.argv.pop(1), sys.argv.pop(1) == "new"

def answer(self, request):
    start = time.perf_counter()
    if is_new:
        with Resident(self._module, self._settings, self._log_path) as worker:
            reply = honest(worker, request)
    else:
        reply = honest(self, request)
    seconds, said = time.perf_counter() - start, from_bytes(reply)
    if said.kind == "update":
        with open(times, "a") as file:
            file.write(json.dumps([said.fields["server_round"], seconds]) + "\\n")
    return reply

Resident.answer = answer
main()
"""


@dataclass(frozen=True)
class Measured:
    """Seconds of each round but the first.

    Attributes:
        whole: From the first message to the new state.
        busy: Of the slowest client's worker.
    """

    whole: list[float]
    busy: list[float]

    @property
    def beyond(self) -> list[float]:
        """What rounds took beyond the slowest worker."""
        return [whole - busy for whole, busy in zip(self.whole, self.busy, strict=True)]


@contextmanager
def started(arguments: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a Python process, and end it after the ``with`` block if it has not ended."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=output, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def measure(folder: Path, names: list[str], rounds: int, steps: int, worker: str) -> Measured:
    """Run one federation and return what its rounds took."""
    config = {
        "model": {"num_threads": 1},
        "lora": {"scaling": "rslora", "lora_alpha": 2},
        "data": {"name": "instructions", "path": str(folder / f"{names[0]}.jsonl"), "label_column": "task"},
        "clients": {"types": {"any": {"attention": max(RANKS), "ffn": max(RANKS)}}, "distribution": {"any": 1}},
        "method": {"name": "aligned"},
        "training": {"learning_rate": 0.01, "batch_size": 4, "max_steps": steps},
        "rounds": {"num_rounds": rounds, "cohort_fraction": 1.0},
        "evaluation": {"every": rounds},
        "deployment": {"min_clients": len(names)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run = folder / "run"
    with ExitStack() as stack:
        serve = ["-m", "flexlora.cli", "server", str(folder / "config.yaml"), "--port", "0", "--out", str(run)]
        serve += ["--certificates", str(folder / "certificates")]
        server = stack.enter_context(started(serve, folder / "server.log"))
        port = port_of(run, server, folder / "server.log")
        clients = []
        for number, name in enumerate(names):
            own = ["-c", CLIENT, str(folder / f"{name}.times"), worker, "client", "--server", f"localhost:{port}"]
            own += ["--data", str(folder / f"{name}.jsonl"), "--rank", str(RANKS[number % len(RANKS)])]
            own += ["--ca", str(folder / "certificates" / "ca.pem")]
            own += ["--key", str(folder / "certificates" / "clients" / f"{name}.key")]
            clients.append(stack.enter_context(started(own, folder / f"{name}.log")))
        if server.wait():
            raise SystemExit((folder / "server.log").read_text(errors="replace"))
        for client in clients:
            client.wait()
    busy: dict[int, list[float]] = {}
    for name in names:
        for line in (folder / f"{name}.times").read_text().splitlines():
            server_round, seconds = json.loads(line)
            busy.setdefault(server_round, []).append(seconds)
    records = [record for record in read_records(run / "records.jsonl") if record.server_round > 1]
    aside = ("evaluate", "checkpoint")
    whole = [record.seconds["total"] - sum(record.seconds.get(stage, 0.0) for stage in aside) for record in records]
    return Measured(whole, [max(busy[record.server_round]) for record in records])


def port_of(run: Path, server: "subprocess.Popen[bytes]", log: Path) -> int:
    """Wait until a server listens, and return its port."""
    path, until = run / "server" / "deployment.json", time.monotonic() + SECONDS_TO_START
    while not path.exists():
        if server.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"the server did not start; it said:\n{log.read_text(errors='replace')}")
        time.sleep(0.1)
    return int(json.loads(path.read_text())["address"].rpartition(":")[2])


def told(seconds: list[float]) -> str:
    """Return a median with its spread."""
    return f"{median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    """Run federations with both kinds of workers in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="of each client, batches of 4")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2: the first one is left out")
    names = [f"client{number}" for number in range(options.clients)]
    found: dict[str, list[Measured]] = {"resident": [], "new": []}
    for repeat in range(options.repeats):
        for worker, measured in found.items():
            with tempfile.TemporaryDirectory(prefix="flexlora-benchmark-") as name:
                folder = Path(name)
                make_certificates(folder / "certificates", [], names)
                for one in names:
                    write_client_rows(folder / f"{one}.jsonl", one)
                measured.append(measure(folder, names, options.rounds, options.steps, worker))
            last = measured[-1]
            print(f"{repeat + 1} {worker:>8}: a round {told(last.whole)}, its slowest worker {told(last.busy)}")
    beyond = [seconds for one in found["resident"] for seconds in one.beyond]
    print(f"beyond the slowest worker, resident: {told(beyond)}, over {len(beyond)} rounds")
    ratios = [median(new.whole) / median(warm.whole) for warm, new in zip(found["resident"], found["new"], strict=True)]
    print(f"a round with new processes over one with resident workers: {median(ratios):.1f} times", end="")
    print(f" ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
