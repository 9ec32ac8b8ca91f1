"""Guesses which setting an unknown key meant: misspelt, of another section, or a word of another project."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from flexlora.aggregators.registry import method_outline, package_methods
from flexlora.aggregators.settings import options_of
from flexlora.experiment.config import Config
from flexlora.experiment.config_clients import RankConfig

RANKS = (
    "ranks belong to client types; clients.types={all: {attention: 8, ffn: 8}} clients.distribution={all: 1} gives "
    "every client rank 8"
)

# Words of PEFT, transformers, Flower and papers -> what they are called here.
WORDS: Mapping[str, str] = {
    "alpha": "lora.lora_alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.scaling=rslora",
    "modules": "lora.target_modules",
    "lr": "training.learning_rate",
    "base_lr": "training.learning_rate",
    "epochs": "training.num_epochs",
    "local_epochs": "training.num_epochs",
    "num_train_epochs": "training.num_epochs",
    "local_steps": "training.max_steps",
    "per_device_train_batch_size": "training.batch_size",
    "train_batch_size": "training.batch_size",
    "lr_scheduler_type": "training.schedule",
    "scheduler": "training.schedule",
    "warmup_steps": "training.warmup_rounds",
    "mu": "training.proximal",
    "optim": "training.optimizer",
    "rounds": "rounds.num_rounds",
    "num_server_rounds": "rounds.num_rounds",
    "fraction_fit": "rounds.cohort_fraction",
    "fraction_train": "rounds.cohort_fraction",
    "sample_fraction": "rounds.cohort_fraction",
    "clients_per_round": "rounds.cohort_size",
    "min_fit_clients": "rounds.cohort_size",
    "base_model": "model.name_or_path",
    "model_name": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "torch_dtype": "model.dtype",
    "threads": "model.num_threads",
    "processes": "model.num_processes",
    "dataset": "data.path",
    "num_supernodes": "data.num_clients",
    "alpha_dirichlet": "data.dirichlet_alpha",
    "seq_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "strategy": "method.name",
    "aggregator": "method.name",
    "algorithm": "method.name",
}
# The same words mean something else in a section that has a word of its own for it.
WORDS_IN: Mapping[str, str] = {
    "lora.r": RANKS,
    "lora.rank": RANKS,
    "lora.ranks": RANKS,
    "training.rank": RANKS,
    "model.rank": RANKS,
    "clients.rank": RANKS,
    "clients.ranks": RANKS,
    "rank": RANKS,
    "ranks": RANKS,
    "r": RANKS,
    "model.name": "model.name_or_path",
    "model.path": "model.name_or_path",
    "model.id": "model.name_or_path",
    "model.base": "model.name_or_path",
    "method.method": "method.name",
    "data.alpha": "data.dirichlet_alpha",
}


# A setting of some data -> what says most nearly the same about others, the nearest first.
ALIKE: Mapping[str, tuple[str, ...]] = {
    "num_unseen_tasks": ("unseen_fraction",),
    "unseen_fraction": ("num_unseen_tasks",),
    "unseen_tasks": ("unseen_labels",),
    "unseen_owners": ("unseen_tasks", "unseen_labels"),
    "unseen_categories": ("unseen_labels",),
    "unseen_labels": ("unseen_categories",),
    "examples_per_task": ("max_examples_per_task", "facts_per_client"),
    "max_examples_per_task": ("examples_per_task", "facts_per_client"),
    "facts_per_client": ("examples_per_task", "max_examples_per_task"),
}
VARIED = ("data", "method")
"""Sections whose settings depend on their name."""


def hint(location: Sequence[str], choices: Sequence[str], name: str = "") -> str:
    """Return what the unknown key at a location may have meant, or else what is known there.

    Args:
        location: The parts of the key, as ``["lora", "rank"]``.
        choices: The keys that its section has.
        name: Of the data or of the method, if the key is in one of these sections; empty if it is not known.
    """
    key, last = ".".join(location), location[-1]
    section = location[0]
    if len(location) == 2 and section in VARIED and (owners := names_with(section, last)):
        return _of_another(section, last, owners, choices, name)
    if meant := word_meant(key):
        return meant
    near = difflib.get_close_matches(last, choices, n=1)
    # Close to a key here, and not the very name of one elsewhere.
    elsewhere = sorted(name for name in setting_names() if name.rpartition(".")[2] == last)
    if near and not elsewhere:
        return f"did you mean {near[0]}?"
    if elsewhere:
        return f"did you mean {' or '.join(map(_with_names, elsewhere))}?"
    return f"known keys here: {', '.join(sorted(choices))}"


def word_meant(key: str) -> str | None:
    """Return the setting that another project's word stands for, as a hint; None if the word is unknown."""
    words = {name.lower(): meaning for name, meaning in WORDS.items()}
    found = WORDS_IN.get(key.lower()) or words.get(key.lower().rpartition(".")[2])
    if found is None:
        return None
    return found if found == RANKS else f"did you mean {_with_names(found)}?"


def names_with(section: str, key: str) -> list[str]:
    """Return the names of the data, or of the package's methods, that have a setting of their own, sorted.

    Args:
        section: ``data`` or ``method``.
        key: The setting without its section.
    """
    if section == "method":
        return [name for name in package_methods() if key in options_of(method_outline(name))]
    models = models_of(Config.model_fields["data"].annotation)
    return sorted(get_args(model.model_fields["name"].annotation)[0] for model in models if key in model.model_fields)


def _with_names(setting: str) -> str:
    """Return a setting, and which data have it if not all do."""
    section, _, key = setting.partition("=")[0].partition(".")
    num_models = len(list(models_of(Config.model_fields["data"].annotation)))
    if section != "data" or len(owners := names_with(section, key)) in (0, num_models):
        return setting
    return f"{setting} (of data.name={' or '.join(owners)})"


def _of_another(section: str, key: str, owners: Sequence[str], choices: Sequence[str], name: str) -> str:
    """Return whose setting a key is, which never is what its own section has, and what to do instead."""
    alike = [other for other in ALIKE.get(key, ()) if other in choices]
    shown = " or ".join(owners[:4]) + (" or others" if len(owners) > 4 else "")
    belongs = f"it belongs to {section}.name={shown}" + (f", and {section}.name is {name}" if name else "")
    anew = f"write the section anew, as '{section}={{name: {name or 'NAME'}, ...}}'"
    if alike:
        return f"{belongs}; did you mean {section}.{alike[0]}? If not, remove it, or {anew}"
    return f"{belongs}; remove it, set another {section}.name, or {anew}"


@cache
def setting_names() -> frozenset[str]:
    """Return every setting as ``section.name``, those of all variants of a section together."""
    names: set[str] = set()
    for section, field in Config.model_fields.items():
        inner = {name for model in models_of(field.annotation) for name in model.model_fields}
        names |= {f"{section}.{name}" for name in inner} or {section}
    return frozenset(names)


def models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections that an annotation leads to, not those of client types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation is not RankConfig:
        yield annotation
    for part in get_args(annotation):
        yield from models_of(part)
