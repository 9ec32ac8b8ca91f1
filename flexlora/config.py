"""What a run is: the whole configuration, one YAML file plus ``key=value`` overrides."""

import copy
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora import FlexLoraError

TRUNCATED_VALUE_LENGTH = 80
MOST_CHECKS = 6
NUM_CLIENTS_SHOWN = 5
PLACEHOLDER = "?"
VARIANT_TAGS = ("generated", "natural_instructions", "instructions", "fedit", "zero_pad", "flexlora")
METHOD_TAGS = ("fedit", "zero_pad", "flexlora")
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


class ConfigError(FlexLoraError, ValueError):
    """One or more settings are wrong; the message lists all of them."""

    def __init__(self, problems: Sequence[str], source: str) -> None:
        self.problems = tuple(problems)
        noun = "problem" if len(problems) == 1 else "problems"
        super().__init__(f"{len(problems)} {noun} in {source}:\n" + "\n".join(f"  - {problem}" for problem in problems))


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Section):
    """The base model, shared by all clients and never changed."""

    name_or_path: str = Field(
        default="embedded",
        description="`embedded`, a local folder in Hugging Face format, or a hub id such as `org/model`.",
    )
    revision: str | None = Field(
        default=None, description="Hub revision (branch, tag or commit); null is the default branch."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type of the base weights; LoRA factors are trained in float32 either way."
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa", description="Attention kernel of transformers."
    )
    trust_remote_code: bool = Field(default=False, description="Let a hub repository run its own model code.")
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description=(
            "CPU threads for tensor work in each process; null leaves the choice to PyTorch, but clients of a base of "
            "at most 100 million parameters train with one."
        ),
    )
    num_processes: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Processes that train clients, with one copy of the base weights on the CPU; null is one per GPU, or one "
            "per `model.num_threads` cores where the base has at most 100 million parameters, else 1. Results depend "
            "on threads, not on this."
        ),
    )
    clients_per_group: int | None = Field(
        default=None,
        ge=1,
        description="Most clients that share passes through the base; null decides by tokens and memory, 1 is one.",
    )


class RayConfig(_Section):
    """Train clients on a Ray cluster instead of this machine's processes (needs the extra `flexlora[ray]`)."""

    address: str | None = Field(
        default=None,
        description="Of a running cluster, `auto` for the one this machine belongs to, null to start one here.",
    )
    num_actors: int | None = Field(
        default=None, ge=1, description="Copies of the base that train; null is as many as the cluster has room for."
    )
    cpus_per_actor: int = Field(default=1, ge=1, description="Cores, and threads, of an actor.")
    gpus_per_actor: float = Field(default=0.0, ge=0, description="GPUs of an actor; 0 trains on CPUs.")


class LoraConfig(_Section):
    """Where adapters sit and how rank turns into scaling."""

    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default="all-linear", description="`all-linear`, or a list of module name endings such as `[q_proj, v_proj]`."
    )
    scaling: Literal["constant_alpha", "constant_ratio", "rslora"] = Field(
        default="constant_alpha",
        description=(
            "Factor in front of B A: `constant_alpha` is lora_alpha / rank (PEFT, the paper), `constant_ratio` is "
            "lora_alpha at every rank, `rslora` is lora_alpha / sqrt(rank)."
        ),
    )
    lora_alpha: float = Field(default=16.0, gt=0, description="See `lora.scaling`.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout probability on the input of the adapters.")


class _DataConfig(_Section):
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


class GeneratedData(_DataConfig):
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


class NaturalInstructionsData(_DataConfig):
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


class InstructionsData(_DataConfig):
    """Any instruction data: JSON, JSON lines, CSV, parquet, or a hub data set."""

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
    label_column: str | None = Field(
        default=None, description="Column with the label, for `partition: dirichlet` and tables."
    )
    dirichlet_alpha: float = Field(
        default=0.5, gt=0, description="Concentration of `partition: dirichlet`; small is uneven."
    )
    min_examples: int = Field(default=10, ge=3, description="Fewest rows a client may have.")
    unseen_labels: tuple[str, ...] = Field(default=(), description="Labels held out as unseen tasks.")
    unseen_fraction: float = Field(default=0.1, ge=0, lt=1, description="Share of rows held out where no label is.")


