"""Four clients on a real SuperLink over TLS end with the adapters of the simulation."""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from flexlora.adapters.folder import read_adapter
from flexlora.engines.flower.certificates import Certificates, make_certificates, read_private_key
from flexlora.engines.flower.client_loop import ClientLoop
from flexlora.engines.flower.client_settings import ClientSettings, uniform_plan
from flexlora.engines.flower.client_work import ClientWork
from flexlora.engines.flower.node import Place
from flexlora.engines.flower.open_run import open_run
from flexlora.engines.flower.superlink import SuperLink
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.flower_run import run_on_flower
from flexlora.experiment.run import run_experiment
from flexlora.rounds.records import read_records

# flwr asks pathspec for patterns under an old name.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

ONE_AT_A_TIME = threading.Lock()

RANKS = {"east": 2, "north": 4, "south": 8, "west": 16}


@pytest.fixture
def silos(tmp_path: Path) -> Path:
    (tmp_path / "silos").mkdir()
    for name in RANKS:
        rows = [
            {"instruction": f"Say {name} {number}", "response": f"{name} {number % 7}", "kind": f"kind{number % 4}"}
            for number in range(32)
        ]
        (tmp_path / "silos" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "silos"


@pytest.fixture
def config(silos: Path) -> Config:
    types = {f"rank-{rank}": {"attention": rank, "ffn": rank} for rank in RANKS.values()}
    tree: dict[str, Any] = {
        "seed": 5,
        "model": {"num_threads": 1, "num_processes": 1},
        "data": {
            "name": "instructions",
            "path": str(silos),
            "partition": "natural",
            "client_from": "file",
            "label_column": "kind",
            "unseen_labels": ["kind3"],
            "max_length": 64,
            "validation_examples": 0,
        },
        "clients": {
            "types": types,
            "distribution": dict.fromkeys(types, 1.0),
            "assigned": {name: f"rank-{rank}" for name, rank in RANKS.items()},
        },
        "rounds": {"num_rounds": 2, "cohort_size": 4},
        "deployment": {"min_clients": 4, "wait_seconds": 120},
        "method": {"name": "flexlora", "error_compensation": True},
        "training": {"max_steps": 3},
        "evaluation": {"every": 2, "max_new_tokens": 1, "local_only_clients": 0, "rank_group_clients": 0},
    }
    tree["evaluation"]["fedit_reference"] = False
    return parse_config(tree, "test")


@pytest.fixture
def link(tmp_path: Path) -> Iterator[SuperLink]:
    make_certificates(tmp_path / "certificates", clients=list(RANKS))
    with SuperLink("127.0.0.1", 0, Certificates(tmp_path / "certificates")) as link:
        link.start(tmp_path / "server")
        link.wait_until_ready()
        yield link


def start_client(name: str, link: SuperLink, silos: Path, failures: list[BaseException]) -> threading.Thread:
    """Serve the link as one client, in a thread."""
    assert link.certificates is not None
    key = read_private_key(link.certificates.client_key(name))
    work = ClientWork(ClientSettings(name, silos / f"{name}.jsonl", uniform_plan(RANKS[name]), num_threads=1))

    def answer(request: bytes) -> bytes:
        """Answer one request of all clients at a time: transformers cannot load models side by side."""
        with ONE_AT_A_TIME:
            return work.answer(request)

    loop = ClientLoop(Place(link.address, link.certificates.authority, key), answer, lambda news: None)

    def run() -> None:
        try:
            loop.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def changes_in(folder: Path) -> dict[str, torch.Tensor]:
    adapter = read_adapter(folder / "adapters" / "rank-16")
    return {module: own.scaling * own.B.double() @ own.A.double() for module, own in adapter.items()}


def test_four_clients_over_tls_end_with_the_adapters_of_the_simulation(
    config: Config, silos: Path, link: SuperLink, tmp_path: Path
) -> None:
    run_experiment(config, tmp_path / "simulated")
    failures: list[BaseException] = []
    threads: list[threading.Thread] = []
    with ExitStack() as stack:

        def open_grid() -> Any:
            opened = open_run(link)
            threads.extend(start_client(name, link, silos, failures) for name in RANKS)
            return opened

        result = run_on_flower(config, tmp_path / "real", open_grid)
        stack.callback(lambda: [thread.join(30) for thread in threads])
    assert not failures and result.has_progress
    records = read_records(tmp_path / "real" / "records.jsonl")
    assert [[client.outcome for client in record.clients] for record in records] == [[], ["ok"] * 4, ["ok"] * 4]
    ours, theirs = changes_in(tmp_path / "real"), changes_in(tmp_path / "simulated")
    assert ours.keys() == theirs.keys()
    for module, change in ours.items():
        assert torch.linalg.norm(change - theirs[module]) <= 1e-3 * torch.linalg.norm(theirs[module]), module
