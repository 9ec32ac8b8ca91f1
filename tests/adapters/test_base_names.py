"""A base model has one name on every machine."""

from pathlib import Path

import pytest

from flexlora.adapters.base_names import hub_file, is_gguf, is_path, portable_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("/home/me/models/llama", "llama"),
        ("/home/me/models/llama/", "llama"),
        ("~/models/llama", "llama"),
        ("./llama", "llama"),
        ("models/new/llama", "llama"),
        (r"C:\models\llama", "llama"),
        # As the cache of the hub lays models out.
        (
            "/me/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B/snapshots/4e20de3",
            "meta-llama/Llama-3.2-1B",
        ),
        ("/cache/models--gpt2/snapshots/607a30d/", "gpt2"),
        ("us/model-GGUF/model-Q4_K_M.gguf", "us/model-GGUF"),
        ("us/model-GGUF/q4/model.GGUF", "us/model-GGUF"),
        ("/home/me/model-q4.gguf", "model-q4.gguf"),
        ("./models/model-q4.gguf", "model-q4.gguf"),
    ],
)
def test_a_path_becomes_a_name(name: str, expected: str) -> None:
    assert portable_name(name) == expected
    assert not is_path(expected)


def test_a_folder_that_reads_like_an_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert not is_path("models/llama")
    monkeypatch.chdir(tmp_path)
    assert is_path("models/llama") and portable_name("models/llama") == "llama"
    monkeypatch.chdir(tmp_path / "models" / "llama")
    assert portable_name(".") == "llama"


def test_a_gguf_file_is_here_or_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_file("us/model/q4/file.gguf") == ("us/model", "q4/file.gguf")
    assert hub_file("us/file.gguf") is None and hub_file("./us/model/file.gguf") is None
    (tmp_path / "us" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_file("us/model/file.gguf") is None and portable_name("us/model/file.gguf") == "file.gguf"
    (tmp_path / "folder.gguf").mkdir()
    assert is_gguf("FILE.GGUF") and not is_gguf("folder.gguf") and not is_gguf("us/model-GGUF")