DataConfig = Annotated[GeneratedData | NaturalInstructionsData | InstructionsData, Field(discriminator="name")]


class RankConfig(_Section):
    """Ranks of one client type; 0 leaves the part without adapter."""

    attention: int = Field(ge=0, description="Rank of attention projections.")
    ffn: int = Field(ge=0, description="Rank of every other adapted module.")
    patterns: dict[str, int] = Field(
        default_factory=dict, description="Regular expression over module paths -> rank; comes before the two above."
    )


class ClientsConfig(_Section):
    """What the clients' devices can afford."""

    ranks_from: Literal["types", "devices"] = Field(
        default="types",
        description=(
            "`types` below, or `devices`: the largest ranks that fit each device's memory, `devices.round_seconds` and "
            "`devices.round_bytes`, by the estimates of `flexlora plan`; the settings below are then not looked at."
        ),
    )
    types: Literal["paper", "small"] | dict[str, RankConfig] = Field(
        default="small",
        description=(
            "`paper` (8/8, 30/30, 30/200, 200/200 for attention/FFN), `small` (the same idea for small models), or "
            "a mapping of type name to `{attention: RANK, ffn: RANK}`."
        ),
    )
    distribution: (
        Literal["uniform", "heavy_tail_light", "heavy_tail_strong", "normal", "extreme_heavy_tail"] | dict[str, float]
    ) = Field(
        default="heavy_tail_light",
        description="How types are spread over clients: a named distribution, or `{type: weight}` in any unit.",
    )
    counts: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict,
        description=(
            "Exact number of clients of each type, dealt by the seed; replaces `clients.distribution`, whatever that "
            "says. Must add up to the clients that `clients.assigned` does not name."
        ),
    )
    assigned: dict[Annotated[str, Field(coerce_numbers_to_str=True)], str] = Field(
        default_factory=dict,
        description="Client id -> its type, for clients whose device is known; all others are drawn.",
    )


class DevicesConfig(_Section):
    """Simulated devices of the clients: what they afford, how fast and how reliable they are."""

    profiles: str | None = Field(
        default=None,
        description=(
            "`built_in` (phone, laptop, workstation, server: assumptions of ours), or a CSV file of devices; null "
            "simulates none."
        ),
    )
    distribution: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="How devices are spread over clients: `{device: weight}` in any unit; empty takes the profiles'.",
    )
    counts: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict,
        description="Exact number of clients of each device; replaces `devices.distribution`.",
    )
    assigned: dict[Annotated[str, Field(coerce_numbers_to_str=True)], str] = Field(
        default_factory=dict, description="Client id -> its device, for clients whose device is known."
    )
    types: dict[str, str] = Field(
        default_factory=dict,
        description="Device -> client type, with `clients.ranks_from: types`; other devices' clients draw their type.",
    )
    max_rank: int = Field(
        default=64, ge=1, description="Largest rank chosen, with `clients.ranks_from: devices`; powers of two below it."
    )
    rank_choices: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="Ranks to choose from instead of powers of two, for example `[8, 30, 200]`."
    )
    round_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Most virtual seconds a round may take a device, transfers included; bounds ranks. Null is any.",
    )
    round_bytes: int | None = Field(
        default=None, ge=1, description="Most bytes a round may move, down and up; bounds ranks. Null is any."
    )


