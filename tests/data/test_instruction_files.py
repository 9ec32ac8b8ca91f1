"""Rows of columns from JSON, JSON lines, CSV, parquet, folders and the hub, and the errors of broken files."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pytest

from flexlora.data.data_notes import DataNotes
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.instruction_files import read_fields


def rows(num):
    return [{"instruction": f"question {n}", "context": "", "response": f"answer {n}"} for n in range(num)]


def write_lines(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def read(path):
    return [fields for _, fields in read_fields(path)]


def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path):
    content = rows(7)
    (tmp_path / "list.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    write_lines(tmp_path / "lines.json", content)
    write_lines(tmp_path / "lines.jsonl", content)
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(content[0]))
        writer.writeheader()
        writer.writerows(content)
    for file in tmp_path.iterdir():
        assert read(file) == content, file


def test_parquet_files_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat}]), tmp_path / "chat.parquet")
    assert read(tmp_path / "chat.parquet") == [{"messages": chat}]
    (tmp_path / "chat.parquet").write_bytes(b"no parquet")
    with pytest.raises(InstructionDataError, match=r"chat.parquet must be a parquet file"):
        read(tmp_path / "chat.parquet")


def test_a_folder_is_all_its_files_in_order(tmp_path):
    (tmp_path / "part").mkdir()
    write_lines(tmp_path / "b.jsonl", rows(2))
    write_lines(tmp_path / "part" / "c.jsonl", rows(3))
    (tmp_path / "README.md").write_text("no data", encoding="utf-8")
    assert len(read(tmp_path)) == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "data.jsonl",
            '\n{"prompt": "p", "completion": "c"}\n{',
            "data.jsonl, line 3: must be one JSON object per line",
        ),
        ("data.jsonl", "7", "data.jsonl, line 1: a row must be a JSON object of columns; got 7"),
        ("data.json", "[{", r"data.json must be JSON"),
        ("data.json", "[" * 100_000, r"data.json must be JSON"),
        ("data.jsonl", '{"a": ' + "[" * 100_000, r"data.jsonl, line 1: must be one JSON object per line"),
        ("data.jsonl", f'{{"a": {"9" * 5000}}}', r"data.jsonl, line 1: must be one JSON object per line"),
        (
            "data.csv",
            'prompt,completion\np,c\n"p,q",c,d',
            "data.csv, line 3: must have the 2 columns of the header; got 3",
        ),
        ("data.csv", 'prompt,completion\n"p" q,c', "data.csv, line 2: not valid CSV"),
        ("data.xlsx", "x", "files must end in .json, .jsonl, .* or one of these with .gz"),
    ],
)
def test_a_broken_file_is_refused_by_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InstructionDataError, match=message):
        read(tmp_path / name)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InstructionDataError, match="must be a readable file in UTF-8"):
        read(tmp_path / "data.jsonl")


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "nowhere.jsonl", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused_before_the_hub_is_asked(path):
    with pytest.raises(InstructionDataError, match="there is no file or folder"):
        read(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InstructionDataError, match="must hold files that end in"):
        read(tmp_path)


def test_a_hub_data_set_is_read_and_its_failure_explained(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [{"prompt": name, "completion": split}])
    assert read("org/name") == [{"prompt": "org/name", "completion": "train"}]

    def fail(name, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InstructionDataError, match=r"org/name is no local file .*no route.*; check name and network"):
        read("org/name")


def test_compressed_files_are_read_as_what_is_in_them(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    lines = "".join(json.dumps(row) + "\n" for row in rows(3)).encode()
    for name, content in (("a.jsonl.gz", gzip.compress(lines)), ("b.jsonl.bz2", bz2.compress(lines))):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines))
    with pyarrow.CompressedOutputStream(str(tmp_path / "d.JSONL.ZST"), "zstd") as file:
        file.write(lines)
    table = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows(3)), table)
    (tmp_path / "e.parquet.gz").write_bytes(gzip.compress(table.getvalue()))
    for file in tmp_path.iterdir():
        assert read(file) == rows(3), file
    for name, content in (("a.jsonl.gz", lines), ("b.jsonl.bz2", lines), ("c.jsonl.xz", lines), ("d.JSONL.ZST", lines)):
        (tmp_path / name).write_bytes(content[:40])
        with pytest.raises(InstructionDataError, match=f"{name} must be a whole, readable file"):
            read(tmp_path / name)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(InstructionDataError, match="must be a whole, readable file"):
        read(tmp_path / "a.jsonl.gz")


def test_cells_longer_than_the_csv_module_takes_by_itself_are_read(tmp_path):
    content = [{"prompt": "p", "completion": "word " * 40_000}]
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(content)
    assert read(tmp_path / "table.csv") == content


def test_line_ends_in_cells_and_blank_lines_before_the_header_are_as_the_standard_says(tmp_path):
    # RFC 4180, section 2.6: fields with line breaks are enclosed in double quotes.
    (tmp_path / "table.csv").write_bytes(b'\r\nprompt,completion\r\n"a\r\nb","""c"""\r\n')
    assert read(tmp_path / "table.csv") == [{"prompt": "a\r\nb", "completion": '"c"'}]
    (tmp_path / "table.tsv").write_text("prompt\tcompletion\na, b\tc\n", encoding="utf-8")
    assert read(tmp_path / "table.tsv") == [{"prompt": "a, b", "completion": "c"}]
    # Line separators of Unicode and single carriage returns end no line of JSON.
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a\u2028\x85b", "completion": "c"}\r\n', encoding="utf-8")
    assert read(tmp_path / "lines.jsonl") == [{"prompt": "a\u2028\x85b", "completion": "c"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "prompt,completion,prompt\na,b,c\n", "t.csv, line 1: every column must have a name of its own; 'pro"),
        ("t.jsonl", '{"prompt": "a", "prompt": "b"}', "t.jsonl, line 1: .*the key 'prompt' occurs twice"),
        ("t.json", '[{"prompt": "a", "prompt": "b"}]', "t.json must be JSON .*the key 'prompt' occurs twice"),
        ("t.jsonl", '{"a":' * 100_000, "t.jsonl, line 1: must be one JSON object per line"),
    ],
)
def test_two_values_under_one_name_and_endless_nesting_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InstructionDataError, match=message):
        read(tmp_path / name)


def test_halves_of_surrogate_pairs_are_replaced_and_counted(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "\\ud83d", "n": 1}\n{"prompt": "\\ud83d\\ude00"}\n', encoding="utf-8")
    notes = DataNotes()
    assert [fields for _, fields in read_fields(tmp_path / "t.jsonl", notes)] == [
        {"prompt": "\ufffd", "n": 1},
        {"prompt": "😀"},
    ]
    assert notes.num_repaired == 1
    assert any("1 rows or tasks held halves of surrogate pairs" in sentence for sentence in notes.sentences())


def test_a_failure_of_the_hub_is_told_whole(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(name, split):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InstructionDataError, match=r"Please pick one among the available configs: \['main'"):
        read("org/name")


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.ndjson", "d.jsonl.gz", "d.csv", "d.parquet", "d.arrow"])
def test_the_pointer_of_git_lfs_is_recognised_in_every_kind_of_file(tmp_path, name):
    # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22\nsize 12345\n"
    (tmp_path / name).write_text(pointer, encoding="utf-8")
    with pytest.raises(InstructionDataError, match=f"{name} is a git-lfs pointer, .*: run `git lfs pull`"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["d.jsonl", "d.ndjson", "d.json", "d.jsonl.gz", "d.jsonl.zst"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("begin", ["", "\ufeff", "\n \n"])
def test_one_list_is_read_as_rows_whatever_the_name_of_its_file(tmp_path, name, indent, begin):
    content = (begin + json.dumps(rows(3), indent=indent)).encode()
    if name.endswith("zst"):
        with pytest.importorskip("pyarrow").CompressedOutputStream(str(tmp_path / name), "zstd") as file:
            file.write(content)
    else:
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / name) == rows(3)
