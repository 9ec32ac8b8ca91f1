"""A federation over Flower ends where the simulation of the same configuration ends, and goes on after a restart."""

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from flexlora.adapters.folder import read_adapter
from flexlora.engines.flower.client_settings import ClientSettings, uniform_plan
from flexlora.engines.flower.client_work import ClientWork
from flexlora.engines.flower.envelope import Envelope, from_bytes, to_bytes
from flexlora.engines.flower.records import from_records, to_records
from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.flower_run import refuse_for_flower, run_on_flower
from flexlora.experiment.run import run_experiment
from flexlora.experiment.run_folder import ExperimentError
from flexlora.rounds.records import read_records

RANKS = {"north": 2, "south": 4, "west": 3}


class Silos:
    """A Grid whose nodes are clients in this process; ``spoil`` may change the reply of a node in a round."""

    def __init__(self, works: dict[str, ClientWork], spoil: Callable[[str, Envelope], Any] | None = None) -> None:
        self.nodes = dict(enumerate(works, start=11))
        self.works, self.spoil, self.sent = works, spoil, dict[str, Message]()

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            self.sent[message.metadata.message_id] = message
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for message in (self.sent[one] for one in message_ids):
            name = self.nodes[message.metadata.dst_node_id]
            reply = from_bytes(self.works[name].answer(to_bytes(from_records(message.content))))
            if self.spoil is not None and reply.kind == "update":
                reply = self.spoil(name, reply)
            replies.append(Message(to_records(reply), reply_to=message))
        return replies


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silos")
    for name in RANKS:
        lines = [
            {"instruction": f"Say {name} {number}", "response": f"{name} {number % 7}", "kind": f"kind{number % 3}"}
            for number in range(24)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def config_of(silos: Path, **changes: Any) -> Config:
    types = {f"rank-{rank}": {"attention": rank, "ffn": rank} for rank in RANKS.values()}
    tree: dict[str, Any] = {
        "seed": 3,
        "model": {"num_threads": 1, "num_processes": 1},
        "data": {
            "name": "instructions",
            "path": str(silos),
            "partition": "natural",
            "client_from": "file",
            "label_column": "kind",
            "unseen_labels": ["kind2"],
            "max_length": 64,
            "validation_examples": 0,
        },
        "clients": {
            "types": types,
            "distribution": dict.fromkeys(types, 1.0),
            "assigned": {name: f"rank-{rank}" for name, rank in RANKS.items()},
        },
        "rounds": {"num_rounds": 3, "cohort_size": 2, "wire_dtype": "bfloat16"},
        "method": {"name": "flexlora", "error_compensation": True, "fold_tail": True},
        "training": {"max_steps": 2},
        "evaluation": {
            "every": 3,
            "max_new_tokens": 1,
            "local_only_clients": 0,
            "rank_group_clients": 0,
            "fedit_reference": False,
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree.get(section, {}), name: value} if name else value
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def works(silos: Path) -> dict[str, ClientWork]:
    return {
        name: ClientWork(ClientSettings(name, silos / f"{name}.jsonl", uniform_plan(rank), num_threads=1))
        for name, rank in RANKS.items()
    }


@pytest.fixture(scope="module")
def simulated(silos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "run"
    run_experiment(config_of(silos), folder)
    return folder


def adapter_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return the change of each module in a run's largest adapter."""
    loaded = read_adapter(folder / "adapters" / f"rank-{max(RANKS.values())}")
    return {module: own.scaling * own.B.double() @ own.A.double() for module, own in loaded.items()}


def assert_same_end(one: Path, other: Path, tolerance: float) -> None:
    changes, expected = adapter_in(one), adapter_in(other)
    assert changes.keys() == expected.keys()
    for module, change in changes.items():
        assert torch.linalg.norm(change - expected[module]) <= tolerance * torch.linalg.norm(expected[module]), module


def outcomes(folder: Path) -> list[list[tuple[str, str]]]:
    records = read_records(folder / "records.jsonl")
    return [[(client.client_id, client.outcome) for client in record.clients] for record in records]


def test_a_federation_ends_with_the_adapters_of_the_simulation(
    silos: Path, works: dict[str, ClientWork], simulated: Path, tmp_path: Path
) -> None:
    config = config_of(silos, deployment__min_clients=3)
    result = run_on_flower(config, tmp_path / "run", lambda: nullcontext(Silos(works)))  # type: ignore[arg-type]
    assert result.has_progress and result.server_round == 3 and result.report.is_file()
    assert outcomes(tmp_path / "run") == outcomes(simulated)
    # Factors travel in bfloat16, so an update may differ by its rounding where float32 differs in the last bit.
    assert_same_end(tmp_path / "run", simulated, 2e-3)
    ours, theirs = (read_records(folder / "records.jsonl")[1:] for folder in (tmp_path / "run", simulated))
    assert [(one.up_bytes, one.down_bytes) for one in ours] == [(one.up_bytes, one.down_bytes) for one in theirs]


def test_a_server_that_was_stopped_goes_on_with_the_same_cohorts_to_the_same_end(
    silos: Path, works: dict[str, ClientWork], simulated: Path, tmp_path: Path
) -> None:
    folder, config = tmp_path / "run", config_of(silos, deployment__min_clients=3)

    class Killed(BaseException):
        pass

    def kill_in_round_2(name: str, reply: Envelope) -> Envelope:
        if reply.fields["server_round"] == 2:
            raise Killed
        return reply

    with pytest.raises(Killed):
        run_on_flower(config, folder, lambda: nullcontext(Silos(works, kill_in_round_2)))  # type: ignore[arg-type]
    assert len(outcomes(folder)) == 2
    run_on_flower(config, folder, lambda: nullcontext(Silos(works)), resume=True)  # type: ignore[arg-type]
    assert outcomes(folder) == outcomes(simulated)
    assert_same_end(folder, simulated, 2e-3)


def test_secure_sums_need_no_other_transport(silos: Path, works: dict[str, ClientWork], tmp_path: Path) -> None:
    shown: list[Envelope] = []

    def look(name: str, reply: Envelope) -> Envelope:
        shown.append(reply)
        return reply

    config = config_of(silos, privacy={"secure_sum": {}}, rounds__cohort_size=3, rounds__num_rounds=2)
    run_experiment(config, tmp_path / "simulated")
    result = run_on_flower(config, tmp_path / "run", lambda: nullcontext(Silos(works, look)))  # type: ignore[arg-type]
    assert result.has_progress and not shown, "no client ever sends an update"
    assert outcomes(tmp_path / "run") == outcomes(tmp_path / "simulated")
    # What is left is stochastic rounding to fixed point, with the same seeds.
    assert_same_end(tmp_path / "run", tmp_path / "simulated", 1e-3)


def test_too_few_survivors_leave_the_state_as_it_was_and_the_record_says_so(
    silos: Path, works: dict[str, ClientWork], tmp_path: Path
) -> None:
    def broken(name: str, reply: Envelope) -> Envelope:
        is_spoilt = name == "north" or reply.fields["server_round"] > 1
        return Envelope("update", reply.fields, b"garbage") if is_spoilt else reply

    config = config_of(silos, rounds__cohort_size=3, rounds__min_updates=3, rounds__max_failed_rounds=2)
    result = run_on_flower(config, tmp_path / "run", lambda: nullcontext(Silos(works, broken)))  # type: ignore[arg-type]
    first, second = read_records(tmp_path / "run" / "records.jsonl")[1:]
    assert first.note is not None and "2 clients survived, of rounds.min_updates=3" in first.note
    assert [client.stage for client in first.clients] == ["validate", None, None]
    assert second.note == "no client survived; the state was kept"
    assert not result.has_progress and result.stopped is not None


def test_a_run_without_clients_says_how_many_it_waited_for(silos: Path, tmp_path: Path) -> None:
    config = config_of(silos, deployment__wait_seconds=0.1)
    with pytest.raises(ExperimentError, match=r"needs 2 clients .* and 0 connected in 0.1 s"):
        run_on_flower(config, tmp_path / "run", lambda: nullcontext(Silos({})))  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_what_only_simulations_can_do_is_refused_before_anything_is_loaded(silos: Path, tmp_path: Path) -> None:
    config = config_of(silos, method={"name": "fedsa_lora"})
    with pytest.raises(ConfigError, match="keep a part of their models"):
        run_on_flower(config, tmp_path / "run", lambda: nullcontext(Silos({})))  # type: ignore[arg-type]


def test_noise_that_clients_could_take_off_is_refused(silos: Path, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    differential = {"clip": 1.0, "noise_multiplier": 1.0, "noise_seed": 7}
    config = config_of(silos, privacy={"differential": differential}, rounds__checkpoint_every=2)
    with pytest.raises(ConfigError) as caught:
        run_on_flower(config, tmp_path / "run", lambda: nullcontext(Silos({})))  # type: ignore[arg-type]
    assert "noise_seed must be a secret where clients are real" in str(caught.value)
    assert "set rounds.checkpoint_every=1" in str(caught.value)
    refuse_for_flower(config_of(silos, privacy={"differential": {**differential, "noise_seed": 2**64 - 1}}))