class ClockConfig(_Section):
    """The virtual clock that runs when devices are simulated, and what the server does about slow clients."""

    policy: Literal["wait", "deadline", "over_select", "async"] = Field(
        default="wait",
        description=(
            "`wait` for the slowest; `deadline` drops who is late; `over_select` samples more clients and takes the "
            "first; `async` keeps a cohort at work and steps after every `clock.buffer_size` updates, on changes."
        ),
    )
    deadline_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Virtual seconds after which `deadline`, and if set `over_select`, drop clients.",
    )
    over_selection: float = Field(
        default=1.3, ge=1, description="Clients sampled by `over_select` for each client of the cohort."
    )
    jitter: float = Field(
        default=0.0, ge=0, description="Standard deviation of the logarithm of a factor on each client's time."
    )
    day_seconds: float = Field(
        default=86400.0, gt=0, description="Length of a virtual day; availability repeats daily."
    )
    buffer_size: int | None = Field(
        default=None, ge=1, description="Updates in each server step of `async`; null is half a cohort."
    )
    staleness: Literal["constant", "polynomial", "exponential"] = Field(
        default="polynomial",
        description="Weight of a change t server steps old: 1, (1 + t)^-rate, or exp(-rate t); for `async`.",
    )
    staleness_rate: float = Field(default=0.5, ge=0, description="The rate in it.")
    max_staleness: int | None = Field(
        default=None, ge=0, description="Staler updates are dropped by `async`; null drops none."
    )


class FedItMethod(_Section):
    """Weighted average of the factors at one rank (arXiv:2305.05644); with SGD, the paper's FedAvg."""

    name: Literal["fedit"]


class ZeroPadMethod(_Section):
    """Factors padded to the largest rank, averaged, truncated on dispatch."""

    name: Literal["zero_pad"]


class FlexLoraMethod(_Section):
    """Mean of products, one SVD per module, best approximation per client (arXiv:2402.11505)."""

    name: Literal["flexlora"] = "flexlora"
    server_rank: int | None = Field(
        default=None,
        ge=1,
        description="Directions the server keeps per module; null is the largest rank of any client type.",
    )
    split: Literal["b", "balanced"] = Field(
        default="b", description="Where singular values go: all into B (the paper's code), or their roots into A and B."
    )
    error_compensation: bool = Field(
        default=False,
        description="Add back what truncation hid from low-rank clients, so that high directions do not decay.",
    )
    fold_tail: bool = Field(
        default=False, description="Send each client the directions above its rank too, as a branch it does not train."
    )
    accuracy: Literal["exact", "fast"] = Field(
        default="exact",
        description="How near the decomposition is to the best one of its rank: within 1e-6 or 1e-3 of its error.",
    )
    most_directions: int | None = Field(
        default=None,
        ge=1,
        description="Directions a round's sum holds per module while updates arrive, to bound memory; null is all.",
    )


MethodConfig = Annotated[FedItMethod | ZeroPadMethod | FlexLoraMethod, Field(discriminator="name")]


class TrainingConfig(_Section):
    """Local training of one client in one round."""

    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="Fresh for each client in each round.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Learning rate of round 1 (after warm-up).")
    schedule: Literal["constant", "linear", "cosine", "halve"] = Field(
        default="constant", description="Learning rate over rounds; `halve` divides by two at each of `halve_at`."
    )
    halve_at: tuple[int, ...] = Field(default=(15,), description="Rounds at which `schedule: halve` divides by two.")
    warmup_rounds: int = Field(default=0, ge=0, description="Rounds over which the learning rate rises linearly.")
    num_epochs: float = Field(default=1.0, gt=0, description="Passes over the client's examples per round.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Upper limit of optimiser steps per client and round."
    )
    batch_size: int = Field(default=4, ge=1, description="Examples per forward pass.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Forward passes per optimiser step.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled for AdamW.")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="Momentum of SGD.")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Norm at which gradients are clipped; null never."
    )


