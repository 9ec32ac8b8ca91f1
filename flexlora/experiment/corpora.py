"""Reads the corpus that a configuration names, or opens it as an earlier run has kept it."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from flexlora.data.corpus_cache import files_state, kept_corpus, user_cache_folder
from flexlora.data.corpus_file import ExampleFile
from flexlora.data.data_notes import DataNotes
from flexlora.data.examples import Example, FederatedCorpus
from flexlora.data.generated.tasks import all_tasks, split_of
from flexlora.data.instructions import load_instructions
from flexlora.data.natural_instructions import Task, read_tasks
from flexlora.data.owned_examples import OwnedRow, load_owned_examples
from flexlora.data.phone_book import PhoneBook, client_names, even_shares, phone_book
from flexlora.data.pretraining import BASE_FOLDER, INSTANCES_FILE, is_embedded_base, seen_in_pretraining
from flexlora.data.row_dealing import InstructionSummary
from flexlora.data.task_dealing import TaskDealing, deal_tasks
from flexlora.data.task_hold_out import HoldOut
from flexlora.experiment.client_plans import group_of_each
from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_data import (
    GeneratedData,
    InMemoryData,
    InstructionsData,
    NaturalInstructionsData,
    PhoneBookData,
)

# Clients of a phone book whose number is not set.
PHONE_BOOK_CLIENTS = 100
# Clients whose first example tells how long texts are.
LENGTH_SAMPLE = 256
# Settings of ``data`` that say how examples are used, not which there are.
NOT_IN_CORPUS = {"template", "max_length", "loss_on", "test_examples_per_task", "validation_examples", "cache"}


def length_sample(corpus: FederatedCorpus) -> list[Example]:
    """Return examples that tell how long texts are: the first one of some clients."""
    return [example for _, splits in sorted(corpus.clients.items())[:LENGTH_SAMPLE] for example in splits.train[:1]]


def corpus_of(config: Config, examples: Iterable[OwnedRow] | None = None) -> tuple[FederatedCorpus, tuple[str, ...]]:
    """Return the corpus and warnings about it, as an earlier run has kept them where it could.

    Args:
        config: Names the corpus.
        examples: Those of ``data.name: in_memory``, None for every other.

    Raises:
        ConfigError: If there are examples where the configuration names others, or none where it needs them.
    """
    data, seed, name = config.data, config.seed, config.model.name_or_path
    if isinstance(data, InMemoryData):
        return _read_examples(data, seed, examples)
    if examples is not None:
        raise ConfigError([f"data.name must be in_memory for a run with data=; got {data.name}"], "the configuration")
    is_embedded = is_embedded_base(name)
    decided_by = {"seed": seed, "data": data.model_dump(mode="json", exclude=NOT_IN_CORPUS)}
    if isinstance(data, InstructionsData):
        # Which rows are refused depends on it.
        decided_by["loss_on"] = data.loss_on
    files = None if isinstance(data, GeneratedData | PhoneBookData) else Path(data.path).expanduser()
    if files is not None and files.exists():
        decided_by["files"] = files_state(files) + files_state(BASE_FOLDER / INSTANCES_FILE)
        decided_by["is_embedded"] = is_embedded

    group_of: dict[str, str] = {}
    if isinstance(data, PhoneBookData):
        group_of = group_of_each(client_names(data.num_clients or PHONE_BOOK_CLIENTS), config)
        decided_by["groups"] = group_of

    def _read(file: ExampleFile) -> tuple[FederatedCorpus, tuple[str, ...]]:
        if isinstance(data, PhoneBookData):
            return _make_phone_book(data, seed, group_of, file), ()
        if isinstance(data, InstructionsData):
            return _read_rows(data, seed, file)
        return _read_tasks(data, seed, file, base_is_embedded=is_embedded)

    # What a hub id names may change without notice.
    can_be_kept = files is None or files.exists()
    return kept_corpus(_cache_folder(data) if can_be_kept else None, decided_by, _read, [Path(__file__)])


def _cache_folder(data: GeneratedData | NaturalInstructionsData | InstructionsData | PhoneBookData) -> Path | None:
    """Return where corpora are kept between runs; only those that take long to make, unless the configuration says so.

    Other people's texts are private, and a phone book is made at once.
    """
    if data.cache == "none" or (data.cache == "auto" and not isinstance(data, GeneratedData)):
        return None
    return user_cache_folder() if data.cache in ("auto", "user") else Path(data.cache).expanduser()


def _make_phone_book(data: PhoneBookData, seed: int, group_of: Mapping[str, str], file: ExampleFile) -> FederatedCorpus:
    if data.num_facts is not None:
        facts_of = even_shares(list(group_of), data.num_facts)
    else:
        facts_of = {
            client_id: data.facts_by_type.get(group, data.facts_per_client) for client_id, group in group_of.items()
        }
    return phone_book(facts_of, seed, PhoneBook(data.corpus_seed, data.code_length), group_of, file)


def _read_examples(
    data: InMemoryData, seed: int, examples: Iterable[OwnedRow] | None
) -> tuple[FederatedCorpus, tuple[str, ...]]:
    if examples is None:
        problem = "data.name=in_memory stands for examples that were passed from Python; pass them again as data="
        raise ConfigError([problem], "the configuration")
    corpus, summary = load_owned_examples(
        examples,
        seed,
        num_clients=data.num_clients,
        min_examples=data.min_examples,
        unseen_owners=data.unseen_owners,
        unseen_labels=data.unseen_labels,
        unseen_fraction=0.0 if data.unseen_owners or data.unseen_labels else data.unseen_fraction,
        trains_all=data.loss_on == "all",
    )
    return corpus, _rows_left_out(summary)


def _read_rows(data: InstructionsData, seed: int, file: ExampleFile) -> tuple[FederatedCorpus, tuple[str, ...]]:
    corpus, summary = load_instructions(
        data.path,
        seed,
        partition=data.partition,
        num_clients=data.num_clients,
        dirichlet_alpha=data.dirichlet_alpha,
        min_examples=data.min_examples,
        label_column=data.label_column,
        client_column=data.client_column,
        client_from=data.client_from,
        columns=data.columns,
        trains_all=data.loss_on == "all",
        unseen_labels=data.unseen_labels,
        unseen_fraction=0.0 if data.unseen_labels else data.unseen_fraction,
        file=file,
    )
    return corpus, _rows_left_out(summary)


def _rows_left_out(summary: InstructionSummary) -> tuple[str, ...]:
    counts = {
        "rows without prompt or answer": summary.num_empty,
        "clients with too few rows": summary.num_too_small,
        "test examples that a client trains on": summary.num_leaked,
    }
    return _left_out(counts) + summary.notes


def _left_out(counts: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(f"Left out: {count} {what}." for what, count in counts.items() if count)


def _read_tasks(
    data: GeneratedData | NaturalInstructionsData, seed: int, file: ExampleFile, *, base_is_embedded: bool
) -> tuple[FederatedCorpus, tuple[str, ...]]:
    notes = DataNotes()
    if isinstance(data, NaturalInstructionsData):
        tasks = read_tasks(data.path, notes)
        dealing = TaskDealing(
            hold_out=HoldOut(data.unseen_tasks, data.unseen_categories, data.num_unseen_tasks),
            fraction=data.subsample_fraction,
            max_examples=data.max_examples_per_task,
            min_examples=data.min_examples,
            num_clients=data.num_clients,
            languages=data.languages,
            exclude=seen_in_pretraining if base_is_embedded and data.exclude_pretraining_tasks else None,
        )
    else:
        tasks = _generated_tasks(data)
        dealing = TaskDealing(
            hold_out=HoldOut(categories=data.unseen_categories, num_tasks=data.num_unseen_tasks),
            examples_per_client=data.examples_per_task,
            num_clients=data.num_clients,
        )
    corpus, summary = deal_tasks(tasks, seed, dealing, file)
    counts = {
        "tasks seen in pretraining": summary.num_seen_in_pretraining,
        "tasks in other languages": summary.num_other_language,
        "tasks with too few examples": summary.num_too_small,
        "instances without answer": summary.num_unanswered,
        "test examples that a client trains on": summary.num_leaked,
    }
    missing = tuple(f"Held-out task {task} was left out too." for task in summary.unseen_left_out)
    return corpus, _left_out(counts) + missing + notes.sentences()


def _generated_tasks(data: GeneratedData) -> Iterator[Task]:
    """Yield the tasks of the generated corpus that clients may have."""
    for task in all_tasks(data.corpus_seed):
        # Those of the pretraining part are never clients, whatever the base: runs stay comparable.
        if split_of(task) == "federated":
            drawn = task.draw(data.examples_per_task * data.clients_per_task, data.corpus_seed)
            examples = tuple(Example(task.definition, text, (answer,)) for text, answer in drawn.items())
            yield Task(task.task_id, task.definition, examples, task.category)
