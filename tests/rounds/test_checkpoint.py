"""Checkpoints read back to the same bits, appear atomically, and a damaged one is passed over."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from flexlora.errors import FlexLoraError
from flexlora.lora.factors import LoraFactors
from flexlora.lora.product import Spectrum
from flexlora.rounds import checkpoint
from flexlora.rounds.checkpoint import Checkpoint, CheckpointError, load_latest, replace_progress, save_checkpoint


@dataclass(frozen=True)
class ExampleState:
    spectra: dict[str, Spectrum]
    rounds: int
    ratio: float
    name: str | None
    parts: tuple[LoraFactors, ...]


TYPES = (ExampleState, Spectrum, LoraFactors)


def example_state(seed: int) -> ExampleState:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    spectrum = Spectrum(whole[:, :2], whole[0, :2].abs(), whole[:2], tail=0.1)
    factors = LoraFactors(torch.randn(2, 4, generator=generator).bfloat16(), torch.zeros(6, 2), 1 / 3)
    return ExampleState({"layers.0.q": spectrum}, 3, 0.1 + 0.2, None, (factors,))


def test_a_state_reads_back_to_the_same_bits(tmp_path: Path) -> None:
    state = example_state(0)
    save_checkpoint(tmp_path, Checkpoint(7, state, {"loop": {"best": 0.1}}), keep=2)
    loaded = load_latest(tmp_path, TYPES)
    assert loaded is not None
    assert (loaded.server_round, loaded.progress) == (7, {"loop": {"best": 0.1}})
    assert (loaded.state.rounds, loaded.state.ratio, loaded.state.name) == (3, 0.1 + 0.2, None)
    before, after = state.spectra["layers.0.q"], loaded.state.spectra["layers.0.q"]
    assert after.tail == before.tail
    for name in ("U", "S", "Vh"):
        assert torch.equal(getattr(before, name), getattr(after, name))
        assert getattr(after, name).dtype == torch.float64
    assert loaded.state.parts[0].scaling == 1 / 3
    assert torch.equal(loaded.state.parts[0].A, state.parts[0].A)
    assert loaded.state.parts[0].A.dtype == torch.bfloat16


def test_tensors_that_share_memory_are_copied_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, alone = torch.arange(6.0).reshape(2, 3), torch.ones(2, 2)
    copied: list[tuple[int, ...]] = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: copied.append(tuple(tensor.shape)) or clone(tensor))
    state = {"whole": whole, "again": whole, "row": whole[1], "column": whole[:, 1], "alone": alone}
    save_checkpoint(tmp_path, Checkpoint(1, state, {}), keep=1)
    assert copied == [(2, 3), (3,)]
    loaded = load_latest(tmp_path, ())
    assert loaded is not None
    assert loaded.state.keys() == state.keys()
    assert all(torch.equal(loaded.state[name], tensor) for name, tensor in state.items())


def test_the_file_holds_what_safetensors_makes_of_the_tensors(tmp_path: Path) -> None:
    state = {"b": torch.arange(3.0), "a": torch.ones(2, 2).bfloat16(), "empty": torch.zeros(0, 4)}
    save_checkpoint(tmp_path, Checkpoint(1, state, {}), keep=1)
    expected = safetensors.torch.save({f"state/{name}": tensor for name, tensor in state.items()})
    files = sorted((tmp_path / "round-0001").iterdir())
    assert [path.name for path in files] == ["state.json", "state.safetensors"]
    assert files[1].read_bytes() == expected
    assert files[0].stat().st_mode == files[1].stat().st_mode


def test_a_disk_that_gives_out_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(tmp_path, Checkpoint(1, example_state(0), {}), keep=1)
    assert load_latest(tmp_path, TYPES) is None


def test_progress_is_replaced_and_the_state_stays(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(4, example_state(0), {"loop": 1, "record": "half"}), keep=1)
    before = (tmp_path / "round-0004" / "state.safetensors").stat()
    same = ("st_ino", "st_mtime_ns", "st_size")  # Not the time of reading, which reading changes.
    replace_progress(tmp_path, 4, {"loop": 2})
    loaded = load_latest(tmp_path, TYPES)
    assert loaded is not None
    assert (loaded.server_round, loaded.progress) == (4, {"loop": 2})
    assert torch.equal(loaded.state.parts[0].A, example_state(0).parts[0].A)
    after = (tmp_path / "round-0004" / "state.safetensors").stat()
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]
    assert sorted(path.name for path in (tmp_path / "round-0004").iterdir()) == ["state.json", "state.safetensors"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for server_round in range(5):
        save_checkpoint(tmp_path, Checkpoint(server_round, None, {}), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-0003", "round-0004"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    for server_round in (1, 2):
        save_checkpoint(tmp_path, Checkpoint(server_round, example_state(server_round), {}), keep=2)
    tensors = tmp_path / "round-0002" / "state.safetensors"
    content = tensors.read_bytes()
    if damage == "truncate":
        tensors.write_bytes(content[:-5])
    elif damage == "flip":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        tensors.unlink()
    else:
        (tmp_path / "round-0002" / "state.json").write_text("{")
    loaded = load_latest(tmp_path, TYPES)
    assert loaded is not None
    assert loaded.server_round == 1


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_any_flipped_bit_makes_the_checkpoint_before_count(tmp_path: Path, name: str) -> None:
    for server_round in (1, 2):
        save_checkpoint(tmp_path, Checkpoint(server_round, example_state(server_round), {"loop": {"n": 3}}), keep=2)
    path = tmp_path / "round-0002" / name
    whole = path.read_bytes()
    # A prime step meets every kind of byte and every bit.
    for bit in range(0, 8 * len(whole), 37):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        loaded = load_latest(tmp_path, TYPES)
        assert loaded is not None and loaded.server_round == 1, f"bit {bit}"


def test_progress_is_not_replaced_in_a_damaged_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(1, None, {"loop": 10}), keep=1)
    path = tmp_path / "round-0001" / "state.json"
    path.write_bytes(path.read_bytes().replace(b"10", b"11"))
    with pytest.raises(FlexLoraError, match="it does not have the digest at its own end"):
        replace_progress(tmp_path, 1, {})


def test_a_checkpoint_of_the_earlier_format_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(1, example_state(0), {"loop": 1}), keep=1)
    path = tmp_path / "round-0001" / "state.json"
    description = json.loads(path.read_bytes())
    del description["digest"]
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="says format 2 and has no digest of itself"):
        load_latest(tmp_path, TYPES)
    path.write_text(json.dumps({**description, "format_version": 1}))
    loaded = load_latest(tmp_path, TYPES)
    assert loaded is not None and torch.equal(loaded.state.parts[0].A, example_state(0).parts[0].A)


def test_a_checkpoint_under_the_name_of_another_round_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(1, None, {}), keep=1)
    (tmp_path / "round-0001").rename(tmp_path / "round-0007")
    with pytest.raises(CheckpointError, match="is that of round 1; was it copied"):
        load_latest(tmp_path, TYPES)


def test_a_damaged_checkpoint_does_not_outlive_the_older_one_that_took_its_place(tmp_path: Path) -> None:
    for server_round in (5, 10):
        save_checkpoint(tmp_path, Checkpoint(server_round, None, {}), keep=2)
    (tmp_path / "round-0010" / "state.json").write_text("")
    save_checkpoint(tmp_path, Checkpoint(7, None, {}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["round-0007"]


def test_a_reader_beside_a_live_run_finds_the_checkpoint_that_took_the_place_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, Checkpoint(1, None, {}), keep=1)
    read, saved = checkpoint._read, []

    def overtaken(folder: Path, types: object) -> Checkpoint:
        if not saved:
            saved.append(save_checkpoint(tmp_path, Checkpoint(2, None, {}), keep=1))
        return read(folder, types)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "_read", overtaken)
    loaded = load_latest(tmp_path, ())
    assert loaded is not None and loaded.server_round == 2


def test_a_half_written_checkpoint_is_not_seen_and_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".round-0003.partial").mkdir()
    (tmp_path / ".round-0003.partial" / "state.json").write_text("{")
    assert load_latest(tmp_path, TYPES) is None
    save_checkpoint(tmp_path, Checkpoint(3, example_state(1), {}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["round-0003"]


def test_it_is_an_error_when_no_checkpoint_can_be_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(1, None, {}), keep=1)
    (tmp_path / "round-0001" / "state.json").write_text("")
    with pytest.raises(CheckpointError, match="no checkpoint can be read; put a copy of the folder back"):
        load_latest(tmp_path, TYPES)


def test_a_state_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="may not hold a set"):
        save_checkpoint(tmp_path, Checkpoint(1, {"a": {1, 2}}, {}), keep=1)
