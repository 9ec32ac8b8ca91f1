"""Tasks in the schema of Super-Natural Instructions (arXiv:2204.07705): one task is one client.

    corpus, summary = load_natural_instructions("natural-instructions", seed=0, hold_out=HoldOut(num_tasks=64))

Generated tasks in the same schema take the same road from ``parse_task`` on.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexlora.data.corpus_file import ExampleFile, Owner, stored_corpus
from flexlora.data.examples import Example, ExampleSplits, FederatedCorpus
from flexlora.data.partition import train_validation_test
from flexlora.errors import FlexLoraError
from flexlora.federation.streams import stream

Exclude = Callable[[str, Iterable[str]], bool]

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


@dataclass(frozen=True, slots=True)
class _Kept:
    """A task that is left after the filters, whose examples have been written.

    Attributes:
        definition: As of the task.
        category: As of the task.
        owners: The clients it could be; the first one is called as the task.
    """

    definition: str
    category: str
    owners: tuple[Owner, ...]


@dataclass(frozen=True)
class HoldOut:
    """Which tasks no client has: the union of the three.

    Attributes:
        tasks: Task names, with or without ``.json``.
        categories: Categories held out as a whole.
        num_tasks: This many tasks besides, drawn by the seed, one per category in turn.
    """

    tasks: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    num_tasks: int = 0


@dataclass(frozen=True)
class CorpusSummary:
    """What became of the tasks and their examples.

    Attributes:
        num_tasks: Tasks read.
        num_clients: Tasks that became clients.
        num_unseen: Tasks held out.
        num_seen_in_pretraining: Tasks left out because ``exclude`` knew them.
        num_too_small: Tasks left out for having too few examples after subsampling.
        num_other_language: Tasks left out by the language filter.
        num_not_drawn: Tasks left out because ``num_clients`` was reached.
        num_unanswered: Instances left out because they have no answer.
        num_repeated: Instances merged into another one with the same input.
        num_leaked: Examples taken out of validation and test parts because some client trains on the same prompt.
        num_train: Training examples of all clients.
        num_validation: Validation examples of all clients.
        num_test: Test examples of all clients.
        num_unseen_test: Examples of unseen tasks.
        unseen_left_out: Held-out tasks that were asked for by name or category and left out for a reason above.
    """

    num_tasks: int
    num_clients: int
    num_unseen: int
    num_seen_in_pretraining: int
    num_too_small: int
    num_other_language: int
    num_not_drawn: int
    num_unanswered: int
    num_repeated: int
    num_leaked: int
    num_train: int
    num_validation: int
    num_test: int
    num_unseen_test: int
    unseen_left_out: tuple[str, ...] = ()


def load_natural_instructions(
    path: Path | str,
    seed: int,
    *,
    hold_out: HoldOut,
    fraction: float = 1.0,
    max_examples: int | None = None,
    min_examples: int = 10,
    num_clients: int | None = None,
    exclude: Exclude | None = None,
    languages: Sequence[str] = (),
    file: ExampleFile | None = None,
) -> tuple[FederatedCorpus, CorpusSummary]:
    """Return the corpus in a folder of task files; see ``federate`` for the arguments."""
    return federate(
        read_tasks(path),
        seed,
        hold_out=hold_out,
        fraction=fraction,
        max_examples=max_examples,
        min_examples=min_examples,
        num_clients=num_clients,
        exclude=exclude,
        languages=languages,
        file=file,
    )


def read_tasks(path: Path | str) -> Iterator[Task]:
    """Yield the tasks of a folder of ``*.json`` files, or of the ``tasks`` folder in it, sorted by file name.

    One task is in memory at a time: the original corpus has five million instances.

    Raises:
        NaturalInstructionsError: There is no such folder, it holds no task, or a file is broken.
    """
    folder = Path(path).expanduser()
    if (folder / "tasks").is_dir():
        folder = folder / "tasks"
    files = sorted(folder.glob("*.json"))
    if not files:
        state = "holds no .json file" if folder.is_dir() else "does not exist"
        raise NaturalInstructionsError(
            f"data.path must be a folder of task files or hold one named tasks; {folder} {state}"
        )
    for file in files:
        try:
            fields = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise NaturalInstructionsError(
                f"{file} must be JSON in UTF-8 ({error}); repair the file or take it out of the folder"
            ) from error
        yield parse_task(file.stem, fields, str(file))


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
        held = "no such key" if "Instances" not in fields else _abridged(instances)
        raise NaturalInstructionsError(f"{source}: Instances must be a list with at least one instance; got {held}")
    answers: dict[str, dict[str, None]] = {}
    num_unanswered = 0
    for number, instance in enumerate(instances):
        place = f"{source}: instance {number}"
        if not isinstance(instance, Mapping):
            raise NaturalInstructionsError(f"{place} must be an object of input and output; got {_abridged(instance)}")
        text = instance.get("input")
        if not isinstance(text, str):
            raise NaturalInstructionsError(f"{place}: input must be a text; got {_abridged(text)}")
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


def subsample(task: Task, seed: int, fraction: float = 1.0, max_examples: int | None = None) -> Task:
    """Return the task with a random share of its examples: a function of the seed and the task only.

    Args:
        fraction: Share of the examples kept, in (0, 1], but at least one example; the paper keeps 0.1.
        max_examples: Upper limit after that.
    """
    size = max(round(fraction * len(task.examples)), 1)
    size = size if max_examples is None else min(size, max_examples)
    if size >= len(task.examples):
        return task
    drawn = stream(seed, "task-subsample", task.task_id).choice(len(task.examples), size=size, replace=False)
    return replace(task, examples=tuple(task.examples[index] for index in sorted(drawn.tolist())))


def split_task(task: Task, seed: int) -> ExampleSplits:
    """Return the task's examples split 80/10/10: a function of the seed and the task only.

    No input is in two parts, because no two examples of a task have the same input.
    """
    parts = train_validation_test(len(task.examples), stream(seed, "task-split", task.task_id))
    train, validation, test = (tuple(task.examples[index] for index in part) for part in parts)
    return ExampleSplits(train, validation, test, task.category)


def federate(
    tasks: Iterable[Task],
    seed: int,
    *,
    hold_out: HoldOut,
    fraction: float = 1.0,
    max_examples: int | None = None,
    min_examples: int = 10,
    examples_per_client: int | None = None,
    num_clients: int | None = None,
    exclude: Exclude | None = None,
    languages: Sequence[str] = (),
    file: ExampleFile | None = None,
) -> tuple[FederatedCorpus, CorpusSummary]:
    """Return every task as a client or as an unseen task, and what was left out.

    A client's examples are split 80/10/10; all examples of an unseen task are in its ``test`` part, in random order.
    Nothing but the names of tasks, their definitions and where their examples are is in memory at any time.

    Args:
        tasks: Read once, in any order; the result does not depend on the order.
        hold_out: Tasks that no client has.
        fraction: Share of the examples kept inside each task; the paper keeps 0.1.
        max_examples: Upper limit of examples per task after that.
        min_examples: Tasks with fewer are left out; 3 or more, so that no part is empty.
        examples_per_client: A task with more of them belongs to several clients, each with so many of its examples,
            the last one perhaps with fewer; the first is called as the task, the others ``TASK.2``, ``TASK.3`` and so
            on. An unseen task has so many, too. None gives a client all examples of its task.
        num_clients: Keep this many clients, drawn by the seed; None keeps all.
        exclude: Called with definition and inputs of every task; true leaves the task out.
        languages: Leave out tasks that name a language outside this list; tasks without the fields stay.
        file: Where examples are written; None takes a file that is gone with the process.

    Raises:
        NaturalInstructionsError: Two tasks of one name, a name, category or language that no task has, or too few
            tasks.
    """
    _check_limits(fraction, max_examples, min_examples, num_clients)
    file = file or ExampleFile()
    kept: dict[str, _Kept] = {}
    category_of: dict[str, str] = {}
    known_languages: set[str] = set()
    left_out = {"pretraining": 0, "small": 0, "language": 0, "unanswered": 0, "repeated": 0}
    for task in tasks:
        if task.task_id in category_of:
            raise NaturalInstructionsError(f"task names must be unique; {task.task_id!r} occurs twice: rename one")
        category_of[task.task_id] = task.category
        known_languages |= task.languages
        left_out["unanswered"] += task.num_unanswered
        left_out["repeated"] += task.num_repeated
        if languages and not task.languages <= set(languages):
            left_out["language"] += 1
        elif exclude is not None and exclude(task.definition, [example.input for example in task.examples]):
            left_out["pretraining"] += 1
        else:
            sample = subsample(task, seed, fraction, max_examples)
            if len(sample.examples) < min_examples:
                left_out["small"] += 1
            else:
                kept[task.task_id] = _written(sample, seed, examples_per_client, min_examples, file)
    if known_languages:
        _check_known("data.languages", set(languages), known_languages)
    asked = _asked_for(hold_out, category_of)
    unseen = _choose_unseen(hold_out.num_tasks, asked, {name: task.category for name, task in kept.items()}, seed)
    candidates = sorted(
        (owner for name, task in kept.items() if name not in unseen for owner in task.owners),
        key=lambda owner: owner.name,
    )
    clients = _draw_clients(candidates, num_clients, seed)
    held_out = [
        replace(task.owners[0], num_validation=0, num_test=task.owners[0].record.num_examples)
        for name, task in kept.items()
        if name in unseen
    ]
    dropped = _find_trained(kept.values(), [*clients, *held_out], file)
    clients, held_out = ([_without(owner, dropped) for owner in owners] for owners in (clients, held_out))
    corpus = stored_corpus(file, clients, held_out)
    train, validation, test = (
        sum(map(len, parts)) for parts in zip(*map(_parts, corpus.clients.values()), strict=True)
    )
    return corpus, CorpusSummary(
        num_tasks=len(category_of),
        num_clients=len(corpus.clients),
        num_unseen=len(corpus.unseen),
        num_seen_in_pretraining=left_out["pretraining"],
        num_too_small=left_out["small"],
        num_other_language=left_out["language"],
        num_not_drawn=len(candidates) - len(clients),
        num_unanswered=left_out["unanswered"],
        num_repeated=left_out["repeated"],
        num_leaked=sum(map(len, dropped.values())),
        num_train=train,
        num_validation=validation,
        num_test=test,
        num_unseen_test=sum(len(splits.test) for splits in corpus.unseen.values()),
        unseen_left_out=tuple(sorted(asked - set(kept))),
    )


def _parts(splits: ExampleSplits) -> tuple[Sequence[Example], Sequence[Example], Sequence[Example]]:
    return splits.train, splits.validation, splits.test


def _written(task: Task, seed: int, examples_per_client: int | None, min_examples: int, file: ExampleFile) -> _Kept:
    """Write the examples of each client that a task could be: those for validation, then for testing and training."""
    size, owners = examples_per_client or len(task.examples), []
    for number, start in enumerate(range(0, len(task.examples), size), start=1):
        examples = task.examples[start : start + size]
        if number == 1 or len(examples) >= min_examples:
            name = task.task_id if number == 1 else f"{task.task_id}.{number}"
            train, validation, test = train_validation_test(len(examples), stream(seed, "task-split", name))
            record = file.append([examples[index] for part in (validation, test, train) for index in part.tolist()])
            owners.append(Owner(name, task.category, record, len(validation), len(test)))
    return _Kept(task.definition, task.category, tuple(owners))


def _find_trained(kept: Iterable[_Kept], owners: Iterable[Owner], file: ExampleFile) -> dict[str, tuple[int, ...]]:
    """Return name -> positions of its validation and test examples whose prompt some client trains on.

    Inputs of one task differ, so only tasks that share their definition can share a prompt: these are read again.
    """
    taking_part = {owner.name: owner for owner in owners}
    tasks_of: dict[str, list[_Kept]] = {}
    for task in kept:
        tasks_of.setdefault(task.definition, []).append(task)
    dropped = {}
    for tasks in tasks_of.values():
        if len(tasks) == 1:
            continue
        group = [taking_part[own.name] for task in tasks for own in task.owners if own.name in taking_part]
        trained = {
            example.input
            for owner in group
            for example in file.read(owner.record)[owner.num_validation + owner.num_test :]
        }
        for owner in group:
            tested = file.read(owner.record)[: owner.num_validation + owner.num_test]
            found = tuple(position for position, example in enumerate(tested) if example.input in trained)
            if found:
                dropped[owner.name] = found
    return dropped


def _without(owner: Owner, dropped: Mapping[str, tuple[int, ...]]) -> Owner:
    return replace(owner, dropped=dropped[owner.name]) if owner.name in dropped else owner


def _texts(fields: Mapping[str, object], key: str, place: str) -> list[str]:
    """Return a field that real files hold as a text or as a list of texts."""
    if key not in fields:
        raise NaturalInstructionsError(f"{place}: must have the key {key}; got the keys {', '.join(map(str, fields))}")
    value = fields[key]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise NaturalInstructionsError(f"{place}: {key} must be a text or a list of texts; got {_abridged(value)}")
    return [str(text) for text in value]


def _abridged(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _check_limits(fraction: float, max_examples: int | None, min_examples: int, num_clients: int | None) -> None:
    if not 0 < fraction <= 1:
        raise NaturalInstructionsError(f"data.subsample_fraction must be above 0 and at most 1; got {fraction}")
    if min_examples < 3:
        raise NaturalInstructionsError(
            f"data.min_examples must be 3 or more, one for each of training, validation and test; got {min_examples}"
        )
    if max_examples is not None and max_examples < min_examples:
        raise NaturalInstructionsError(
            f"data.max_examples_per_task must not be below data.min_examples={min_examples}; got {max_examples}"
        )
    if num_clients is not None and num_clients < 1:
        raise NaturalInstructionsError(f"data.num_clients must be 1 or more; got {num_clients}")


def _asked_for(hold_out: HoldOut, category_of: Mapping[str, str]) -> set[str]:
    """Return the tasks held out by name or by category."""
    names = {name.removesuffix(".json") for name in hold_out.tasks}
    _check_known("data.unseen_tasks", names, set(category_of))
    _check_known("data.unseen_categories", set(hold_out.categories), set(category_of.values()))
    return names | {task_id for task_id, category in category_of.items() if category in hold_out.categories}


def _check_known(key: str, asked: set[str], known: set[str]) -> None:
    unknown = sorted(asked - known)
    if not unknown:
        return
    near = {name: difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.4) for name in unknown[:5]}
    hints = "; ".join(f"{name!r} is near {', '.join(map(repr, found)) or 'nothing'}" for name, found in near.items())
    raise NaturalInstructionsError(
        f"{key} must name what the data hold; {len(unknown)} of {len(asked)} are unknown: {hints}"
    )


def _choose_unseen(num_tasks: int, asked: set[str], kept: Mapping[str, str], seed: int) -> set[str]:
    """Return the held-out tasks that are left: those asked for, and ``num_tasks`` drawn, one per category in turn.

    Args:
        kept: Task -> its category.
    """
    rng = stream(seed, "unseen-tasks")
    unseen = asked & set(kept)
    by_category: dict[str, list[str]] = {}
    for task_id in sorted(set(kept) - unseen):
        by_category.setdefault(kept[task_id], []).append(task_id)
    pools = [by_category[category] for category in sorted(by_category)]
    pools = [[pools[i][j] for j in rng.permutation(len(pools[i]))] for i in rng.permutation(len(pools))]
    num_left = sum(map(len, pools))
    if num_tasks > num_left:
        raise NaturalInstructionsError(
            f"data.num_unseen_tasks must be at most {num_left}, the tasks that are left; got {num_tasks}"
        )
    deepest = max(map(len, pools), default=0)
    in_turn = [pool[turn] for turn in range(deepest) for pool in pools if turn < len(pool)]
    unseen.update(in_turn[:num_tasks])
    if not unseen and (asked or num_tasks):
        raise NaturalInstructionsError(
            f"none of the {len(asked)} tasks to hold out is left after the filters; hold out others, lower "
            "data.min_examples or keep tasks seen in pretraining"
        )
    return unseen


def _draw_clients(candidates: list[Owner], num_clients: int | None, seed: int) -> list[Owner]:
    if not candidates:
        raise NaturalInstructionsError(
            "no task is left to be a client: hold out fewer, lower data.min_examples, or keep tasks seen in pretraining"
        )
    if num_clients is None:
        return candidates
    if num_clients > len(candidates):
        raise NaturalInstructionsError(
            f"data.num_clients must be at most {len(candidates)}, the tasks that are left; got {num_clients}"
        )
    drawn = stream(seed, "task-clients").choice(len(candidates), size=num_clients, replace=False)
    return [candidates[index] for index in sorted(drawn.tolist())]
