"""A folder goes to the hub through the hub's own library, or stays with a message that says what to do."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from flexlora.adapters.hub import check_repo_id, push_folder
from flexlora.adapters.peft_format import AdapterError


def test_the_model_is_made_where_there_is_none_and_the_folder_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def create(api: HfApi, repo_id: str, *, exist_ok: bool) -> str:
        asked.append((repo_id, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def upload(api: HfApi, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        asked.append((repo_id, folder_path))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert push_folder(tmp_path, "us/adapter") == "https://huggingface.co/us/adapter"
    assert asked == [("us/adapter", True), ("us/adapter", tmp_path)]


@pytest.mark.parametrize("error", [OSError("offline\nmore"), HfHubHTTPError.__new__(HfHubHTTPError), ValueError("401")])
def test_what_the_hub_does_not_take_is_explained_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(HfApi, "create_repo", fail)
    with pytest.raises(AdapterError, match=r"the hub did not take us/adapter \(.*hf auth login.*hf upload us/adapter"):
        push_folder(tmp_path, "us/adapter")
    assert tmp_path.is_dir()


@pytest.mark.parametrize("name", ["a/b/c", "with space", "/abs/path", "-x/y", "a..b", "", "x" * 200])
def test_an_id_that_cannot_be_one_is_refused_before_anything_is_sent(name: str) -> None:
    with pytest.raises(AdapterError, match="the hub id must look like org/name; got"):
        check_repo_id(name)
