"""Checks settings against one another."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from flexlora.adapters.base_names import hub_file, is_gguf
from flexlora.experiment.config import Config
from flexlora.experiment.config_data import InMemoryData, InstructionsData, NaturalInstructionsData, PhoneBookData
from flexlora.experiment.differential_checks import differential_disagreements
from flexlora.experiment.method_config import DEFAULT_METHOD
from flexlora.experiment.privacy_checks import privacy_disagreements
from flexlora.experiment.robust_checks import robust_disagreements
from flexlora.patterns import PatternError, bounded_pattern
from flexlora.rounds.devices import BUILT_IN, DeviceError, assign_devices, device_profiles
from flexlora.text import count_text

NUM_CLIENTS_SHOWN = 5


DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def disagreements(config: Config) -> Iterator[str]:
    """Yield a sentence for each setting that does not fit the others."""
    optimizer = config.method.traits().local_optimizer or config.training.optimizer
    if optimizer == "adamw" and config.training.momentum:
        yield (
            f"training.momentum is {config.training.momentum} but only training.optimizer=sgd has momentum; "
            "set training.momentum=0 or training.optimizer=sgd"
        )
    final, training = config.training.final_learning_rate, config.training
    if final and training.schedule not in ("linear", "cosine"):
        yield (
            f"training.final_learning_rate is {final} but only training.schedule=linear and cosine fall to it; set "
            f"training.final_learning_rate=0, or a schedule that falls; got {training.schedule}"
        )
    elif final > training.learning_rate:
        yield (
            f"training.final_learning_rate={final} is above training.learning_rate={training.learning_rate}, from "
            "which rates fall; set it to at most that"
        )
    if config.rounds.patience is not None and config.data.validation_examples == 0:
        yield "rounds.patience needs a validation set; set data.validation_examples above 0 or rounds.patience=null"
    if config.rounds.patience is not None and config.method.traits().personal:
        yield (
            "rounds.patience waits for a lower validation loss of the model that all share, but clients of "
            f"method.name={config.method.name} keep a part of theirs to themselves, which it lacks; set "
            "rounds.patience=null"
        )
    least = config.method.traits().least_rounds
    if config.rounds.num_rounds < least:
        yield (
            f"method.name={config.method.name} prepares itself in its first {count_text(least - 1, 'round')}, and "
            f"rounds.num_rounds={config.rounds.num_rounds} leaves none to follow; set rounds.num_rounds to at least "
            f"{least}, or let the method prepare itself for fewer rounds"
        )
    if config.model.quantization is not None and ((config.model.num_processes or 1) > 1 or config.ray is not None):
        yield (
            f"model.quantization={config.model.quantization} stores weights that processes cannot share; set "
            "model.num_processes=1 and ray=null, or model.quantization=null"
        )
    yield from _data_disagreements(config)
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
                    bounded_pattern(pattern)
                except PatternError as error:
                    yield f"clients.types.{name}.patterns: {error}"
    known = list(types) if isinstance(types, dict) else ["type1", "type2", "type3", "type4"]
    yield from _type_disagreements(config, known)
    yield from _device_disagreements(config, known)
    yield from _clock_disagreements(config)
    yield from _compression_disagreements(config)
    yield from privacy_disagreements(config)
    yield from differential_disagreements(config)
    yield from robust_disagreements(config)
    if isinstance(config.data, PhoneBookData):
        yield from _phone_book_disagreements(config, config.data, known)


def _phone_book_disagreements(config: Config, data: PhoneBookData, known: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with who owns how many facts; ``known`` are the client types."""
    if data.num_facts is not None:
        for name in sorted({"facts_per_client", "facts_by_type"} & data.model_fields_set):
            yield f"data.num_facts deals all facts evenly and data.{name} would be ignored; leave one of them out"
        if data.num_facts < (data.num_clients or 1):
            yield (
                f"data.num_facts must be {data.num_clients} or more, one for each client; got {data.num_facts}: raise "
                "it or lower data.num_clients"
            )
    if data.facts_by_type and config.clients.ranks_from == "devices":
        yield "data.facts_by_type needs client types and clients.ranks_from=devices has none; set data.facts_per_client"
    elif unknown := sorted(data.facts_by_type.keys() - set(known)):
        yield f"data.facts_by_type names {', '.join(unknown)}; clients.types has {', '.join(known)}"


def _compression_disagreements(config: Config) -> Iterator[str]:
    bits = config.rounds.upload_bits
    if bits is not None and config.privacy.secure_sum is not None:
        yield (
            f"rounds.upload_bits={bits} rounds each update on its own, and under privacy.secure_sum updates travel in "
            "a fixed point of privacy.secure_sum.word_bits; set rounds.upload_bits=null"
        )
    if not config.rounds.error_feedback:
        return
    if bits is None:
        yield "rounds.error_feedback is about what rounds.upload_bits loses; set rounds.upload_bits to 8 or 4"
    if config.method.traits().personal:
        yield (
            f"rounds.error_feedback corrects products, and clients of method.name={config.method.name} send one factor "
            "only; set rounds.error_feedback=false"
        )
    if config.rounds.robust is not None:
        yield (
            "rounds.error_feedback adds to an update what was lost of the last one, and with rounds.robust its client "
            "cannot know whether that one counted; set rounds.error_feedback=false or rounds.robust=null"
        )