class RoundsConfig(_Section):
    """The federated loop."""

    num_rounds: int = Field(default=20, ge=1, description="Number of server rounds.")
    cohort_size: int | None = Field(default=None, ge=1, description="Clients per round; null uses `cohort_fraction`.")
    cohort_fraction: float = Field(
        default=0.05, gt=0, le=1, description="Share of the clients per round; the paper uses 0.05."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints kept.")
    checkpoint_every: int = Field(
        default=1,
        ge=1,
        description="Rounds between checkpoints; one is on disk before its round is evaluated, should that fail.",
    )
    patience: int | None = Field(
        default=None, ge=1, description="Stop after this many evaluations without a lower validation loss; null never."
    )
    max_failed_rounds: int = Field(
        default=3,
        ge=1,
        description="End the run, with an error, after this many rounds in a row in which every client failed.",
    )
    wire_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Type in which factors travel."
    )


class EvaluationConfig(_Section):
    """What is scored, how often, and against what."""

    every: int = Field(default=5, ge=1, description="Rounds between evaluations; the last round always has one.")
    max_new_tokens: int = Field(default=32, ge=1, description="Longest generated answer in tokens.")
    batch_size: int = Field(default=64, ge=1, description="Prompts decoded at once.")
    rank_group_clients: int = Field(
        default=8, ge=0, description="Clients per type whose own test data are scored at the end; 0 skips it."
    )
    local_only_clients: int = Field(
        default=8, ge=0, description="Sampled clients that also train alone, for comparison; 0 skips it."
    )
    local_only_epochs: float = Field(
        default=3.0, gt=0, description="Passes over their examples when clients train alone."
    )
    fedit_reference: bool = Field(
        default=True, description="Also run FedIT with every client at the smallest rank, same seed and rounds."
    )
    fedit_learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate of that reference, which a small rank may want larger; null is the run's own.",
    )
    target_rouge_l: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Unseen ROUGE-L whose virtual time the report gives; null is the best of the weakest that learned.",
    )


class Config(_Section):
    """One run."""

    seed: int = Field(default=0, ge=0, description="Seed of everything random but the generated corpus.")
    model: ModelConfig = Field(default_factory=ModelConfig)
    ray: RayConfig | None = Field(
        default=None,
        description=(
            "null trains in processes of this machine, a section on a cluster; `model.num_processes` then counts for "
            "nothing."
        ),
    )
    lora: LoraConfig = Field(default_factory=LoraConfig)
    data: DataConfig = Field(default_factory=GeneratedData)
    clients: ClientsConfig = Field(default_factory=ClientsConfig)
    devices: DevicesConfig = Field(default_factory=DevicesConfig)
    clock: ClockConfig = Field(default_factory=ClockConfig)
    method: MethodConfig = Field(default_factory=FlexLoraMethod)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    rounds: RoundsConfig = Field(default_factory=RoundsConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)


def _disagreements(config: Config) -> Iterator[str]:
    if config.training.optimizer == "adamw" and config.training.momentum:
        yield (
            f"training.momentum is {config.training.momentum} but only training.optimizer=sgd has momentum; "
            "set training.momentum=0 or training.optimizer=sgd"
        )
    if config.rounds.patience is not None and config.data.validation_examples == 0:
        yield "rounds.patience needs a validation set; set data.validation_examples above 0 or rounds.patience=null"
    data = config.data
    if isinstance(data, NaturalInstructionsData) and (data.max_examples_per_task or math.inf) < data.min_examples:
        yield (
            f"data.max_examples_per_task must not be below data.min_examples={data.min_examples}; got "
            f"{data.max_examples_per_task}"
        )
    if isinstance(data, NaturalInstructionsData) and not (
        data.num_unseen_tasks or data.unseen_tasks or data.unseen_categories
    ):
        yield (
            "data holds out no unseen task; set data.num_unseen_tasks above 0, data.unseen_tasks or "
            "data.unseen_categories"
        )
    if isinstance(data, InstructionsData):
        if data.partition == "dirichlet" and data.label_column is None:
            yield "data.partition=dirichlet needs the name of the label column; set data.label_column"
        if data.partition == "natural" and data.client_column is None:
            yield "data.partition=natural needs the column with the owner of a row; set data.client_column"
        if data.unseen_labels and data.label_column is None:
            yield "data.unseen_labels needs the name of the label column; set data.label_column"
        if not data.unseen_labels and data.unseen_fraction == 0:
            yield "data holds out nothing to score; set data.unseen_labels or data.unseen_fraction above 0"
    types = config.clients.types
    if isinstance(types, dict):
        if not types:
            yield "clients.types is an empty mapping; name at least one type, for example small: {attention: 2, ffn: 2}"
        for name, ranks in types.items():
            if ranks.attention == 0 and ranks.ffn == 0 and not any(ranks.patterns.values()):
                yield f"clients.types.{name} adapts nothing; give attention, ffn or a pattern a rank of at least 1"
            for pattern, rank in ranks.patterns.items():
                if rank < 0:
                    yield f"clients.types.{name}.patterns: rank of {pattern!r} must be 0 or more; got {rank}"
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield f"clients.types.{name}.patterns: {pattern!r} must be a regular expression: {error}"
    known = list(types) if isinstance(types, dict) else ["type1", "type2", "type3", "type4"]
    yield from _type_disagreements(config, known)
    yield from _device_disagreements(config, known)
    yield from _clock_disagreements(config)


