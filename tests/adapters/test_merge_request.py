"""Requests that make no sense are refused before anything is read or written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flexlora.adapters.merge import merge
from flexlora.adapters.together import MergeError

Check = Callable[..., None]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": [1]}, "weights must be one per adapter, 2 here; got 1"),
        ({"weights": [1, -1]}, r"must be finite and positive for method=mean \(use sum for signed ones\); got 1, -1"),
        ({"weights": [1, 0], "method": "sum"}, "must be finite and other than 0; got 1, 0"),
        ({"weights": [1, float("nan")]}, "weights must be finite"),
        ({"weights": [1, None]}, r"weights must be numbers, one per adapter, as \[3, 1\]; got \[1, None\]"),
        ({"weights": "12"}, "weights must be numbers, .*; got '12'"),
        ({"weights": [1, "2"]}, "weights must be numbers"),
        ({"weights": [1, 10**400]}, "weights must be numbers"),
        ({"weights": 2.0}, "weights must be numbers, .*; got 2.0"),
        ({"method": "ties"}, "method must be one of mean, sum; got ties"),
        ({"missing": "skip"}, "missing must be one of zero, renormalise; got skip"),
        ({"accuracy": "perfect"}, "accuracy must be one of exact, fast; got perfect"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16; got int8"),
        ({"missing": "renormalise", "method": "sum"}, "use method=mean"),
        ({"rank": 2, "exact": True}, "only one of rank, energy and exact"),
        ({"rank": 0}, "rank must be a whole number of at least 1; got 0"),
        ({"rank": 2.0}, "rank must be a whole number of at least 1; got 2.0"),
        ({"rank": "3"}, "rank must be a whole number of at least 1; got '3'"),
        ({"rank": True}, "rank must be a whole number of at least 1; got True"),
        ({"energy": 1.5}, "energy must be a share above 0 and up to 1; got 1.5"),
        ({"energy": "0.9"}, "energy must be a share above 0 and up to 1; got '0.9'"),
        ({"device": "abacus"}, "device must be cpu, cuda or cuda:N; got abacus"),
        ({"device": "meta"}, "device must be cpu, cuda or cuda:N; got meta"),
        ({"device": "cuda:99"}, "device cuda:99 is not there; use cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_requests_that_make_no_sense_are_refused(
    plain: Path, options: dict[str, object], match: str, assert_refused: Check
) -> None:
    assert_refused([plain, plain], match, **options)


def test_nothing_to_merge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="at least one adapter"):
        merge([], out=tmp_path / "out")
    with pytest.raises(MergeError, match="adapters must be a list of folders or hub ids; got only one"):
        merge("one", out=tmp_path / "out")


def test_a_folder_that_exists_is_never_touched(plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(MergeError, match="out must not exist yet"):
        merge([plain], out=target)
    target.rmdir()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(MergeError, match=r"out must not exist yet; .*link does"):
        merge([plain], out=tmp_path / "link")
    (tmp_path / "link").unlink()
    weights = plain / "adapter_model.safetensors"
    with pytest.raises(MergeError, match=r"safetensors is a file; a folder is needed there; got out=.*"):
        merge([plain], out=weights / "parent" / "out")

    def appear(done: int, total: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "thesis.txt").write_text("years of work")

    with pytest.raises(OSError, match="out cannot be written, and nothing of it was: Directory not empty"):
        merge([plain], out=target, notify=appear)
    assert [path.name for path in target.iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-0", "out"]
