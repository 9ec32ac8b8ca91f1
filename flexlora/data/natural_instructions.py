"""Reads tasks in the schema of Super-Natural Instructions (arXiv:2204.07705), one file a task.

Generated tasks of the same schema are read by ``parse_task``, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.data.data_files import data_files, kind_of
from flexlora.data.data_notes import DataNotes
from flexlora.data.data_streams import opened_bytes
from flexlora.data.examples import Example
from flexlora.data.found_values import abridged
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.surrogates import whole_value
from flexlora.errors import FlexLoraError
from flexlora.foreign import ForeignError, read_json

LANGUAGE_KEYS = ("Input_language", "Output_language", "Instruction_language")


class NaturalInstructionsError(FlexLoraError, ValueError):
    """A task file is broken, or the selection of tasks cannot be met."""


@dataclass(frozen=True)
class Task:
    """One task as parsed: no two examples have the same input.

    Attributes:
        task_id: File name without ``.json``.
        definition: What to do, in natural language.
        examples: Its instances; those with the same input are one example that accepts the answers of all.
        category: First of its categories, empty if none is given.
        languages: Every language its fields name; empty when the file has no such fields.
        num_unanswered: Instances left out because they have no answer.
        num_repeated: Instances whose input had occurred before in the task.
    """

    task_id: str
    definition: str
    examples: tuple[Example, ...]
    category: str = ""
    languages: frozenset[str] = frozenset()
    num_unanswered: int = 0
    num_repeated: int = 0


def read_tasks(path: Path | str, notes: DataNotes | None = None) -> Iterator[Task]:
    """Yield the tasks of a folder of ``*.json`` files, perhaps compressed, or of the ``tasks`` folder in it, by name.

    One task is in memory at a time: the original corpus has five million instances.

    Args:
        path: The folder.
        notes: Told which files are not read, and how many tasks hold halves of surrogate pairs, which are replaced.

    Raises:
        NaturalInstructionsError: There is no such folder, it holds no task, or a file is broken.
    """
    folder = Path(path).expanduser()
    if (folder / "tasks").is_dir():
        folder = folder / "tasks"
    notes = DataNotes() if notes is None else notes
    files = data_files(folder, (".json",), notes, deep=False, splits=False)
    if not files:
        state = "holds no .json file" if folder.is_dir() else "does not exist"
        raise NaturalInstructionsError(
            f"data.path must be a folder of task files or hold one named tasks; {folder} {state}"
        )
    for file in files:
        try:
            with opened_bytes(file) as content:
                fields = read_json(content.read(), file)
        except (OSError, ForeignError, InstructionDataError) as error:
            reason = error.reason if isinstance(error, ForeignError) else error
            raise NaturalInstructionsError(
                f"{file} must be JSON in UTF-8 ({reason}); repair the file or take it out of the folder"
            ) from error
        whole = whole_value(fields)
        notes.num_repaired += whole is not fields
        yield parse_task(kind_of(file).stem, whole, str(file))


def parse_task(task_id: str, fields: object, source: str = "") -> Task:
    """Return the task that one file, or one generated mapping of the same schema, describes.

    Outer white space of texts is removed. Keys beyond ``Definition``, ``Instances``, ``Categories`` and the language
    fields are ignored.

    Args:
        fields: The parsed JSON.
        source: What error messages call it; the task id by default.

    Raises:
        NaturalInstructionsError: A key is missing or holds something else than the schema says.
    """
    source = source or task_id
    if not isinstance(fields, Mapping):
        raise NaturalInstructionsError(f"{source}: a task must be a JSON object; got {type(fields).__name__}")
    definition = " ".join(_texts(fields, "Definition", source)).strip()
    if not definition:
        raise NaturalInstructionsError(f"{source}: Definition must say what to do; got an empty text")
    instances = fields.get("Instances")
    if not isinstance(instances, Sequence) or isinstance(instances, str) or not instances:
        held = "no such key" if "Instances" not in fields else abridged(instances)
        raise NaturalInstructionsError(f"{source}: Instances must be a list with at least one instance; got {held}")
    answers: dict[str, dict[str, None]] = {}
    num_unanswered = 0
    for number, instance in enumerate(instances):
        place = f"{source}: instance {number}"
        if not isinstance(instance, Mapping):
            raise NaturalInstructionsError(f"{place} must be an object of input and output; got {abridged(instance)}")
        text = instance.get("input")
        if not isinstance(text, str):
            raise NaturalInstructionsError(f"{place}: input must be a text; got {abridged(text)}")
        outputs = [output.strip() for output in _texts(instance, "output", place) if output.strip()]
        if outputs:
            answers.setdefault(text.strip(), {}).update(dict.fromkeys(outputs))
        else:
            num_unanswered += 1
    categories = _texts(fields, "Categories", source) if "Categories" in fields else []
    return Task(
        task_id=task_id,
        definition=definition,
        examples=tuple(Example(definition, text, tuple(outputs)) for text, outputs in answers.items()),
        category=categories[0].strip() if categories else "",
        languages=frozenset(name for key in LANGUAGE_KEYS if key in fields for name in _texts(fields, key, source)),
        num_unanswered=num_unanswered,
        num_repeated=len(instances) - num_unanswered - len(answers),
    )


def _texts(fields: Mapping[str, object], key: str, place: str) -> list[str]:
    """Return a field that real files hold as a text or as a list of texts."""
    if key not in fields:
        raise NaturalInstructionsError(f"{place}: must have the key {key}; got the keys {', '.join(map(str, fields))}")
    value = fields[key]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise NaturalInstructionsError(f"{place}: {key} must be a text or a list of texts; got {abridged(value)}")
    return [str(text) for text in value]
