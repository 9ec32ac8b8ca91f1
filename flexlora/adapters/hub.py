"""Puts a written folder on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from flexlora.adapters.peft_format import AdapterError


def check_repo_id(repo_id: str) -> None:
    """Raise unless ``repo_id`` reads like that of a model on the hub: ``org/name``.

    Raises:
        AdapterError: Naming the rule.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise AdapterError(f"the hub id must look like org/name; got {repo_id!r}: {reason}") from error


def push_folder(folder: Path, repo_id: str) -> str:
    """Upload a folder as the model ``repo_id``, which is made if there is none, and return its address.

    Raises:
        AdapterError: If the hub does not take it; the folder stays as it is.
    """
    check_repo_id(repo_id)
    api = HfApi()
    try:
        url = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload with flexlora")
    except Exception as error:  # the hub's errors have no base of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise AdapterError(
            f"the hub did not take {repo_id} ({reason[:300]}): log in with `hf auth login`, or set HF_TOKEN to a token "
            f"that may write there; {folder} is complete, `hf upload {repo_id} {folder}` sends it"
        ) from error
    return str(url)
