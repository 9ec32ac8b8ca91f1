"""Corpora of configurations: what decides them, where they are kept, and what is said to be left out."""

import json

from flexlora.data.owned_examples import load_owned_examples
from flexlora.experiment.config import Config
from flexlora.experiment.corpora import LENGTH_SAMPLE, corpus_of, length_sample


def rows(num=60):
    return [{"owner": f"o{n % 3}", "instruction": f"q {n}", "response": f"a {n}" if n else ""} for n in range(num)]


def config(path, **data):
    settings = {"name": "instructions", "path": str(path), "partition": "natural", "client_column": "owner"}
    return Config.model_validate({"data": settings | {"unseen_fraction": 0.0} | data})


def write(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return path


def test_rows_of_a_file_become_the_corpus_that_the_same_examples_give(tmp_path):
    corpus, warnings = corpus_of(config(write(tmp_path / "rows.jsonl")))
    expected, _ = load_owned_examples(rows(), Config.model_fields["seed"].default)
    assert corpus.hashes == expected.hashes
    assert warnings == ("Left out: 1 rows without prompt or answer.",)


def test_other_peoples_texts_are_kept_only_on_request(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    assert corpus_of(config(path))[0].folder is None
    kept, _ = corpus_of(config(path, cache=str(tmp_path / "kept")))
    assert kept.folder is not None and kept.folder.parent == tmp_path / "kept"
    again, warnings = corpus_of(config(path, cache=str(tmp_path / "kept"), template="plain"))
    assert again.folder == kept.folder and warnings
    other, _ = corpus_of(config(path, cache=str(tmp_path / "kept"), min_examples=5))
    assert other.folder != kept.folder


def test_one_example_of_each_client_tells_how_long_texts_are(tmp_path):
    corpus, _ = corpus_of(config(write(tmp_path / "rows.jsonl")))
    assert length_sample(corpus) == [splits.train[0] for splits in corpus.clients.values()]
    assert LENGTH_SAMPLE >= len(corpus.clients)
