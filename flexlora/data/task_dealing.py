"""Deals tasks to clients: one task is one client, several that share its examples, or held out as unseen.

    corpus, summary = deal_tasks(read_tasks("natural-instructions"), 0, TaskDealing(hold_out=HoldOut(num_tasks=64)))

Prompts that some client trains on are left out of all validation and test parts, those of unseen tasks included.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flexlora.data.corpus_file import ExampleFile, Owner, stored_corpus
from flexlora.data.examples import FederatedCorpus
from flexlora.data.natural_instructions import NaturalInstructionsError, Task
from flexlora.data.partition import train_validation_test
from flexlora.data.task_hold_out import HoldOut, asked_for, check_known, choose_unseen
from flexlora.federation.streams import stream

# Told a definition and inputs, says whether the task is to be left out.
Exclude = Callable[[str, Iterable[str]], bool]


@dataclass(frozen=True)
class TaskDealing:
    """Which tasks take part, with how many examples, and how they are dealt.

    Attributes:
        hold_out: Tasks that no client has.
        fraction: Share of the examples kept inside each task; the paper keeps 0.1.
        max_examples: Upper limit of examples per task after that.
        min_examples: Tasks with fewer are left out; 3 or more, so that no part is empty.
        examples_per_client: A task with more of them belongs to several clients, each with this many of its examples,
            the last one perhaps with fewer; the first has the name of the task, the others ``TASK.2``, ``TASK.3`` and
            so on. An unseen task has this many, too. None gives a client all examples of its task.
        num_clients: Keep this many clients, drawn by the seed; None keeps all.
        exclude: Called with definition and inputs of every task; true leaves the task out.
        languages: Leave out tasks that name a language outside this list; tasks without the fields stay.
    """

    hold_out: HoldOut = field(default_factory=HoldOut)
    fraction: float = 1.0
    max_examples: int | None = None
    min_examples: int = 10
    examples_per_client: int | None = None
    num_clients: int | None = None
    exclude: Exclude | None = None
    languages: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise NaturalInstructionsError(
                f"data.subsample_fraction must be above 0 and at most 1; got {self.fraction}"
            )
        if self.min_examples < 3:
            raise NaturalInstructionsError(
                "data.min_examples must be 3 or more, one for each of training, validation and test; "
                f"got {self.min_examples}"
            )
        if self.max_examples is not None and self.max_examples < self.min_examples:
            raise NaturalInstructionsError(
                f"data.max_examples_per_task must not be below data.min_examples={self.min_examples}; "
                f"got {self.max_examples}"
            )
        if self.num_clients is not None and self.num_clients < 1:
            raise NaturalInstructionsError(f"data.num_clients must be 1 or more; got {self.num_clients}")


@dataclass(frozen=True)
class CorpusSummary:
    """Counts of tasks, clients and examples, and of everything left out.

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
        unseen_left_out: Held-out tasks that were asked for by name or category and left out for a reason above, and
            those of which clients train on every prompt.
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