def _type_disagreements(config: Config, known: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with how clients get one of the ``known`` types."""
    distribution, counts, assigned = config.clients.distribution, config.clients.counts, config.clients.assigned
    unknown = [f"{client_id}: {name}" for client_id, name in assigned.items() if name not in known]
    if unknown:
        shown = ", ".join(unknown[:NUM_CLIENTS_SHOWN]) + (", ..." if len(unknown) > NUM_CLIENTS_SHOWN else "")
        yield f"clients.assigned must give types of clients.types, which has {', '.join(known)}; got {shown}"
    if counts:
        for name in sorted(counts.keys() - set(known)):
            yield f"clients.counts names the type {name!r}; clients.types has {', '.join(known)}"
        num_clients, num_given = config.data.num_clients, sum(counts.values()) + len(assigned)
        if num_clients is not None and num_given != num_clients:
            yield (
                f"clients.counts and clients.assigned are about {num_given} clients but data.num_clients is "
                f"{num_clients}; change the counts, or set data.num_clients={num_given}"
            )
    elif isinstance(distribution, dict):
        for name, share in distribution.items():
            if name not in known:
                yield f"clients.distribution names the type {name!r}; clients.types has {', '.join(known)}"
            if share < 0:
                yield f"clients.distribution.{name} must be 0 or more; got {share}"
        if not any(share > 0 for share in distribution.values()):
            yield "clients.distribution gives every type weight 0; raise at least one"
    elif len(known) != 4:
        yield (
            f"clients.distribution={distribution} is defined for four types; clients.types has {len(known)}: "
            "write clients.distribution as {type: weight}"
        )


def _device_disagreements(config: Config, known: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the devices; their names are checked where their profiles are read."""
    devices = config.devices
    if devices.profiles is None:
        changed = sorted(devices.model_fields_set - {"profiles"} - _unchanged(devices))
        wanted = [f"devices.{name}" for name in changed]
        wanted += ["clients.ranks_from=devices"] if config.clients.ranks_from == "devices" else []
        wanted += sorted(f"clock.{name}" for name in config.clock.model_fields_set - _unchanged(config.clock))
        if wanted:
            yield f"{', '.join(wanted)} need simulated devices; set devices.profiles=built_in or to a CSV file"
        return
    for device, name in devices.types.items():
        if name not in known:
            yield f"devices.types.{device} must be a type of clients.types, which has {', '.join(known)}; got {name!r}"
    if devices.types and config.clients.ranks_from == "devices":
        yield "devices.types gives devices fixed types but clients.ranks_from=devices chooses ranks; leave one out"
    bounds = {"round_seconds": devices.round_seconds, "round_bytes": devices.round_bytes}
    given = [f"devices.{name}" for name, bound in bounds.items() if bound is not None]
    if given and config.clients.ranks_from == "types":
        yield f"{', '.join(given)} bound ranks that are chosen; set clients.ranks_from=devices or leave them out"


def _clock_disagreements(config: Config) -> Iterator[str]:
    clock = config.clock
    if clock.policy == "deadline" and clock.deadline_seconds is None:
        yield "clock.policy=deadline needs a deadline; set clock.deadline_seconds"
    if clock.policy in ("wait", "async") and clock.deadline_seconds is not None:
        yield (
            f"clock.deadline_seconds={clock.deadline_seconds:g} is not looked at by clock.policy={clock.policy}; "
            "set clock.policy=deadline or over_select, or clock.deadline_seconds=null"
        )
    if clock.policy == "async" and config.method.name != "flexlora":
        yield (
            f"clock.policy=async adds up changes of products, which method.name={config.method.name} has none of; "
            "set method.name=flexlora or another clock.policy"
        )


def _unchanged(section: BaseModel) -> set[str]:
    """Return the names of the settings that have their default."""
    defaults = type(section)()
    return {name for name in type(section).model_fields if getattr(section, name) == getattr(defaults, name)}


def load_config(path: Path | str, overrides: Sequence[str] = (), *, check_paths: bool = False) -> Config:
    """Return the configuration in the YAML file ``path`` with ``key.sub=value`` overrides applied.

    Args:
        path: The YAML file.
        overrides: Such as ``rounds.num_rounds=3``; values are YAML.
        check_paths: Also report data and model folders that do not exist.

    Raises:
        ConfigError: With every problem found, each naming key, value and rule.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} holds {', '.join(near)}" if near else ""
        raise ConfigError([f"there is no such file{hint}"], str(path))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"not valid YAML: {error}"], str(path)) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"must hold a mapping of sections; got {type(tree).__name__}"], str(path))
    problems = [problem for override in overrides if (problem := _apply_override(tree, override))]
    source = str(path) if not overrides else f"{path} with {len(overrides)} override(s)"
    return parse_config(tree, source, problems, check_paths=check_paths)


def parse_config(
    tree: Mapping[str, Any], source: str, problems: Sequence[str] = (), *, check_paths: bool = False
) -> Config:
    """Return the configuration in a plain tree, as read from YAML.

    Raises:
        ConfigError: With every problem found and those already known.
    """
    found = list(problems)
    pruned = copy.deepcopy(dict(tree))
    config = None
    # Settings that fail alone would hide those that disagree, so wrong ones are set aside and the rest checked again.
    for _ in range(MOST_CHECKS):
        try:
            config = Config.model_validate(pruned)
            break
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                found.extend(problem for problem in _explain(detail) if problem not in found)
                _set_aside(pruned, detail)
    if config is not None:
        found.extend(_disagreements(config))
    if config is not None and check_paths:
        found.extend(problem for problem in _missing_paths(config) if PLACEHOLDER not in problem)
    if found or config is None:
        raise ConfigError(found or ["no valid setting could be read"], source)
    return config


def _missing_paths(config: Config) -> Iterator[str]:
    data, name = config.data, config.model.name_or_path
    if isinstance(data, NaturalInstructionsData) and not Path(data.path).expanduser().is_dir():
        yield f"data.path: must be a folder of task files; there is no folder {data.path}"
    if isinstance(data, InstructionsData) and _looks_local(data.path) and not Path(data.path).expanduser().exists():
        yield f"data.path: there is no file or folder {data.path}; a hub id looks like org/name"
    profiles = config.devices.profiles
    if profiles not in (None, "built_in") and not Path(profiles).expanduser().is_file():
        yield f"devices.profiles: must be built_in or a CSV file; there is no file {profiles}"
    if name != "embedded" and _looks_local(name) and not Path(name).expanduser().is_dir():
        yield f"model.name_or_path: there is no folder {name}; use `embedded`, a local folder or a hub id like org/name"


def _looks_local(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix in DATA_SUFFIXES


def _written_location(location: Sequence[Any]) -> list[str]:
    """Return the key as a person wrote it, without the variants that pydantic adds to the path."""
    return [
        str(part)
        for index, part in enumerate(location)
        if not (index == 1 and part in VARIANT_TAGS) and not str(part).startswith(("literal[", "dict[", "tuple["))
    ]


def _set_aside(tree: dict[str, Any], detail: Any) -> None:
    location = _written_location(detail["loc"])
    node: Any = tree
    for part in location[:-1]:
        if not isinstance(node, dict) or part not in node:
            return
        node = node[part]
    if not location or not isinstance(node, dict):
        return
    if detail["type"] == "missing" or detail["input"] is None:
        node[location[-1]] = PLACEHOLDER
    else:
        node.pop(location[-1], None)


def dump_config(config: Config) -> str:
    """Return the configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> str | None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        return f"override {override!r} must look like key.sub=value"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return f"override {override!r}: the value is not valid YAML"
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            return f"override {override!r}: {parent} is {child!r}, not a section"
        node = child
    # YAML reads 1e-3 as text; numbers written so are meant as numbers.
    node[last] = _number(value) if isinstance(value, str) else value
    return None


def _number(text: str) -> float | str:
    # Hub revisions are all digits or look like 12e4567; what people mean as a number has a short exponent.
    return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,2}", text) else text


