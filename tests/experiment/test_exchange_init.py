"""A run over files begins whole or not at all."""

import json
from pathlib import Path

import pytest

from flexlora.engines.exchange_client import open_broadcast
from flexlora.engines.exchange_manifest import ExchangeError
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.exchange_init import begin_exchange
from flexlora.experiment.exchange_run import open_exchange
from flexlora.rounds.records import read_records
from flexlora.training.base_digest import base_digest


def config_of(**sections: object) -> Config:
    types = {"small": {"attention": 1, "ffn": 0}, "large": {"attention": 4, "ffn": 4}}
    return parse_config({"clients": {"types": types, "distribution": {"small": 1, "large": 1}}, **sections}, "the test")


def test_a_run_begins_with_one_adapter_for_each_rank_plan(tmp_path: Path) -> None:
    config = config_of(lora={"scaling": "rslora", "lora_alpha": 2}, rounds={"wire_dtype": "bfloat16"})
    begun = begin_exchange(config, tmp_path / "run")
    assert begun.ranks == {"small": 1, "large": 4} and begun.clients == ()
    run = open_exchange(tmp_path / "run")
    assert run.record.run_id == begun.run_id and run.record.base_sha256 == base_digest("embedded")
    for name, place in begun.broadcasts.items():
        opened = open_broadcast(place)
        plan = run.plans[name].resolve(run.shapes)
        assert {path: own.rank for path, own in opened.sent.trainable.items()} == plan
        assert (opened.manifest.plan, opened.manifest.server_round, opened.manifest.rank) == (
            name,
            1,
            begun.ranks[name],
        )
        # The server's initial factors, cut to the plan: PEFT's, whose B is zero.
        assert all(not own.B.any() and own.A.any() for own in opened.sent.trainable.values())
    assert [record.evaluation for record in read_records(tmp_path / "run" / "records.jsonl")] == [None]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["base_model"], manifest["num_clients"]) == ("embedded", 0)


def test_what_a_client_is_told_holds_nothing_of_the_servers_machine_or_other_clients(tmp_path: Path) -> None:
    data = {"name": "instructions", "path": str(tmp_path / "secret"), "columns": {"instruction": "question"}}
    clients = {**config_of().clients.model_dump(), "assigned": {"clinic-of-secrets": "small"}}
    begun = begin_exchange(config_of(data=data, clients=clients), tmp_path / "run")
    for place in begun.broadcasts.values():
        for path in place.rglob("*"):
            if path.is_file():
                assert b"secret" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()
    assert open_broadcast(begun.broadcasts["small"]).manifest.run.columns == {"instruction": "question"}


def test_a_run_takes_no_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    (tmp_path / "file").touch()
    for folder, why in (("run", "is neither"), ("file", "is neither"), ("file/run", "is a file")):
        with pytest.raises(ExchangeError, match=why):
            begin_exchange(config_of(), tmp_path / folder)
    (tmp_path / "run" / "mine").unlink()
    begin_exchange(config_of(), tmp_path / "run")


def test_keys_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from flexlora.engines.exchange_keys import make_keys

    public = make_keys(tmp_path / "north")
    (tmp_path / "north.key").write_bytes(public.read_bytes())
    for trusted, why in (([tmp_path / "north.key"], r"must be called NAME.pub"), ([tmp_path / "north"], "public")):
        with pytest.raises(ExchangeError, match=why):
            begin_exchange(config_of(), tmp_path / "run", trusted=trusted)
    with pytest.raises(ExchangeError, match="private"):
        begin_exchange(config_of(), tmp_path / "run", key=public)
    assert not (tmp_path / "run").exists()
