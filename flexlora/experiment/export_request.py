"""Refuses what cannot be exported, before anything heavy is loaded."""

import os
from pathlib import Path

from flexlora.adapters.hub import check_repo_id
from flexlora.adapters.rank_layout import RankLayout
from flexlora.experiment.config import Config
from flexlora.experiment.kept_rounds import check_checkpoints, check_rank, known_top_rank
from flexlora.experiment.run_folder import ExperimentError
from flexlora.files import file_above


def check_export(
    config: Config,
    run_folder: Path,
    folder: Path | None,
    *,
    rank: int | None,
    merged: bool,
    layout: RankLayout,
    push_to_hub: str | None,
) -> None:
    """Raise if an export is known to fail; ``export_run`` says what each argument means.

    Raises:
        ExperimentError: If the run has no checkpoint, the rank is out of range, or the folder cannot be written.
        AdapterError: If ranks do not fit, or the hub cannot have such an id.
    """
    if folder is not None and os.path.lexists(folder):
        raise ExperimentError(f"the folder to write must not exist yet; {folder} does")
    if folder is not None and (file := file_above(folder)):
        raise ExperimentError(f"the folder to write is {folder}, but {file} is a file; a folder is needed there")
    if merged and config.model.quantization is not None:
        raise ExperimentError(
            f"the adapter was trained on a base of {config.model.quantization} weights (model.quantization), into "
            "which no change can be merged without rounding a part of it away; leave merged out, and load the adapter "
            "on a base that is quantised in the same way"
        )
    if merged and layout != RankLayout():
        raise ExperimentError("ranks and pad_to lay out an adapter; a merged model has none: leave them or merged out")
    if push_to_hub is not None:
        check_repo_id(push_to_hub)
    top = known_top_rank(config, run_folder)
    if top is not None:
        layout.stored({"all": check_rank(rank, top)})
    check_checkpoints(run_folder)