def _explain(detail: Any) -> Iterator[str]:
    location = [str(part) for part in detail["loc"]]
    shown = _written_location(location)
    if detail["input"] == PLACEHOLDER:
        return
    if isinstance(detail["input"], dict) and any(part.startswith("literal[") for part in location):
        return  # The other reading of the setting, as a mapping, is explained by its own entry.
    key = ".".join(shown)
    if detail["type"] == "extra_forbidden":
        choices = _known_keys(location)
        near = difflib.get_close_matches(shown[-1], choices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(sorted(choices))}"
        yield f"{key}: there is no such setting; {hint}"
    elif detail["type"] == "missing" or detail["input"] is None:
        yield f"{key}: must be set, for example {key}=VALUE on the command line"
    elif detail["type"] in ("union_tag_not_found", "union_tag_invalid"):
        choices = [tag for tag in VARIANT_TAGS if (tag in METHOD_TAGS) == (key == "method")]
        given = detail["input"].get("name") if isinstance(detail["input"], dict) else detail["input"]
        yield f"{key}.name: must be one of {', '.join(choices)}; got {given!r}"
    else:
        value = repr(detail["input"])
        if len(value) > TRUNCATED_VALUE_LENGTH:
            value = value[:TRUNCATED_VALUE_LENGTH] + "..."
        yield f"{key}: {_rule(key, detail)}; got {value}"


