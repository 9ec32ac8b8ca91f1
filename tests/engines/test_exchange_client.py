"""A client takes the broadcast that is meant, and tells why it cannot train."""

import json
from pathlib import Path

import pytest
import torch

from flexlora.engines.exchange_client import checked_name, name_from, open_broadcast, train_reply
from flexlora.engines.exchange_folder import write_broadcast
from flexlora.engines.exchange_manifest import BroadcastManifest, ExchangeError, ReplyManifest, read_manifest_file
from flexlora.engines.flower.client_settings import ClientSettings
from flexlora.engines.flower.run_settings import RunSettings, training_record
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import Scaling
from flexlora.training.adapted_model import initial_adapter
from flexlora.training.base_digest import base_digest
from flexlora.training.base_model import load_base_model, target_modules
from flexlora.training.one_client import LocalTraining
from flexlora.training.own_loop import as_train_client

RUN = "ab" * 16
MANIFEST = {"run_id": RUN, "config_sha256": "cd" * 32, "server_round": 1, "scalings": {}, "files": {}}


@pytest.fixture(scope="module")
def broadcasts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with broadcasts of ranks 2, 3 and, by another plan, 3."""
    folder, digest = tmp_path_factory.mktemp("round"), base_digest("embedded")
    shapes = target_modules(load_base_model("embedded", dtype="float32", device="cpu")[0], ("q_proj",))
    run = RunSettings(
        run_id=RUN,
        seed=1,
        base_model="flexlora/embedded-llama-1m",
        base_sha256=digest,
        dtype="float32",
        dropout=0.0,
        largest_rank=3,
        target_modules=("q_proj",),
        scaling="constant_alpha",
        lora_alpha=4.0,
        template="plain",
        max_length=64,
        loss_on="answers",
        wire_dtype="float32",
        training=training_record(LocalTraining(max_steps=1)),
    )
    for plan, rank in (("two", 2), ("three", 3), ("also-three", 3)):
        adapter = initial_adapter(shapes, dict.fromkeys(shapes, rank), Scaling("constant_alpha", 4.0), 0)
        told = {**MANIFEST, "plan": plan, "rank": rank, "base_sha256": digest, "learning_rate": 0.1, "run": run}
        write_broadcast(folder / plan, Broadcast(adapter), BroadcastManifest(**told))  # type: ignore[arg-type]
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [json.dumps({"prompt": f"say {number}", "completion": f"{number}"}) for number in range(12)]
    (tmp_path / "north.jsonl").write_text("\n".join(lines))
    return tmp_path / "north.jsonl"


def own(rows: Path, **changes: object) -> ClientSettings:
    return ClientSettings(**{"client_id": "north", "data": rows, "plan": None, "num_threads": 1, **changes})  # type: ignore[arg-type]


def test_a_rank_chooses_among_the_broadcasts_of_a_round(broadcasts: Path) -> None:
    assert open_broadcast(broadcasts, rank=2).manifest.plan == "two"
    assert open_broadcast(broadcasts / "three").manifest.plan == "three"
    assert open_broadcast(broadcasts / "three", rank=3).manifest.rank == 3
    with pytest.raises(ExchangeError, match=r"of rank 4 in .*; it has also-three \(rank 3\), three"):
        open_broadcast(broadcasts, rank=4)
    for rank in (None, 3):
        with pytest.raises(ExchangeError, match="more than one broadcast that fits"):
            open_broadcast(broadcasts, rank=rank)
    with pytest.raises(ExchangeError, match="not there"):
        open_broadcast(broadcasts / "nowhere")


def test_a_reply_says_what_it_was_trained_from_and_on_how_much(broadcasts: Path, rows: Path, tmp_path: Path) -> None:
    opened = open_broadcast(broadcasts / "two")
    update = train_reply(opened, own(rows), tmp_path / "reply")
    told, _ = read_manifest_file(tmp_path / "reply", ReplyManifest)
    # 80 % of twelve rows are trained on; the rest is for scores.
    assert (told.client, told.num_examples, told.steps, told.started_from) == ("north", 10, 1, opened.digest)
    assert told.loss == update.metrics["loss"] and (told.run_id, told.server_round) == (RUN, 1)
    assert opened.reply_manifest("north", 10, float("nan"), 1).loss is None
    with pytest.raises(ExchangeError, match="must not exist yet"):
        train_reply(opened, own(rows), tmp_path / "reply")


def test_a_loop_of_ones_own_trains_in_place_of_the_packages(broadcasts: Path, rows: Path, tmp_path: Path) -> None:
    def loop(model, tokenizer, examples, adapter, settings, seed):  # type: ignore[no-untyped-def]
        assert len(examples) == 10 and settings.learning_rate == 0.1
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.data.fill_(0.25)
        return None, {"loss": 2.0, "steps": 5}

    update = train_reply(
        open_broadcast(broadcasts / "two"), own(rows), tmp_path / "reply", train_one=as_train_client(loop)
    )
    assert all(torch.equal(one.B, torch.full_like(one.B, 0.25)) for one in update.payload.values())
    assert (update.metrics["loss"], update.metrics["steps"]) == (2.0, 5)


def test_what_stops_a_client_is_told_and_nothing_is_written(broadcasts: Path, rows: Path, tmp_path: Path) -> None:
    opened = open_broadcast(broadcasts / "two")
    (tmp_path / "short.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    for changes, why in (
        ({"data": tmp_path / "nowhere.jsonl"}, "there is none at"),
        ({"data": tmp_path / "short.jsonl"}, "at least 3 rows"),
        ({"model": "org/other"}, "same base model"),
        ({"client_id": "../x"}, "one word"),
        ({"device": "cuda:99"}, "cuda"),
    ):
        with pytest.raises(ExchangeError, match=why):
            train_reply(opened, own(rows, **changes), tmp_path / "reply")
        assert not (tmp_path / "reply").exists()


def test_a_client_is_called_like_its_file(rows: Path, tmp_path: Path) -> None:
    assert name_from(rows) == "north" and name_from(tmp_path / "a.b.csv.gz") == "a.b"
    (tmp_path / "ward-7").mkdir()
    assert name_from(tmp_path / "ward-7") == "ward-7" and checked_name("Ωmega") == "Ωmega"
    for name in ("", "a b", "../x", "x" * 101, ".hidden", "a\n"):
        with pytest.raises(ExchangeError, match="one word"):
            checked_name(name)
    with pytest.raises(ExchangeError, match="name it with --name"):
        name_from(tmp_path / "my data.csv")
