"""What a client can be started with, and what it is told instead."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from flexlora.engines.flower.certificates import make_certificates
from flexlora.errors import FlexLoraError
from flexlora.experiment.client_order import ClientRequest, client_setup
from flexlora.verbs.client import memory_in_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("client")
    make_certificates(folder / "fed", [], ["north", "south"])
    (folder / "rows.jsonl").write_text("{}")
    return folder


@pytest.fixture
def request_of(folder: Path) -> ClientRequest:
    key = folder / "fed" / "clients" / "north.key"
    return ClientRequest("fed.example.org:9440", folder / "rows.jsonl", authority=folder / "fed" / "ca.pem", key=key)


def test_a_client_is_called_after_its_key_and_keeps_its_state_under_that_name(request_of: ClientRequest) -> None:
    setup = client_setup(request_of)
    assert setup.order.client_id == "north"
    assert setup.folder == Path("runs/clients/north")
    assert client_setup(replace(request_of, name="other")).order.client_id == "other"


def test_a_folder_of_certificates_stands_for_both_files(folder: Path, request_of: ClientRequest) -> None:
    bare = replace(request_of, authority=None, key=None, certificates=folder / "fed")
    setup = client_setup(replace(bare, name="south"))
    assert setup.authority == folder / "fed" / "ca.pem"
    assert setup.key == folder / "fed" / "clients" / "south.key"
    with pytest.raises(FlexLoraError, match="has 2: north, south"):
        client_setup(bare)


def test_a_client_of_this_machine_may_do_without_tls(request_of: ClientRequest) -> None:
    bare = replace(request_of, authority=None, key=None, insecure=True)
    setup = client_setup(replace(bare, server="localhost:9440"))
    assert setup.authority is None
    assert setup.order.client_id == "rows"
    with pytest.raises(FlexLoraError, match="for this machine only"):
        client_setup(bare)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"server": None}, "needs --server HOST:PORT"),
        ({"data": None}, "needs --data"),
        ({"data": Path("/none/rows.jsonl")}, "there is none at /none/rows.jsonl"),
        ({"server": "https://fed:1"}, "must be HOST:PORT"),
        ({"server": "fed:99999"}, "must be HOST:PORT"),
        ({"rank": 0}, "--rank must be at least 1"),
        ({"rank": 4, "memory_bytes": 1}, "leave one out"),
        ({"round_seconds": -1.0}, "--round-seconds must be"),
        ({"device": "gpu"}, "--device must be"),
        ({"key": None}, "--key NAME.key"),
        ({"authority": Path("/none/ca.pem")}, "there is none at /none/ca.pem"),
        ({"key": Path("/none/x.key")}, "No such file"),
        ({"name": "a/b"}, "name of a client must be"),
        ({"server": "localhost:1", "insecure": True}, "uses no certificates"),
    ],
)
def test_what_is_missing_or_wrong_is_told_with_the_fix(
    request_of: ClientRequest, change: dict[str, object], words: str
) -> None:
    with pytest.raises(FlexLoraError, match=words):
        client_setup(replace(request_of, **change))


def test_a_key_that_others_may_read_is_refused(folder: Path, request_of: ClientRequest) -> None:
    key = folder / "fed" / "clients" / "south.key"
    key.chmod(0o644)
    try:
        with pytest.raises(FlexLoraError, match="chmod 600"):
            client_setup(replace(request_of, key=key))
    finally:
        key.chmod(0o600)


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * 2**30), ("500 MB", 500_000_000), ("1.5gb", 1_500_000_000), ("auto", None)]
)
def test_memory_is_a_number_with_a_unit(text: str, size: int | None) -> None:
    assert memory_in_bytes(text) == size


@pytest.mark.parametrize("text", ["8", "GiB", "-1GB", "0MB", "8 Gbit", "1e3GB"])
def test_other_texts_are_no_memory(text: str) -> None:
    with pytest.raises(FlexLoraError, match="--memory must be a number above 0 with a unit"):
        memory_in_bytes(text)
