"""Decides which settings may change when a run is scored again."""

import re

from flexlora.experiment.config import Config
from flexlora.experiment.run_folder import ExperimentError, differences

EVALUATION_KEYS = (
    r"data\.(path|cache|test_examples_per_task|max_length)|evaluation\..*|"
    r"model\.(device|dtype|num_threads|num_processes|attn_.*)|ray(\..*)?"
)


def check_changes(before: Config, now: Config) -> None:
    """Raise if settings differ that could turn a client's data into "unseen" tasks, or not fit the adapter.

    Raises:
        ExperimentError: Naming the settings, and those that may differ.
    """
    changed = differences(before.model_dump(mode="json"), now.model_dump(mode="json"))
    refused = [key for key in changed if not re.fullmatch(EVALUATION_KEYS, key)]
    if refused:
        raise ExperimentError(
            "scoring a run again can change data.path, data.cache, data.test_examples_per_task, data.max_length, "
            f"evaluation.* and where the model runs; got {', '.join(refused)}"
        )
