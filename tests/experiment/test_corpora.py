"""Corpora of configurations: what decides them, where they are kept, and what is said to be left out."""

import json
from pathlib import Path

from flexlora.data.corpus_cache import user_cache_folder
from flexlora.data.owned_examples import load_owned_examples
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.corpora import LENGTH_SAMPLE, corpus_of, length_sample
from flexlora.experiment.participants import gather_participants


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


def config_of(**sections: object) -> Config:
    return parse_config(sections, "test")


def test_only_tasks_in_the_languages_asked_for_take_part(tmp_path: Path) -> None:
    for number in range(12):
        language = ("English", "Hindi")[number % 2]
        task = {
            "Definition": [f"Say {number}."],
            "Categories": ["Saying"],
            "Input_language": [language],
            "Instances": [{"input": f"{number}, {case}", "output": ["yes"]} for case in range(12)],
        }
        (tmp_path / f"task{number:02d}.json").write_text(json.dumps(task))
    data = {"name": "natural_instructions", "path": str(tmp_path), "num_unseen_tasks": 2}
    everything = gather_participants(config_of(data=data))
    assert (len(everything.clients), everything.warnings) == (10, ())
    english = gather_participants(config_of(data={**data, "languages": ["English"]}))
    names = {client.client_id for client in english.clients} | english.corpus.unseen.keys()
    assert names == {f"task{number:02d}" for number in range(0, 12, 2)}
    assert english.warnings == ("Left out: 6 tasks in other languages.",)


def test_generated_examples_are_kept_by_default_and_those_of_others_only_when_asked(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"instruction": "say {n}", "response": "b {n}"}}\n' for n in range(40)))
    own = {"name": "instructions", "path": str(rows), "num_clients": 2, "min_examples": 3}
    generated = {"name": "generated", "num_clients": 20, "examples_per_task": 10}
    kept = gather_participants(config_of(data=generated)).corpus
    assert kept.folder is not None and kept.folder.parent == user_cache_folder()
    assert gather_participants(config_of(data={**generated, "cache": "none"})).corpus.folder is None
    assert gather_participants(config_of(data=own)).corpus.folder is None
    asked = {**own, "cache": str(tmp_path / "cache")}
    first, second = (gather_participants(config_of(data=asked)).corpus for _ in range(2))
    assert first == second and first.folder == second.folder and second.folder.parent == tmp_path / "cache"
    rows.write_text(rows.read_text().replace("b 7", "b changed"))
    changed = gather_participants(config_of(data=asked)).corpus
    assert changed.hashes["clients"] != first.hashes["clients"] or changed.hashes["unseen"] != first.hashes["unseen"]
    assert changed.folder != first.folder


PHONE_BOOK = {"name": "phone_book", "num_clients": 8, "facts_per_client": 3}
COUNTS = {"distribution": "uniform", "counts": {"type1": 2, "type2": 2, "type3": 2, "type4": 2}}


def test_facts_are_grouped_by_the_type_of_their_owner() -> None:
    data = {**PHONE_BOOK, "facts_by_type": {"type4": 20}}
    found = gather_participants(config_of(data=data, clients=COUNTS))
    plans = {client.client_id: client.plan.name for client in found.clients}
    assert sorted(plans.values()) == sorted([*COUNTS["counts"]] * 2)
    for name, task in found.corpus.unseen.items():
        assert task.category == found.corpus.clients[name].category == plans[name]
        assert len(task.test) == (20 if plans[name] == "type4" else 3)
    assert len(found.validation) == 2 * (20 + 3 * 3)


def test_facts_are_grouped_by_the_device_of_their_owner_where_ranks_come_from_devices() -> None:
    found = gather_participants(
        config_of(data=PHONE_BOOK, clients={"ranks_from": "devices"}, devices={"profiles": "built_in"})
    )
    devices = {client.client_id: client.device for client in found.clients}
    assert devices and all(found.corpus.unseen[name].category == device for name, device in devices.items())


def test_a_number_of_facts_is_dealt_evenly_and_a_sample_of_all_validates() -> None:
    data = {"name": "phone_book", "num_clients": 8, "num_facts": 26, "validation_examples": 16}
    found = gather_participants(config_of(data=data))
    assert sorted(len(own.train) for own in found.corpus.clients.values()) == [3] * 6 + [4] * 2
    assert len({example.input for example in found.validation}) == 16


def test_the_seed_of_a_run_changes_owners_and_that_of_the_corpus_changes_facts() -> None:
    def facts(**settings: object) -> tuple[set[str], dict[str, str]]:
        corpus, _ = corpus_of(config_of(data={**PHONE_BOOK, "corpus_seed": settings.pop("corpus_seed", 0)}, **settings))
        return {row.input for own in corpus.clients.values() for row in own.train}, dict(corpus.hashes)

    first, again, owners, book = facts(), facts(), facts(seed=1), facts(corpus_seed=1)
    assert first == again
    assert owners[0] == first[0] and owners[1] != first[1]
    assert not book[0] & first[0]


def test_a_phone_book_is_kept_only_when_asked_and_apart_from_one_with_other_owners(tmp_path: Path) -> None:
    assert corpus_of(config_of(data=PHONE_BOOK))[0].folder is None
    asked = {**PHONE_BOOK, "cache": str(tmp_path)}
    kept, again = (corpus_of(config_of(data=asked, clients=COUNTS))[0] for _ in range(2))
    assert kept.folder == again.folder and kept.hashes == again.hashes
    other = corpus_of(config_of(data=asked, clients={"distribution": {"type1": 1.0}}))[0]
    assert other.folder != kept.folder
