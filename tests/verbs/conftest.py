"""A folder in which servers and clients run as a user starts them: real processes, TLS on loopback."""

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

    @staticmethod
    def descendants(process: int) -> list[int]:
        """Return the processes that a process has started, and those that these have."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = status.read_text()
            except OSError:
                continue
            if int(text.rpartition(")")[2].split()[1]) == process:
                found += [int(status.parent.name), *Place.descendants(int(status.parent.name))]
        return found

    def kill_server(self, server: "subprocess.Popen[bytes]") -> None:
        """Kill a server, and wait until what it started has ended too."""
        children = self.descendants(server.pid)
        server.kill()
        server.wait()
        self.wait("the end of the server's children", lambda: not [pid for pid in children if is_alive(pid)], 30)

    def listening_addresses(self, process: int) -> list[str]:
        """Return the addresses at which a process and those that it has started listen over IPv4 or IPv6."""
        own = set()
        for pid in (process, *self.descendants(process)):
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


def is_alive(process: int) -> bool:
    try:
        # Who waits for orphans differs from machine to machine; a zombie has ended.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def make_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, list[str]], Place]]:
    """Return what makes a folder with a configuration, certificates and rows of a few clients."""
    from flexlora.engines.flower.certificates import make_certificates
    from flexlora.experiment.demo_data import write_client_rows

    places = []

    def make(config: str, names: list[str]) -> Place:
        place = Place(tmp_path_factory.mktemp("federation"))
        places.append(place)
        make_certificates(place.folder / "certificates", [], names)
        for name in names:
            write_client_rows(place.folder / f"{name}.jsonl", name)
        (place.folder / "config.yaml").write_text(config)
        return place

    yield make
    for process in [process for place in places for process in place.processes]:
        if process.poll() is None:
            process.kill()
        process.wait()