def deal_tasks(
    tasks: Iterable[Task], seed: int, dealing: TaskDealing, file: ExampleFile | None = None
) -> tuple[FederatedCorpus, CorpusSummary]:
    """Return every task as a client or as an unseen task, and what was left out.

    A client's examples are split 80/10/10; all examples of an unseen task are in its ``test`` part, in random order.
    Nothing but the names of tasks, their definitions and where their examples are is in memory at any time.

    Args:
        tasks: Read once, in any order; the result does not depend on the order.
        file: Where examples are written; None takes a file that is deleted when the process ends.

    Raises:
        NaturalInstructionsError: Two tasks of one name, a name, category or language that no task has, too few tasks,
            or clients train on every prompt that is held out.
    """
    file = file or ExampleFile()
    read = _read(tasks, seed, dealing, file)
    asked = asked_for(dealing.hold_out, read.category_of)
    categories = {name: task.category for name, task in read.kept.items()}
    unseen = choose_unseen(dealing.hold_out.num_tasks, asked, categories, seed)
    seen = (owner for name, task in read.kept.items() if name not in unseen for owner in task.owners)
    candidates = sorted(seen, key=lambda owner: owner.name)
    clients = _draw_clients(candidates, dealing.num_clients, seed)
    held_out = [
        replace(task.owners[0], num_validation=0, num_test=task.owners[0].record.num_examples)
        for name, task in read.kept.items()
        if name in unseen
    ]
    dropped = _find_trained(read.kept.values(), [*clients, *held_out], file)
    clients, held_out = ([_without(owner, dropped) for owner in owners] for owners in (clients, held_out))
    trained_only = {owner.name for owner in held_out if len(owner.dropped) == owner.num_test}
    if trained_only and len(trained_only) == len(held_out):
        raise NaturalInstructionsError(
            f"nothing is left to be scored: clients train on every prompt of {', '.join(sorted(trained_only)[:5])}, "
            "held out; hold out others, or take away the tasks that repeat them"
        )
    held_out = [owner for owner in held_out if owner.name not in trained_only]
    corpus = stored_corpus(file, clients, held_out)
    return corpus, CorpusSummary(
        num_tasks=len(read.category_of),
        num_clients=len(corpus.clients),
        num_unseen=len(corpus.unseen),
        num_seen_in_pretraining=read.left_out["pretraining"],
        num_too_small=read.left_out["small"],
        num_other_language=read.left_out["language"],
        num_not_drawn=len(candidates) - len(clients),
        num_unanswered=read.left_out["unanswered"],
        num_repeated=read.left_out["repeated"],
        num_leaked=sum(map(len, dropped.values())),
        num_train=sum(len(splits.train) for splits in corpus.clients.values()),
        num_validation=sum(len(splits.validation) for splits in corpus.clients.values()),
        num_test=sum(len(splits.test) for splits in corpus.clients.values()),
        num_unseen_test=sum(len(splits.test) for splits in corpus.unseen.values()),
        unseen_left_out=tuple(sorted((asked - set(read.kept)) | trained_only)),
    )


@dataclass(frozen=True, slots=True)
class _Kept:
    """A task that passed the filters and whose examples have been written.

    Attributes:
        definition: As of the task.
        category: As of the task.
        owners: The clients it could be; the first one has the name of the task.
    """

    definition: str
    category: str
    owners: tuple[Owner, ...]


@dataclass(frozen=True)
class _Read:
    """What is kept of the tasks that have been read.

    Attributes:
        kept: Name -> task.
        category_of: Category of each task, those left out included.
        left_out: Reason -> number of tasks or instances.
    """

    kept: dict[str, _Kept] = field(default_factory=dict)
    category_of: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def _read(tasks: Iterable[Task], seed: int, dealing: TaskDealing, file: ExampleFile) -> _Read:
    """Read all tasks, and write the examples of those that pass the filters to the file."""
    read, known_languages = _Read(), set[str]()
    for task in tasks:
        if task.task_id in read.category_of:
            raise NaturalInstructionsError(f"task names must be unique; {task.task_id!r} occurs twice: rename one")
        read.category_of[task.task_id] = task.category
        known_languages |= task.languages
        read.left_out["unanswered"] += task.num_unanswered
        read.left_out["repeated"] += task.num_repeated
        if dealing.languages and not task.languages <= set(dealing.languages):
            read.left_out["language"] += 1
        elif dealing.exclude is not None and dealing.exclude(
            task.definition, [example.input for example in task.examples]
        ):
            read.left_out["pretraining"] += 1
        else:
            sample = subsample(task, seed, dealing.fraction, dealing.max_examples)
            if len(sample.examples) < dealing.min_examples:
                read.left_out["small"] += 1
            else:
                read.kept[task.task_id] = _written(sample, seed, dealing, file)
    if known_languages:
        check_known("data.languages", set(dealing.languages), known_languages)
    return read


def _written(task: Task, seed: int, dealing: TaskDealing, file: ExampleFile) -> _Kept:
    """Write the examples of each client that a task could be: those for validation, then for testing and training."""
    size, owners = dealing.examples_per_client or len(task.examples), []
    for number, start in enumerate(range(0, len(task.examples), size), start=1):
        examples = task.examples[start : start + size]
        if number == 1 or len(examples) >= dealing.min_examples:
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
        present = [taking_part[own.name] for task in tasks for own in task.owners if own.name in taking_part]
        trained = {
            example.input
            for owner in present
            for example in file.read(owner.record)[owner.num_validation + owner.num_test :]
        }
        for owner in present:
            tested = file.read(owner.record)[: owner.num_validation + owner.num_test]
            found = tuple(position for position, example in enumerate(tested) if example.input in trained)
            if found:
                dropped[owner.name] = found
    return dropped


def _without(owner: Owner, dropped: Mapping[str, tuple[int, ...]]) -> Owner:
    return replace(owner, dropped=dropped[owner.name]) if owner.name in dropped else owner


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
