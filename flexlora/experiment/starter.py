"""Writes a commented configuration that runs, with made-up data where it needs some."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from flexlora.data.generated.tasks import GeneratedTask, all_tasks, as_natural_instructions, split_of
from flexlora.errors import FlexLoraError
from flexlora.files import file_above, write_whole

Starter = Literal["demo", "own-data", "natural-instructions"]
STARTERS = get_args(Starter)
STARTER_FOLDER = Path(__file__).with_name("starters")

NUM_OWNERS, ROWS_OF_AN_OWNER = 6, 48
NUM_TASKS, INSTANCES_OF_A_TASK = 48, 40


class StarterError(FlexLoraError, ValueError):
    """A configuration that cannot be written."""


def write_starter(kind: Starter, folder: Path) -> Path:
    """Write a configuration and its data into a folder, and return the file of the configuration.

    Args:
        kind: What it is about.
        folder: Made if it is not there; what is in it already is never replaced.

    Raises:
        StarterError: If a file that would be written is there, or ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise StarterError(f"DIR must be a folder, made if it is not there; {folder} is a file")
    files = {Path("config.yaml"): _configuration(kind, folder), **_data(kind)}
    if there := [str(folder / name) for name in files if os.path.lexists(folder / name)]:
        raise StarterError(f"nothing is overwritten, and {there[0]} is there already; name another folder")
    if file := next((file for name in files if (file := file_above(folder / name))), None):
        raise StarterError(f"{file} is a file; a folder is needed there: move it, or name another folder")
    for name, text in reversed(files.items()):
        # The configuration comes last: where it is, its data are.
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return folder / "config.yaml"


def _configuration(kind: Starter, folder: Path) -> str:
    text = (STARTER_FOLDER / f"{kind}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    # In comments as it is typed in a shell; as a value in YAML's own quotes where it needs any.
    place = folder.as_posix()
    return "\n".join(_filled(line, place) for line in lines) + "\n"


def _filled(line: str, place: str) -> str:
    before, colon, value = line.partition(": FOLDER")
    if not colon or line.startswith("#"):
        return line.replace("FOLDER", place if place.isprintable() and " " not in place else f"'{place}'")
    rest, comment_mark, comment = value.partition("  #")
    return f"{before}: {json.dumps(place + rest, ensure_ascii=False)}{comment_mark}{comment}"


def _data(kind: Starter) -> Mapping[Path, str]:
    """Return relative path -> text of the data that a configuration comes with."""
    if kind == "own-data":
        return {Path("data") / f"{owner}.jsonl": text for owner, text in _rows_of_owners().items()}
    if kind == "natural-instructions":
        return {
            Path("tasks") / f"task{number:03d}_{task.task_id.replace('-', '_')}.json": json.dumps(
                as_natural_instructions(task, INSTANCES_OF_A_TASK, 0), indent=1
            )
            for number, task in enumerate(_some_tasks(NUM_TASKS), 1)
        }
    return {}


def _rows_of_owners() -> dict[str, str]:
    texts: dict[str, str] = {}
    tasks = _some_tasks(2 * NUM_OWNERS)
    for number in range(NUM_OWNERS):
        owner, rows = f"site-{number + 1}", []
        for task in tasks[2 * number : 2 * number + 2]:
            for text, answer in task.draw(ROWS_OF_AN_OWNER // 2, 0).items():
                rows.append(
                    {
                        "owner": owner,
                        "topic": task.category,
                        "instruction": task.definition,
                        "input": text,
                        "response": answer,
                    }
                )
        texts[owner] = "".join(json.dumps(row) + "\n" for row in rows)
    return texts


def _some_tasks(number: int) -> list[GeneratedTask]:
    """Return tasks that the embedded base did not see in pretraining, spread over the families."""
    tasks = [task for task in all_tasks(0) if split_of(task) == "federated"]
    step = len(tasks) // number
    return tasks[::step][:number]
