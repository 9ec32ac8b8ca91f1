"""Checkpoints read back to the same bits, appear atomically, and a damaged one is passed over."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flexlora.checkpoint import Checkpoint, CheckpointError, load_latest, save_checkpoint
from flexlora.lora.factors import LoraFactors
from flexlora.lora.product import Spectrum


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


def test_a_half_written_checkpoint_is_not_seen_and_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".round-0003.partial").mkdir()
    (tmp_path / ".round-0003.partial" / "state.json").write_text("{")
    assert load_latest(tmp_path, TYPES) is None
    save_checkpoint(tmp_path, Checkpoint(3, example_state(1), {}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["round-0003"]


def test_it_is_an_error_when_no_checkpoint_can_be_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(1, None, {}), keep=1)
    (tmp_path / "round-0001" / "state.json").write_text("")
    with pytest.raises(CheckpointError, match="no checkpoint can be read; start anew with --overwrite"):
        load_latest(tmp_path, TYPES)


def test_a_state_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="may not hold a set"):
        save_checkpoint(tmp_path, Checkpoint(1, {"a": {1, 2}}, {}), keep=1)
