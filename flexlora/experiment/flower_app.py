"""Runs a federation that was started with ``flwr run``: settings are Flower's run config, progress goes to its log."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from flexlora.engines.flower.nodes import ClientNodes
from flexlora.errors import FlexLoraError
from flexlora.experiment.config_file import load_config
from flexlora.experiment.flower_run import run_on_flower
from flexlora.experiment.run_folder import CONFIG_FILE
from flexlora.experiment.stages import Scoring, Stage
from flexlora.rounds.loop_parts import RoundEvent
from flexlora.rounds.records import RECORDS_FILE

_log = logging.getLogger("flwr")


class FlowerAppError(FlexLoraError, ValueError):
    """Settings of ``flwr run`` that are missing, or a run that learned nothing."""


def run_app(grid: Grid, run_config: Mapping[str, Any], folder: Path | None = None) -> None:
    """Run the federation that a run config names; one that was started before goes on.

    Args:
        grid: Of the run.
        run_config: ``config`` is the file of a configuration, ``out`` the folder of the run; both are on the machine of
            the server and absolute, or begin with ``~``. ``settings`` may hold overrides (``rounds.num_rounds=3``),
            separated by blanks.
        folder: In which ``config`` may be, too.

    Raises:
        FlowerAppError: If one is missing, or no client ever sent a usable update.
        FlexLoraError: Whatever else is wrong.
    """
    file, out = _path(run_config, "config", folder), _path(run_config, "out", None)
    overrides = str(run_config.get("settings", "")).split()
    config = load_config(file, overrides)
    resume = (out / CONFIG_FILE).is_file()
    result = run_on_flower(config, out, lambda: nullcontext(grid), resume=resume, notify=_tell, watch=_tell_of_nodes)
    if not result.has_progress:
        raise FlowerAppError(f"no client ever sent a usable update; {out / RECORDS_FILE} says why")


def _path(run_config: Mapping[str, Any], key: str, folder: Path | None) -> Path:
    value = run_config.get(key)
    path = Path(str(value)).expanduser()
    if folder is not None and not path.is_absolute() and (folder / path).is_file():
        return folder / path
    if not isinstance(value, str) or not path.is_absolute():
        raise FlowerAppError(
            f"{key} must be an absolute path on the server's machine; got {value!r}: "
            f"flwr run . --run-config '{key}=\"/PATH\"'"
        )
    return path


def _tell(event: RoundEvent | Stage | Scoring) -> None:
    if isinstance(event, Stage):
        _log.info("%s", " ".join((event.title, *event.notes)))
    elif isinstance(event, RoundEvent) and event.kind == "client" and event.client is not None:
        client = event.client
        how = "ok" if client.outcome == "ok" else f"failed in {client.stage}: {client.reason}"
        _log.info("Round %d: %s %s", event.server_round, client.client_id, how)
    elif isinstance(event, RoundEvent) and event.kind == "done" and event.record is not None:
        _log.info("Round %d: %d updates, %d failed", event.server_round, event.record.num_ok, event.record.num_failed)


def _tell_of_nodes(nodes: ClientNodes, line: str) -> None:
    _log.info("%s", line)
