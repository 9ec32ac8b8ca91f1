"""Which files of a folder are training data, what becomes of the others, and whose name an owner has."""

import gzip
import json

import pytest

from flexlora.data.data_files import data_files, kind_of, owner_of
from flexlora.data.data_notes import DataNotes
from flexlora.data.instruction_files import READERS, read_rows


def folder_of(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"prompt": "p", "completion": "c"}\n', encoding="utf-8")
    return root


def found(folder, notes=None):
    files = data_files(folder, READERS, notes or DataNotes())
    return ["/".join(file.relative_to(folder).parts) for file in files]


def test_capital_letters_and_compressions_are_endings_like_others(tmp_path):
    names = ["a.JSONL", "b.Json", "c.jsonl.gz", "d.JSONL.ZST", "e.csv.bz2", "f.parquet", "g.tsv", "h.ndjson.xz"]
    assert found(folder_of(tmp_path, *names)) == names
    assert kind_of(tmp_path / "c.v2.jsonl.gz").stem == "c.v2"


def test_hidden_folders_are_not_read_and_every_file_left_out_is_named(tmp_path):
    folder_of(tmp_path, "site.jsonl", ".ipynb_checkpoints/site-checkpoint.jsonl", "._site.jsonl", "notes.txt")
    folder_of(tmp_path, "sub/.git/x.json", "dataset_infos.json", "sub/old.xlsx", "__MACOSX/site.jsonl")
    notes = DataNotes()
    assert found(tmp_path, notes) == ["site.jsonl"]
    assert set(notes.skipped) == {
        *(".ipynb_checkpoints", "._site.jsonl", "notes.txt", "sub/.git", "dataset_infos.json", "sub/old.xlsx"),
        "__MACOSX",
    }
    text = " ".join(notes.sentences())
    assert all(name in text for name in notes.skipped)


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["train.jsonl", "test.jsonl", "validation.jsonl"], ["train.jsonl"]),
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"], ["data/train-00000-of-00001.jsonl"]),
        (["train/a.jsonl", "dev/a.jsonl"], ["train/a.jsonl"]),
        (["my_train_file.jsonl", "my_test_file.jsonl"], ["my_train_file.jsonl"]),
    ],
)
def test_splits_beside_training_data_are_left_out_as_datasets_does(tmp_path, names, kept):
    datasets = pytest.importorskip("datasets")
    folder_of(tmp_path, *names)
    notes = DataNotes()
    assert found(tmp_path, notes) == kept
    assert set(notes.skipped) == set(names) - set(kept)
    train = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path.with_name("cache")))
    assert len(train) == len(list(read_rows(tmp_path)))


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        (
            "train",
            ["tests", "holdout", "Hold-Out", "heldout", "held_out", "unseen", "evals", "dev-set", "valset", "test2"],
        ),
        ("trainset", ["testset", "validset"]),
        ("dataTrain", ["dataTest", "dataDev"]),
        ("train_data", ["testData", "unseen_tasks", "test/a"]),
    ],
)
def test_every_word_for_held_out_data_is_known_beside_training_data(tmp_path, train, held_out):
    folder_of(tmp_path, *(f"{name}.jsonl" for name in (train, "north", *held_out)))
    notes = DataNotes()
    assert sorted(found(tmp_path, notes)) == sorted([f"{train}.jsonl", "north.jsonl"])
    assert set(notes.skipped) == {f"{name}.jsonl" for name in held_out}


def test_words_that_only_contain_one_for_held_out_data_are_no_splits(tmp_path):
    names = ["contest.jsonl", "devices.jsonl", "latest.jsonl", "train.jsonl", "valley.jsonl"]
    assert found(folder_of(tmp_path, *names)) == names