def _rule(key: str, detail: Any) -> str:
    """Return what a value must be, with an example made of the one given where its shape is wrong."""
    given = detail["input"] if isinstance(detail["input"], str | int | float) else "VALUE"
    if detail["type"] == "tuple_type":
        return f"must be a list, as {key}=[{given}]"
    if detail["type"] == "dict_type":
        return f"must be a mapping, as {key}={{NAME: VALUE}}"
    if detail["type"] in ("model_type", "model_attributes_type"):
        first = "name" if key in ("data", "method") else next(iter(_known_keys([*key.split("."), ""])), "NAME")
        return f"must be a section of settings, as {key}.{first}={given}"
    return detail["msg"]


def _known_keys(location: Sequence[str]) -> list[str]:
    variants: dict[str, type[BaseModel]] = {
        "generated": GeneratedData,
        "natural_instructions": NaturalInstructionsData,
        "instructions": InstructionsData,
        "fedit": FedItMethod,
        "zero_pad": ZeroPadMethod,
        "flexlora": FlexLoraMethod,
    }
    if len(location) == 1:
        return list(Config.model_fields)
    if location[1] in variants:
        return list(variants[location[1]].model_fields)
    if location[0] == "clients" and len(location) > 3:
        return list(RankConfig.model_fields)
    annotation = Config.model_fields[location[0]].annotation
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]  # `ray` may be null.
    return [name for kind in kinds if issubclass(kind, BaseModel) for name in kind.model_fields]
