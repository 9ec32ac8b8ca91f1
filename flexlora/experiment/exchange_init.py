"""Begins a run whose clients exchange files with it: its folder, with the broadcasts of round 1, appears whole."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flexlora.engines.exchange_keys import PUBLIC_SUFFIX, private_key, public_key
from flexlora.engines.exchange_manifest import ExchangeError
from flexlora.experiment.config import Config
from flexlora.experiment.exchange_limits import refuse_exchange
from flexlora.experiment.exchange_run import ExchangeRun, new_exchange, write_record
from flexlora.experiment.manifest import gathered_manifest
from flexlora.experiment.run_folder import KEYS_FOLDER, open_folder
from flexlora.experiment.stages import Notify, Stage, ignore
from flexlora.files import appearing_whole, file_above
from flexlora.rounds.loop import run_rounds
from flexlora.text import is_plain_word


@dataclass(frozen=True)
class BegunRun:
    """A run that waits for its first replies.

    Attributes:
        folder: Of the run.
        run_id: Its id.
        broadcasts: Name of a rank plan -> folder to be sent to clients of it.
        ranks: Name of a rank plan -> its largest rank.
        clients: Clients whose keys are trusted; empty where replies need no signature.
    """

    folder: Path
    run_id: str
    broadcasts: dict[str, Path]
    ranks: dict[str, int]
    clients: tuple[str, ...]


def begin_exchange(
    config: Config,
    folder: Path | str,
    *,
    key: Path | None = None,
    trusted: Sequence[Path] = (),
    notify: Notify = ignore,
) -> BegunRun:
    """Make the folder of a run whose clients exchange files with it.

    Args:
        config: The run. Of its ``data``, only how examples are used counts: clients bring their own.
        folder: Must not exist, or be empty.
        key: The server's private key, with which broadcasts are signed; None signs nothing.
        trusted: Public keys of clients, ``NAME.pub`` for the client NAME; with any, every reply must be signed.
        notify: Told about each step.

    Raises:
        ConfigError: If such a run is not possible with this method or these settings.
        ExchangeError: If ``folder`` is taken, a key is none, or the method sends more than adapters.
        FlexLoraError: If the base model cannot be read.
    """
    folder = Path(folder)
    refuse_exchange(config)
    check_folder_is_new(folder)
    names = [_owner(path) for path in trusted]
    if key is not None:
        private_key(key)
    run = new_exchange(config, folder, notify)
    notify(Stage("Writing the run and its first broadcasts"))
    with appearing_whole(folder, replace=folder.is_dir()) as partial:
        _fill(replace(run, folder=partial), key, trusted)
    places = {name: run.broadcasts(1) / name for name in run.plans}
    ranks = {name: max(plan.resolve(run.shapes).values()) for name, plan in run.plans.items()}
    return BegunRun(folder, run.record.run_id, places, ranks, tuple(sorted(names)))


def check_folder_is_new(folder: Path) -> None:
    """Raise unless a run can begin in a folder.

    Raises:
        ExchangeError: Saying what is in the way.
    """
    if file := file_above(folder):
        raise ExchangeError(f"a run needs a folder, but {file} is a file; a folder is needed there")
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ExchangeError(f"a run begins in a new or empty folder; {folder} is neither: name another one")


def _fill(run: ExchangeRun, key: Path | None, trusted: Sequence[Path]) -> None:
    manifest = gathered_manifest(run, run.num_parameters, torch.device("cpu"))
    open_folder(run.config, manifest, run.folder, anew=False)
    write_record(run)
    for path in trusted:
        (run.folder / KEYS_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(path, run.folder / KEYS_FOLDER / path.name)
    state = run_rounds(run.loop(0)).state
    run.write_broadcasts(state, 1, key)


def _owner(path: Path) -> str:
    """Return the client whose public key a file is."""
    public_key(path)
    name = path.name.removesuffix(PUBLIC_SUFFIX)
    if name == path.name or not is_plain_word(name):
        raise ExchangeError(f"the public key of the client NAME must be called NAME{PUBLIC_SUFFIX}; got {path.name}")
    return name