def test_a_compressed_copy_is_not_read_a_second_time_and_named(tmp_path):
    folder_of(tmp_path, "north.jsonl", "south.csv.gz", "empty.jsonl", "sub/north.jsonl.gz")
    for name in ("north.jsonl.gz", "north.JSONL.xz", "south.csv.bz2", "empty.jsonl.gz"):
        (tmp_path / name).write_bytes(b"not read")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    notes = DataNotes()
    assert set(found(tmp_path, notes)) == {"empty.jsonl.gz", "north.jsonl", "south.csv.gz", "sub/north.jsonl.gz"}
    assert notes.skipped == {
        "north.jsonl.gz": "the same as north.jsonl, which is read",
        "north.JSONL.xz": "the same as north.jsonl, which is read",
        "south.csv.bz2": "the same as south.csv.gz, which is read",
        "empty.jsonl": "the same as empty.jsonl.gz, which is read",
    }


def test_files_of_one_name_that_become_one_owner_are_noted(tmp_path):
    folder_of(tmp_path, "north.jsonl", "west/north.jsonl", "south.jsonl")
    (tmp_path / "north.csv").write_text("prompt,completion\np,c\n", encoding="utf-8")
    notes = DataNotes()
    assert [row.file for row in read_rows(tmp_path, notes)].count("north") == 2
    (sentence,) = notes.sentences()
    assert sentence.startswith("Read together: north.csv and north.jsonl; files of one name are one owner")


def test_files_without_rows_are_named(tmp_path):
    folder_of(tmp_path, "north.jsonl")
    for name, content in (("east.jsonl", ""), ("b.csv", "prompt,completion\n"), ("c.csv", ""), ("d.json", "[]")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    notes = DataNotes()
    assert {row.file for row in read_rows(tmp_path, notes)} == {"north"}
    assert notes.sentences() == ("Not read (no rows): b.csv, c.csv, d.json, east.jsonl.",)


def test_a_test_in_the_name_of_an_owner_is_no_split(tmp_path):
    names = ["blood_test.jsonl", "north.jsonl"]
    assert found(folder_of(tmp_path, *names)) == names
    folder_of(tmp_path, "test.jsonl")
    assert found(tmp_path) == names
    only = folder_of(tmp_path / "only", "test.jsonl", "validation.jsonl")
    assert found(only) == ["test.jsonl", "validation.jsonl"]


def test_owners_are_the_names_of_files_below_the_folder(tmp_path):
    folder_of(tmp_path, "north.jsonl", "west/ward 3.jsonl")
    (tmp_path / "south.jsonl.gz").write_bytes(gzip.compress(json.dumps({"prompt": "p", "completion": "c"}).encode()))
    assert sorted({row.file for row in read_rows(tmp_path)}) == ["north", "south", "west/ward 3"]
    assert owner_of(tmp_path / "west" / "ward 3.jsonl", tmp_path) == "west/ward 3"


def test_what_save_to_disk_wrote_is_read_and_its_caches_are_not(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"p {n}", "completion": f"c {n}"} for n in range(5)]
    saved = datasets.Dataset.from_list(rows)
    saved.select([3, 1]).save_to_disk(str(tmp_path / "one"))
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"not read")
    assert [row.fields for row in read_rows(tmp_path / "one")] == [rows[3], rows[1]]
    splits = datasets.DatasetDict({"train": saved, "test": saved.select([0])})
    splits.save_to_disk(str(tmp_path / "two"))
    notes = DataNotes()
    assert [row.fields for row in read_rows(tmp_path / "two", notes)] == rows
    assert "test/data-00000-of-00001.arrow" in notes.skipped


def test_a_clone_of_a_hub_data_set_is_read_without_its_descriptions(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "data").mkdir()
    for split, size in (("train", 4), ("test", 2)):
        table = pyarrow.Table.from_pylist([{"prompt": f"{split} {n}", "completion": "c"} for n in range(size)])
        parquet.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}', encoding="utf-8")
    (tmp_path / "README.md").write_text("# A data set", encoding="utf-8")
    folder_of(tmp_path, ".cache/huggingface/x.json")
    assert [row.fields["prompt"] for row in read_rows(tmp_path)] == [f"train {n}" for n in range(4)]
