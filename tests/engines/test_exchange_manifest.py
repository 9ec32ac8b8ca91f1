"""Folders of other organisations are what their manifest says, or are refused by name."""

import hashlib
import os
from pathlib import Path

import pytest

from flexlora.engines.exchange_manifest import (
    MOST_ENTRIES,
    ExchangeError,
    FileFacts,
    ReplyManifest,
    check_files,
    facts_of,
    manifest_text,
    read_manifest_file,
    read_regular,
)
from flexlora.foreign import ForeignError

HEX = "0123456789abcdef"
WEIGHTS, CONFIG = b"weights", b"{}"


def reply(files: dict[str, FileFacts], **changes: object) -> ReplyManifest:
    told: dict[str, object] = {
        "run_id": HEX * 2,
        "server_round": 2,
        "base_sha256": HEX * 4,
        "config_sha256": HEX * 4,
        "plan": "small",
        "rank": 2,
        "scalings": {},
        "client": "north",
        "num_examples": 5,
        "started_from": HEX * 4,
    }
    return ReplyManifest(**told, files=files, **changes)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of a reply with a manifest; the files mean nothing."""
    place = tmp_path / "reply"
    place.mkdir()
    (place / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (place / "adapter_config.json").write_bytes(CONFIG)
    (place / "round.json").write_text(manifest_text(reply(facts_of(place))))
    return place


def check(folder: Path, most_bytes: int | None = None) -> None:
    check_files(folder, read_manifest_file(folder, ReplyManifest)[0].files, most_bytes)


def test_a_manifest_lists_every_file_with_the_hash_that_hashlib_gives(folder: Path) -> None:
    manifest, content = read_manifest_file(folder, ReplyManifest)
    assert manifest == reply(facts_of(folder)) and content == (folder / "round.json").read_bytes()
    assert {name: facts.sha256 for name, facts in manifest.files.items()} == {
        "adapter_model.safetensors": hashlib.sha256(WEIGHTS).hexdigest(),
        "adapter_config.json": hashlib.sha256(CONFIG).hexdigest(),
    }
    check(folder)
    # What systems leave behind when folders are copied is nobody's.
    (folder / ".DS_Store").write_text("x")
    check(folder)


def test_files_that_were_changed_cut_removed_or_added_are_refused_by_name(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    for content, why in ((b"wEights", "must have the SHA-256"), (b"weight", "must have 7 bytes; it has 6")):
        weights.write_bytes(content)
        with pytest.raises(ExchangeError, match=why):
            check(folder)
    weights.unlink()
    with pytest.raises(ExchangeError, match=r"adapter_model.safetensors must be there"):
        check(folder)
    weights.write_bytes(WEIGHTS)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ExchangeError, match=r"'adapter_model.bin' must not be there"):
        check(folder)


def test_links_pipes_and_folders_in_place_of_files_are_refused(folder: Path, tmp_path: Path) -> None:
    weights, outside = folder / "adapter_model.safetensors", tmp_path / "secret"
    outside.write_bytes(WEIGHTS)
    weights.unlink()
    weights.symlink_to(outside)
    with pytest.raises(ExchangeError, match="it is a link or a folder"):
        check(folder)
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ExchangeError, match="it is a link or a folder"):
        check(folder)
    with pytest.raises(ExchangeError, match="plain file"):
        read_regular(weights, 100)
    weights.unlink()
    weights.mkdir()
    with pytest.raises(ExchangeError, match="it is a link or a folder"):
        check(folder)
    (folder / "round.json").unlink()
    (folder / "round.json").symlink_to(outside)
    with pytest.raises(ExchangeError, match="plain file"):
        read_manifest_file(folder, ReplyManifest)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "frozen/../../x", "adapter_model.bin", "a\nb"])
def test_a_manifest_cannot_name_files_elsewhere(folder: Path, name: str) -> None:
    facts = FileFacts(sha256=HEX * 4, num_bytes=1)
    with pytest.raises(ExchangeError, match="a manifest may list"):
        check_files(folder, {name: facts})


def test_what_is_larger_than_it_can_be_is_refused_before_it_is_read(folder: Path) -> None:
    with pytest.raises(ExchangeError, match="at most 3 bytes; it is said to have 7"):
        check(folder, most_bytes=3)
    with pytest.raises(ExchangeError, match="at most 10 bytes"):
        read_regular(folder / "round.json", 10)
    for number in range(MOST_ENTRIES + 1):
        (folder / f".{number}").touch()
    with pytest.raises(ExchangeError, match="it holds much more"):
        check(folder)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "deep"),
        ("{", "not valid JSON"),
        ('{"kind": "broadcast"}', "must be that of a reply"),
        ("[]", "must be that of a reply"),
        ('{"kind": "reply"}', "Field required"),
        ('{"kind": "reply", "kind": "reply"}', "occurs twice"),
    ],
)
def test_a_damaged_manifest_is_refused_with_its_reason(folder: Path, text: str, why: str) -> None:
    (folder / "round.json").write_text(text)
    with pytest.raises((ExchangeError, ForeignError), match=why):
        read_manifest_file(folder, ReplyManifest)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_examples": 0},
        {"loss": float("nan")},
        {"loss": 1e300},
        {"server_round": 0},
        {"run_id": "../x"},
        {"more": 1},
    ],
)
def test_values_that_mean_nothing_are_no_manifest(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        ReplyManifest.model_validate({**reply({}).model_dump(), **changes})


def test_folders_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match="it is not there"):
        read_manifest_file(tmp_path / "nowhere", ReplyManifest)
    with pytest.raises(ExchangeError, match="a folder without one"):
        read_manifest_file(tmp_path, ReplyManifest)
