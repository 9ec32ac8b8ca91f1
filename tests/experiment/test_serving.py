"""A server beside one that runs in the same folder."""

import os
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from flexlora.engines.flower.superlink import SuperLink
from flexlora.experiment.deployment_file import DeploymentFile, read_deployment
from flexlora.experiment.run_folder import ExperimentError
from flexlora.experiment.server_order import server_config
from flexlora.experiment.serving import serve_run
from flexlora.experiment.stages import ignore
from flexlora.locks import locked


def test_a_second_server_in_a_folder_leaves_the_file_of_the_first(tmp_path: Path) -> None:
    config, folder = server_config(None, [], tmp_path / "run", True)
    first = DeploymentFile("127.0.0.1:1", os.getpid(), None, 3)
    with locked(folder, ExperimentError), SuperLink("127.0.0.1", 0, None) as link:
        first.write(folder)
        with pytest.raises(ExperimentError, match="a run is going on in"):
            serve_run(config, folder, link, resume=False, overwrite=True, notify=ignore, say=lambda line: None)
        assert read_deployment(folder) == first
