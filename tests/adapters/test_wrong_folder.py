"""What is no adapter but can be recognised is named, with what to do."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flexlora.adapters.merge import merge
from flexlora.adapters.peft_format import AdapterError

Check = Callable[..., None]
# The text of the specification of git-lfs.
POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


def test_a_folder_with_adapters_below_names_them(plain: Path, tmp_path: Path, assert_refused: Check) -> None:
    run = tmp_path / "runs" / "demo"
    for rank in (2, 16):
        shutil.copytree(plain, run / "adapters" / f"rank-{rank}")
    for folder in (run, run / "adapters"):
        with pytest.raises(AdapterError, match=r"holds adapters in folders below, .*: .*adapters/rank-16, .*rank-2$"):
            merge([folder], out=tmp_path / "out")
    for number in range(7):
        shutil.copytree(plain, tmp_path / "many" / f"checkpoint-{number}")
    with pytest.raises(AdapterError, match=r"checkpoint-4, \.\.\.$"):
        merge([tmp_path / "many"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (POINTER, "is a git-lfs pointer, not the file itself: run `git lfs pull`"),
        ("<!doctype html><html>Log in</html>", "is a web page, not the file itself"),
        ("", "is empty: copy or download it again"),
        ("PK\x03\x04", "is a zip archive or a pickle"),
    ],
    ids=["pointer", "page", "empty", "zip"],
)
def test_a_file_that_is_something_else_is_called_so(
    plain: Path, file: str, content: str, match: str, assert_refused: Check
) -> None:
    (plain / file).write_text(content)
    assert_refused([plain], f"{file} {match}")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (["config.json", "model.safetensors"], "it is a whole model: a LoRA adapter must be extracted first"),
        (["adapter_config.json"], "adapter_model.safetensors is missing, was it copied or downloaded whole"),
        (["adapter_model.safetensors"], "adapter_config.json is missing"),
        (["pytorch_lora_weights.safetensors"], "LoRA in another format than PEFT's"),
        (["lora.gguf"], "LoRA in another format than PEFT's"),
        (["config.yaml", "records.jsonl"], "the folder of a run without adapters: flexlora export"),
        ([], "adapter_model.safetensors$"),
    ],
)
def test_a_folder_that_is_something_else_is_called_so(tmp_path: Path, files: list[str], match: str) -> None:
    (tmp_path / "given").mkdir()
    for name in files:
        (tmp_path / "given" / name).write_text("{}")
    with pytest.raises(AdapterError, match=match):
        merge([tmp_path / "given"], out=tmp_path / "out")


def test_a_file_and_an_address_say_what_to_give(plain: Path, tmp_path: Path) -> None:
    for name, match in (
        (plain / "adapter_model.safetensors", f"that is a file, give the folder: {plain}$"),
        (tmp_path / "nowhere", "there is no such folder$"),
        ("https://huggingface.co/us/adapter", "give the hub id: us/adapter$"),
        ("https://huggingface.co/us/adapter/tree/v2", "give the hub id: us/adapter@v2$"),
    ):
        with pytest.raises(AdapterError, match=match):
            merge([name], out=tmp_path / "out")
