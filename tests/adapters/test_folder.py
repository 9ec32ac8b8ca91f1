"""Adapter folders are opened where they are adapters, cost no memory, and say what is wrong where they are not."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flexlora.adapters.folder import open_adapter
from flexlora.adapters.merge import merge
from flexlora.adapters.peft_format import AdapterError

Check = Callable[..., None]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(mixed: list[Path], value: float, assert_refused: Check) -> None:
    path = mixed[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[key][3, 1] = value
    save_file(tensors, path)
    assert_refused(mixed, rf"adapter-1: {key} must be finite; it holds NaN or infinity")


def test_pickles_and_folders_that_are_no_adapters_are_refused(
    plain: Path, tmp_path: Path, assert_refused: Check
) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused([tmp_path / "empty"], "must be a PEFT adapter folder with adapter_config.json and adapter_model")
    assert_refused([tmp_path / "nowhere"], "nowhere must be a PEFT adapter folder")
    (plain / "adapter_model.safetensors").rename(plain / "adapter_model.bin")
    assert_refused([plain], "adapter_model.bin is a pickle, which can run code when it is read")


def test_a_name_that_reads_like_a_hub_id_is_asked_for_there(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    pickled = shutil.copytree(plain, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").unlink()
    files = {"us/pickled": ["adapter_config.json", "adapter_model.bin"]}
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo_id, revision: files[repo_id])

    def download(repo_id: str, allow_patterns: list[str], revision: str | None) -> str:
        asked.append((repo_id, allow_patterns))
        if repo_id == "us/here":
            return str(plain)
        if repo_id == "us/pickled":
            return str(pickled)
        raise OSError("offline\nmuch more text")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    result = merge(["us/here"], out=tmp_path / "out")
    assert result.adapters == ("us/here",)
    assert asked == [("us/here", ["adapter_config.json", "adapter_model.safetensors"])]
    with pytest.raises(AdapterError, match=r"^us/gone is no local folder, and the hub did not give it \(offline\)$"):
        merge(["us/gone"], out=tmp_path / "other")
    with pytest.raises(AdapterError, match="must be a PEFT adapter folder"):
        merge(["./us/gone"], out=tmp_path / "other")
    assert len(asked) == 2
    with pytest.raises(AdapterError, match=r"^us/pickled: weights must be in .*; adapter_model.bin is a pickle"):
        merge(["us/pickled"], out=tmp_path / "other")


def test_an_id_may_name_a_revision_and_folders_of_a_repository_are_named(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo_id: str, allow_patterns: list[str], revision: str | None = None) -> str:
        asked.append((repo_id, revision))
        return str(plain if repo_id == "us/here" else tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    merge(["us/here@v1.0"], out=tmp_path / "out")
    merge(["us/here@refs/pr/3"], out=tmp_path / "other")
    assert asked == [("us/here", "v1.0"), ("us/here", "refs/pr/3")]
    files = ["README.md", "lora/a/adapter_config.json", "lora/b/adapter_config.json"]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo_id, revision=None: files)
    with pytest.raises(AdapterError, match=r"^us/many@v2 must hold .*in folders: lora/a, lora/b: fetch one \(hf downl"):
        merge(["us/many@v2"], out=tmp_path / "refused")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs somebody who may not read every file")
def test_files_that_must_not_be_read_are_named_as_such(plain: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (plain / name).chmod(0)
        with pytest.raises(PermissionError, match=f"Permission denied: .*{name}"):
            merge([plain], out=plain.parent / "out")
        (plain / name).chmod(0o644)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files where the system lists them")
def test_open_adapters_hold_no_file_descriptors_and_no_copies(plain: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    managers = [open_adapter(plain) for _ in range(40)]
    adapters = [manager.__enter__() for manager in managers]
    factors = [adapter.factors("model.layers.0.self_attn.q_proj") for adapter in adapters]
    assert len(os.listdir("/proc/self/fd")) == before
    mapped = Path("/proc/self/maps").read_text().splitlines()
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in mapped
        if line.endswith(str(plain / "adapter_model.safetensors"))
    ]
    for pair in factors:
        assert any(low <= pair.A.data_ptr() < high for low, high in ranges)
    for manager in managers:
        manager.__exit__(None, None, None)
