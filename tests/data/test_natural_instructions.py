"""Task files of Natural Instructions: what is read, and how broken ones are refused."""

import gzip
import json

import pytest

from flexlora.data.data_notes import DataNotes
from flexlora.data.natural_instructions import NaturalInstructionsError, parse_task, read_tasks


def fields(num=40, category="Reversal", definition="Reverse the text.", **more):
    instances = [{"id": f"i{n}", "input": f"text {n}", "output": [f"{n} txet"]} for n in range(num)]
    return {"Definition": [definition], "Categories": [category], "Instances": instances, **more}


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def inputs(examples):
    return [example.input for example in examples]


def test_a_task_of_the_original_corpus_is_read_as_it_is():
    original = {
        "Contributors": ["Somebody"],
        "Source": ["quoref"],
        "Categories": ["Question Answering", "Second Category"],
        "Reasoning": [],
        "Definition": ["Answer the question. ", "Use the passage."],
        "Input_language": ["English"],
        "Output_language": ["German"],
        "Instruction_language": ["English"],
        "Domains": ["Wikipedia"],
        "Positive Examples": [{"input": "a", "output": "b", "explanation": "c"}],
        "Negative Examples": [],
        "Instances": [
            {"id": "1", "input": "  Passage one? \n", "output": ["yes ", "Yes"]},
            {"id": "2", "input": "Passage two?", "output": "no"},
        ],
        "Instance License": ["MIT"],
    }
    task = parse_task("task001_quoref", original)
    assert task.definition == "Answer the question.  Use the passage."
    assert task.category == "Question Answering"
    assert task.languages == {"English", "German"}
    assert [(e.instruction, e.input, e.outputs) for e in task.examples] == [
        (task.definition, "Passage one?", ("yes", "Yes")),
        (task.definition, "Passage two?", ("no",)),
    ]


def test_definition_and_category_may_be_plain_texts():
    task = parse_task("t", fields(3) | {"Definition": "Reverse it.", "Categories": "Reversal"})
    assert (task.definition, task.category) == ("Reverse it.", "Reversal")


def test_repeated_inputs_become_one_example_that_accepts_all_answers():
    instances = [{"input": "a", "output": ["1"]}, {"input": "a ", "output": ["2", "1"]}, {"input": "b", "output": "3"}]
    task = parse_task("t", fields() | {"Instances": instances})
    assert [(e.input, e.outputs) for e in task.examples] == [("a", ("1", "2")), ("b", ("3",))]
    assert task.num_repeated == 1


def test_instances_without_an_answer_are_left_out_and_counted():
    instances = [{"input": "a", "output": []}, {"input": "b", "output": ["  "]}, {"input": "c", "output": "x"}]
    task = parse_task("t", fields() | {"Instances": instances})
    assert inputs(task.examples) == ["c"]
    assert task.num_unanswered == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Instances": []}, r"broken: Instances must be a list with at least one instance; got \[\]"),
        ({"Instances": "text"}, "Instances must be a list"),
        ({"Definition": [" "]}, "broken: Definition must say what to do; got an empty text"),
        ({"Definition": 7}, "broken: Definition must be a text or a list of texts; got 7"),
        (
            {"Instances": [{"input": "a", "output": "b"}, "c"]},
            "broken: instance 1 must be an object of input and output",
        ),
        ({"Instances": [{"output": "b"}]}, "broken: instance 0: input must be a text; got None"),
        ({"Instances": [{"input": "a"}]}, "broken: instance 0: must have the key output; got the keys input"),
        ({"Instances": [{"input": "a", "output": [1]}]}, r"instance 0: output must be a text or a list of texts; got"),
    ],
)
def test_a_broken_task_is_refused_by_name(change, message):
    with pytest.raises(NaturalInstructionsError, match=message):
        parse_task("broken", fields() | change)


@pytest.mark.parametrize("key", ["Definition", "Instances"])
def test_a_task_without_a_key_is_refused_by_name(key):
    with pytest.raises(NaturalInstructionsError, match=f"broken: .*{key}"):
        parse_task("broken", {name: value for name, value in fields().items() if name != key})


def test_both_the_tasks_folder_and_the_one_above_can_be_read(tmp_path):
    write(tmp_path / "tasks", "task2_b.json", fields())
    write(tmp_path / "tasks", "task1_a.json", fields())
    write(tmp_path / "tasks", "README.md", "no task")
    assert [task.task_id for task in read_tasks(tmp_path)] == ["task1_a", "task2_b"]
    assert [task.task_id for task in read_tasks(tmp_path / "tasks")] == ["task1_a", "task2_b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON in UTF-8"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n", "run `git lfs pull`"),
        ("[" * 100_000, "must be JSON in UTF-8"),
        ("[1]", "a task must be a JSON object; got list"),
        ("{}", "Definition"),
    ],
)
def test_a_broken_file_is_refused_by_its_path(tmp_path, content, message):
    write(tmp_path, "task7.json", content)
    with pytest.raises(NaturalInstructionsError, match=message) as caught:
        list(read_tasks(tmp_path))
    assert str(tmp_path / "task7.json") in str(caught.value)


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(NaturalInstructionsError, match=r"data.path must be a folder of task files.*holds no .json"):
        list(read_tasks(tmp_path))
    with pytest.raises(NaturalInstructionsError, match="does not exist"):
        list(read_tasks(tmp_path / "nowhere"))


def test_task_files_are_read_whatever_their_case_and_compression_and_the_others_named(tmp_path):
    task = {"Definition": ["Do."], "Instances": [{"input": "a\ud83d", "output": ["b"]}]}
    text = json.dumps(task)
    # Words of splits are words like others in the name of a task.
    for name in ("task1_train.json", "task2_test.JSON", "._task1_train.json", "README.md", "task3.jsonl"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "task4.json.gz").write_bytes(gzip.compress(text.encode()))
    notes = DataNotes()
    tasks = list(read_tasks(tmp_path, notes))
    assert [task.task_id for task in tasks] == ["task1_train", "task2_test", "task4"]
    assert {task.examples[0].input for task in tasks} == {"a\ufffd"} and notes.num_repaired == 3
    assert set(notes.skipped) == {"._task1_train.json", "README.md", "task3.jsonl"}