def _data_disagreements(config: Config) -> Iterator[str]:
    """Yield what is wrong with the data of a run."""
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
        if data.partition == "natural" and data.client_column is None and data.client_from == "column":
            yield (
                "data.partition=natural needs the column with the owner of a row; set data.client_column, or "
                "data.client_from=file if every owner has a file"
            )
        if data.client_from == "file" and (data.client_column is not None or data.partition != "natural"):
            yield (
                "data.client_from=file needs data.partition=natural and no data.client_column; got "
                f"data.partition={data.partition} and data.client_column={data.client_column}"
            )
        if data.unseen_labels and data.label_column is None:
            yield "data.unseen_labels needs the name of the label column; set data.label_column"
        if not data.unseen_labels and data.unseen_fraction == 0:
            yield "data holds out nothing to score; set data.unseen_labels or data.unseen_fraction above 0"
    if isinstance(data, InMemoryData):
        if data.unseen_owners and data.unseen_labels:
            yield "data.unseen_owners and data.unseen_labels both hold examples out; leave one of them empty"
        if not (data.unseen_owners or data.unseen_labels or data.unseen_fraction):
            yield "data holds out nothing to score; set data.unseen_owners, unseen_labels or unseen_fraction"


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
            f"clock.deadline_seconds={clock.deadline_seconds:g} is ignored by clock.policy={clock.policy}; "
            "set clock.policy=deadline or over_select, or clock.deadline_seconds=null"
        )
    if clock.policy == "async" and not config.method.traits().adds_changes:
        yield (
            f"clock.policy=async adds up late changes, which method.name={config.method.name} cannot do; set "
            f"method.name={DEFAULT_METHOD} or another clock.policy"
        )
    elif clock.policy == "async":
        yield from _late_disagreements(config)


def _late_disagreements(config: Config) -> Iterator[str]:
    """Yield why a method whose clients differ in more than their ranks cannot take late changes."""
    traits, name = config.method.traits(), config.method.name
    reasons = {
        "remembers one broadcast per rank plan and round for clients that come back late, but "
        f"method.name={name} sends every client its own": traits.per_client,
        f"adds up changes against what a client was sent, but clients of method.name={name} start from a factor that "
        "they keep themselves": traits.personal,
    }
    for reason, applies in reasons.items():
        if applies:
            yield f"clock.policy=async {reason}; set another clock.policy or another method.name"


def _unchanged(section: BaseModel) -> set[str]:
    """Return the names of the settings that have their default."""
    defaults = type(section)()
    return {name for name in type(section).model_fields if getattr(section, name) == getattr(defaults, name)}


def missing_paths(config: Config) -> Iterator[str]:
    """Yield a sentence for each file or folder that is named and does not exist."""
    data, name = config.data, config.model.name_or_path
    if isinstance(data, NaturalInstructionsData) and not Path(data.path).expanduser().is_dir():
        yield f"data.path: must be a folder of task files; there is no folder {data.path}"
    if isinstance(data, InstructionsData) and _looks_local(data.path) and not Path(data.path).expanduser().exists():
        yield f"data.path: there is no file or folder {data.path}; a hub id looks like org/name"
    profiles = config.devices.profiles
    if profiles is not None and profiles != BUILT_IN and not Path(profiles).expanduser().is_file():
        yield f"devices.profiles: must be built_in or a CSV file; there is no file {profiles}"
    elif profiles is not None:
        yield from _device_mistakes(config)
    if is_gguf(name):
        if not Path(name).expanduser().is_file() and hub_file(name) is None:
            yield f"model.name_or_path: there is no file {name}; one on the hub is called org/name/file.gguf"
    elif name != "embedded" and _looks_local(name) and not Path(name).expanduser().is_dir():
        yield f"model.name_or_path: there is no folder {name}; use `embedded`, a local folder or a hub id like org/name"


def _device_mistakes(config: Config) -> Iterator[str]:
    """Yield what is wrong in the file of devices, and with devices that settings name."""
    try:
        # No client is given a device, but every name is looked up.
        assign_devices(
            (),
            device_profiles(config.devices.profiles),
            config.seed,
            distribution=config.devices.distribution,
            counts=dict.fromkeys(config.devices.counts, 0),
            assigned={},
        )
    except DeviceError as error:
        yield str(error)


def _looks_local(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix in DATA_SUFFIXES
