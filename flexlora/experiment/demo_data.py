"""Writes made-up rows for a demo across processes: each client's own tasks, and others that only the server has."""

import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from flexlora.data.generated.tasks import GeneratedTask, all_tasks, split_of
from flexlora.files import making_parents, write_whole

TASKS_OF_A_CLIENT, ROWS_OF_A_TASK = 4, 60
HELD_OUT_TASKS, ROWS_HELD_OUT = 24, 4

_SEED = 0


def write_client_rows(path: Path, name: str) -> Path:
    """Write the rows of a client, always the same for the same name, and return their file."""
    held_out, others = _split()
    start = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") % len(others)
    tasks = [others[(start + 101 * number) % len(others)] for number in range(TASKS_OF_A_CLIENT)]
    assert not {task.task_id for task in tasks} & {task.task_id for task in held_out}
    return _write(path, tasks, ROWS_OF_A_TASK)


def write_server_rows(path: Path) -> Path:
    """Write the rows that the server scores on, of tasks that no client has, and return their file."""
    return _write(path, _split()[0], ROWS_HELD_OUT)


def _split() -> tuple[list[GeneratedTask], list[GeneratedTask]]:
    """Return the tasks that are held out and all others; the base model was pretrained on none of them."""
    tasks = [task for task in all_tasks(_SEED) if split_of(task) == "federated"]
    step = len(tasks) // HELD_OUT_TASKS
    chosen = range(0, step * HELD_OUT_TASKS, step)
    return [tasks[number] for number in chosen], [task for number, task in enumerate(tasks) if number not in chosen]


def _write(path: Path, tasks: Iterable[GeneratedTask], num_rows: int) -> Path:
    rows = (
        {"task": task.task_id, "instruction": task.definition, "input": text, "output": answer}
        for task in tasks
        for text, answer in task.draw(num_rows, _SEED).items()
    )
    with making_parents(path):
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path
