"""Defines the ``data`` section of a configuration: which examples there are, and how they are used."""

from typing import Annotated, Literal

from pydantic import Field

from flexlora.experiment.config_section import Section


class CommonData(Section):
    """What every kind of data has."""

    template: Literal["alpaca", "chat", "plain"] = Field(
        default="alpaca", description="Prompt format; `chat` uses the tokenizer's own chat template."
    )
    max_length: int = Field(
        default=512, ge=16, description="Longest sequence in tokens; longer inputs are cut, never answers."
    )
    loss_on: Literal["answers", "all"] = Field(
        default="answers", description="Tokens the loss looks at; the paper's released code uses `all`."
    )
    num_clients: int | None = Field(
        default=None, ge=1, description="Number of clients; null takes all there are (or 100)."
    )
    test_examples_per_task: int = Field(
        default=16, ge=1, description="Examples scored per unseen task, and per client when own tasks are scored."
    )
    validation_examples: int = Field(
        default=128, ge=0, description="Size of the fixed validation set, drawn from validation parts of clients."
    )
    cache: str = Field(
        default="auto",
        min_length=1,
        description=(
            "Where examples and their tokens are kept for later runs: a folder, `user` (below `XDG_CACHE_HOME`), "
            "`none`, or `auto`: `user` for generated data, `none` for all other."
        ),
    )


class GeneratedData(CommonData):
    """The built-in corpus of generated text tasks; one task is one client, or several."""

    name: Literal["generated"] = "generated"
    corpus_seed: int = Field(default=0, description="Seed of the corpus itself, independent of the seed of the run.")
    examples_per_task: int = Field(
        default=100, ge=10, description="Examples generated for each client of a task, split 80/10/10."
    )
    clients_per_task: int = Field(
        default=1,
        ge=1,
        description="Most clients that have the same task, each with examples of its own; small tasks serve fewer.",
    )
    num_unseen_tasks: int = Field(default=64, ge=1, description="Tasks no client has, spread over the families.")
    unseen_categories: tuple[str, ...] = Field(default=(), description="Families held out as a whole.")


class NaturalInstructionsData(CommonData):
    """Super-Natural Instructions in its original form; one task is one client."""

    name: Literal["natural_instructions"]
    path: str = Field(description="Folder of task files, or the folder that holds `tasks/`.")
    subsample_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the instances kept in each task; the paper uses 0.1 of the full corpus.",
    )
    max_examples_per_task: int | None = Field(
        default=None, ge=10, description="Most instances kept per task; null keeps all."
    )
    min_examples: int = Field(
        default=10, ge=3, description="Tasks with fewer instances after subsampling are left out."
    )
    num_unseen_tasks: int = Field(
        default=0, ge=0, description="Tasks held out by number, seeded, spread over the categories."
    )
    unseen_tasks: tuple[str, ...] = Field(default=(), description="Tasks held out by name (with or without `.json`).")
    unseen_categories: tuple[str, ...] = Field(default=(), description="Tasks held out by category.")
    languages: tuple[str, ...] = Field(
        default=(),
        description=(
            "Leave out tasks that name any other language, for example `[English]`; tasks that name none stay. Empty "
            "keeps all."
        ),
    )
    exclude_pretraining_tasks: bool = Field(
        default=True, description="Leave out every task that the embedded base model saw in pretraining."
    )


class InstructionsData(CommonData):
    """Any instruction data: JSON, JSON lines, CSV, TSV, parquet, compressed or not, or a hub data set."""

    name: Literal["instructions"]
    path: str = Field(description="A file, a folder of files, or a hub id.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Renames columns, for example `{instruction: question, response: answer}`."
    )
    partition: Literal["natural", "dirichlet", "iid"] = Field(
        default="iid", description="How rows are dealt to clients."
    )
    client_column: str | None = Field(
        default=None, description="Column with the owner of a row, for `partition: natural`."
    )
    client_from: Literal["column", "file"] = Field(
        default="column",
        description=(
            "Where the owner of a row stands, for `partition: natural`: in `client_column`, or in the name of its file."
        ),
    )
    label_column: str | None = Field(
        default=None, description="Column with the label, for `partition: dirichlet` and tables."
    )
    dirichlet_alpha: float = Field(
        default=0.5, gt=0, description="Concentration of `partition: dirichlet`; small is uneven."
    )
    min_examples: int = Field(default=10, ge=3, description="Fewest rows a client may have.")
    unseen_labels: tuple[str, ...] = Field(default=(), description="Labels held out as unseen tasks.")
    unseen_fraction: float = Field(default=0.1, ge=0, lt=1, description="Share of rows held out where no label is.")


class InMemoryData(CommonData):
    """Examples passed to `flexlora.run(data=...)` from Python; one owner is one client."""

    name: Literal["in_memory"]
    min_examples: int = Field(default=10, ge=3, description="Owners with fewer examples are left out.")
    unseen_owners: tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...] = Field(
        default=(), description="Owners held out with all their examples; each is one unseen task."
    )
    unseen_labels: tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...] = Field(
        default=(), description="Labels held out; each is one unseen task."
    )
    unseen_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the examples held out where no owner and no label is."
    )


class PhoneBookData(CommonData):
    """Made-up facts, each owned by one client and tested as it was taught: what adapters can store, not generalise."""

    name: Literal["phone_book"]
    corpus_seed: int = Field(
        default=0, description="Seed of names and numbers; who owns which of them depends on the seed of the run."
    )
    code_length: int = Field(default=4, ge=1, le=16, description="Digits of a number.")
    facts_per_client: int = Field(default=8, ge=1, description="Facts of each client.")
    facts_by_type: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description=(
            "Client type -> facts of each of its clients, for types that hold more or fewer than "
            "`data.facts_per_client`."
        ),
    )
    num_facts: int | None = Field(
        default=None,
        ge=1,
        description="Facts of all clients together, dealt evenly; null gives each client `data.facts_per_client`.",
    )


DataConfig = Annotated[
    GeneratedData | NaturalInstructionsData | InstructionsData | InMemoryData | PhoneBookData,
    Field(discriminator="name"),
]
