"""Files that grow at their end and are read through a mapping."""

import pytest

from flexlora.data.mapped_file import MappedFile, MappedFileError


def test_what_is_appended_is_read_back_and_views_stay_good_when_the_file_grows():
    file = MappedFile()
    first = file.append(b"abc")
    view = file.view(first, 3)
    second = file.append(b"x" * 3_000_000)
    assert (first, second, file.size) == (0, 3, 3_000_003)
    assert bytes(file.view(second + 2_999_998, 2)) == b"xx" and bytes(view) == b"abc"
    assert bytes(file.view(second, 0)) == b""


def test_a_file_that_exists_is_continued(tmp_path):
    path = tmp_path / "file"
    MappedFile(path).append(b"lost without a flush")
    first = MappedFile(path)
    first.append(b"abc")
    first.flush()
    second = MappedFile(path)
    assert second.append(b"def") == 3 and bytes(second.view(1, 4)) == b"bcde"


def test_a_file_that_ends_too_early_is_reported_by_name(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"abc")
    with pytest.raises(MappedFileError, match="short ends before byte 9"):
        MappedFile(path, writable=False).view(1, 8)
