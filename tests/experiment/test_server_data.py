"""What a server of real clients scores on."""

from pathlib import Path

import pytest

from flexlora.experiment.config import ConfigError
from flexlora.experiment.config_file import load_config
from flexlora.experiment.server_data import without_clients
from flexlora.experiment.starter import STARTER_FOLDER


def test_a_missing_file_to_score_on_is_told_by_the_name_of_its_setting(tmp_path: Path) -> None:
    config = load_config(STARTER_FOLDER / "federation.yaml", [f"deployment.scored_on={tmp_path / 'none.jsonl'}"])
    with pytest.raises(ConfigError, match=r"deployment\.scored_on must be a file or folder"):
        without_clients(config)
