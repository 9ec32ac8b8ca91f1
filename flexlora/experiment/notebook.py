"""Runs an experiment with one call from Python: a notebook, a script or a prompt."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from flexlora.aggregators.registry import registered_name
from flexlora.console import plain_console
from flexlora.data.owned_examples import OwnedRow
from flexlora.experiment.config import ConfigError
from flexlora.experiment.config_sources import ConfigSource, config_from, name_of_source
from flexlora.experiment.live_progress import LiveProgress
from flexlora.experiment.result import RunResult
from flexlora.experiment.run import run_experiment
from flexlora.experiment.run_folder import CONFIG_FILE, ExperimentError
from flexlora.experiment.stages import Stage
from flexlora.files import making_parents
from flexlora.training.own_loop import TrainFunction

RUNS_FOLDER = Path("runs")


def run(
    config: ConfigSource,
    out: Path | str | None = None,
    method: str | type | Mapping[str, object] | None = None,
    data: Iterable[OwnedRow] | Mapping[str, object] | None = None,
    trainer: TrainFunction | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **overrides: object,
) -> RunResult:
    """Run a federation and return what it left behind.

    Args:
        config: ``"demo"``, the path of a YAML file, a mapping of sections, or a ``Config``.
        out: The folder of the run; None makes one with a fresh name, ``runs/demo-1`` for the first demo.
        method: The name of a method, a class of your own registered by ``aggregation_method``, or a section:
            ``{"name": "flexlora", "fold_tail": True}``.
        data: Examples with an owner, each owner one client: mappings with the keys ``owner``, ``instruction`` and
            ``response`` (or another accepted schema), ``OwnedExample`` objects, ``(owner, Example)`` pairs, or a pandas
            frame. A mapping of settings replaces those of the section ``data``.
        trainer: A training loop of your own, ``(model, tokenizer, examples, adapter, settings, seed) -> (adapter,
            metrics)``, or what ``flexlora.trainers.from_hf`` makes of a factory of trainers.
        resume: Go on with the run in ``out``, with the same arguments; it may get more rounds.
        overwrite: Delete the run in ``out`` first.
        quiet: Show no progress.
        overrides: Settings that replace those of ``config``: ``rounds__num_rounds=3``, or
            ``rounds={"num_rounds": 3}``; ``seed=1``.

    Raises:
        ConfigError: With everything that is wrong in the settings.
        ExperimentError: If ``out`` does not suit, or the data or the configuration of a resumed run have changed.
        FlexLoraError: If data or model cannot be read.
    """
    examples = None if data is None or isinstance(data, Mapping) else _examples_of(data)
    sections: dict[str, object] = {}
    if method is not None:
        name = registered_name(method) if isinstance(method, type) else method
        sections["method"] = name if isinstance(name, Mapping) else {"name": name}
    if data is not None:
        sections["data"] = data if isinstance(data, Mapping) else {"name": "in_memory"}
    settings = config_from(config, {**sections, **overrides})
    if out is None and (resume or overwrite):
        raise ExperimentError("resume=True and overwrite=True need out=, the folder of the run; got none")
    with (
        _run_folder(out, name_of_source(config)) as folder,
        _global_state_restored(),
        LiveProgress(plain_console(stderr=True), hidden=quiet) as progress,
    ):
        progress(Stage(f"Run folder {folder}"))
        try:
            return run_experiment(
                settings, folder, data=examples, trainer=trainer, resume=resume, overwrite=overwrite, notify=progress
            )
        except KeyboardInterrupt as interruption:
            if (folder / CONFIG_FILE).is_file():
                interruption.add_note(f"The same call with out={str(folder)!r} and resume=True goes on from there.")
            raise


def _examples_of(data: Iterable[OwnedRow]) -> Iterable[OwnedRow]:
    if isinstance(data, str | Path):
        section = {"name": "instructions", "path": str(data)}
        raise ConfigError([f"data: must be examples or a section; a file is named by data={section}"], "the call")
    # Iterating over a frame gives its columns, not its rows.
    return data.to_dict("records") if _is_frame(data) else data  # type: ignore[attr-defined]


def _is_frame(data: object) -> bool:
    return hasattr(data, "columns") and hasattr(data, "to_dict")


@contextmanager
def _run_folder(out: Path | str | None, name: str) -> Iterator[Path]:
    """Give a ``with`` block the folder of a run; one made for it is removed again if the block leaves it empty."""
    folder = RUNS_FOLDER / name if out is None else Path(out)
    with making_parents(folder) if out is None else nullcontext():
        if out is None:
            folder = _fresh_folder(name)
        try:
            yield folder
        finally:
            if out is None:
                with suppress(OSError):
                    folder.rmdir()


def _fresh_folder(name: str) -> Path:
    for number in itertools.count(1):
        folder = RUNS_FOLDER / f"{name}-{number}"
        # Made at once, so that of two processes that start together each gets its own.
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("itertools.count never ends")


@contextmanager
def _global_state_restored() -> Iterator[None]:
    """Leave torch and transformers as they were, whatever a run sets for itself."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        if shows_bars:
            transformers_logging.enable_progress_bar()
