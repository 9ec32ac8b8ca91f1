"""A Grid in this process whose nodes are real ClientApps, and a small federation of two silos for it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from flexlora.data.pretraining import EMBEDDED_BASE
from flexlora.engines.flower.client_settings import ClientSettings, uniform_plan
from flexlora.engines.flower.client_work import ClientWork
from flexlora.engines.flower.envelope import Envelope, from_bytes, to_bytes
from flexlora.engines.flower.records import from_records, to_records
from flexlora.engines.flower.run_settings import RunSettings, training_record
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_digest import base_digest
from flexlora.training.base_model import load_base_model, target_modules
from flexlora.training.one_client import LocalTraining

TRAINING = LocalTraining(batch_size=4, max_steps=2)
SEED = 7
SUPERLINK = 1


class LocalGrid(Grid):
    """A Grid whose nodes answer in this process, when their reply is asked for.

    ``nodes`` maps node ids to functions from request to reply. ``faults`` maps a node id to what its train requests
    meet: ``silent`` (never answered), an ``Error``, or a function of the reply's envelope.
    """

    def __init__(self, nodes: dict[int, Callable[[bytes], bytes]]) -> None:
        self.nodes, self.faults = nodes, dict[int, Any]()
        self.sent: dict[str, Message] = {}
        self.most_pulled, self.num_messages = 0, 0

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **fields: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *args: Any, **fields: Any) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.num_messages += 1
            ids.append(name := f"message-{self.num_messages}")
            message.metadata.__dict__["_message_id"] = name
            self.sent[name] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = [reply for one in message_ids if one in self.sent for reply in self._replies(one)]
        self.most_pulled = max(self.most_pulled, len(replies))
        return replies

    def _replies(self, name: str) -> list[Message]:
        message = self.sent[name]
        node_id = message.metadata.dst_node_id
        fault = self.faults.get(node_id) if message.metadata.message_type == "train" else None
        if isinstance(fault, str):
            return []
        del self.sent[name]
        if isinstance(fault, Error):
            reply = Message(fault, reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK
            return [reply]
        request = to_bytes(from_records(message.content))
        answered = from_bytes(self.nodes[node_id](request))
        content = to_records(answered) if fault is None else fault(answered)
        if fault is not None and isinstance(content, Envelope):
            content = to_records(content)
        reply = Message(content, reply_to=message)
        return [reply, reply] if fault is not None and getattr(fault, "twice", False) else [reply]


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the identity of a ServerApp, without which flwr makes no messages."""
    for name, value in {"_run_id": 1, "_node_id": SUPERLINK, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture(scope="session")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a file of rows for each of two clients."""
    folder = tmp_path_factory.mktemp("silos")
    for name in ("north", "south"):
        lines = [
            json.dumps({"instruction": f"Say {name} {number}", "response": f"{name} {number % 7}"})
            for number in range(24)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def flower_run() -> RunSettings:
    return RunSettings(
        run_id="run-1",
        seed=SEED,
        base_model=EMBEDDED_BASE,
        base_sha256=base_digest("embedded"),
        dtype="float32",
        dropout=0.0,
        largest_rank=8,
        target_modules="all-linear",
        scaling="constant_alpha",
        lora_alpha=16.0,
        template="alpaca",
        max_length=128,
        loss_on="answers",
        wire_dtype="bfloat16",
        training=training_record(TRAINING),
    )


@pytest.fixture(scope="session")
def embedded() -> AdaptedModel:
    return AdaptedModel(*load_base_model("embedded", dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def first_broadcast(embedded: AdaptedModel) -> Callable[[int], Broadcast]:
    """Returns a maker of the first broadcast at a rank."""
    modules = target_modules(embedded.network, "all-linear")

    def make(rank: int) -> Broadcast:
        return Broadcast(embedded.initial_adapter(dict.fromkeys(modules, rank), Scaling("constant_alpha", 16.0), 1))

    return make


@pytest.fixture(scope="session")
def silo_works(silos: Path) -> dict[str, ClientWork]:
    """Return the work of both clients, of ranks 2 and 4."""
    plans = {"north": uniform_plan(2), "south": uniform_plan(4)}
    return {name: ClientWork(ClientSettings(name, silos / f"{name}.jsonl", plan)) for name, plan in plans.items()}


@pytest.fixture
def grid(silo_works: dict[str, ClientWork]) -> LocalGrid:
    """Return a Grid with both clients on nodes 11 and 12."""
    return LocalGrid({11: silo_works["north"].answer, 12: silo_works["south"].answer})


@pytest.fixture
def empty_context() -> Callable[[dict[str, Any]], Context]:
    """Returns a maker of contexts with a node configuration."""
    return lambda node_config: Context(1, 11, node_config, RecordDict(), {})
