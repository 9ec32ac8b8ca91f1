"""What a running server leaves for programs on its machine, and how it is seen that it has ended."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexlora.experiment.deployment_file import (
    ConnectedClient,
    DeploymentError,
    DeploymentFile,
    read_deployment,
    remove_deployment,
    running_deployment,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = DeploymentFile("127.0.0.1:1", os.getpid(), None, 3, (ConnectedClient("a", "rank-4", 7, "cpu"),), ("no",))
    written.write(tmp_path)
    assert read_deployment(tmp_path) == written
    remove_deployment(tmp_path)
    with pytest.raises(DeploymentError, match="no server runs in"):
        read_deployment(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"clients": 3}', '{"clients": [], "refused": [], "x": 1}'])
def test_a_damaged_file_is_told(tmp_path: Path, content: str) -> None:
    DeploymentFile("127.0.0.1:1", 1, None, 3).write(tmp_path)
    (tmp_path / "server" / "deployment.json").write_text(content)
    with pytest.raises(DeploymentError, match="must be what flexlora server writes"):
        read_deployment(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("process", -1), ("process", 0), ("process", "1"), ("process", True), ("num_rounds", 2.5), ("refused", [1])],
)
def test_a_number_that_is_not_one_process_is_refused(tmp_path: Path, field: str, value: object) -> None:
    DeploymentFile("127.0.0.1:1", os.getpid(), None, 3).write(tmp_path)
    path = tmp_path / "server" / "deployment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(DeploymentError, match="must be what flexlora server writes"):
        running_deployment(tmp_path)


def test_a_server_that_was_killed_is_not_taken_for_running(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    DeploymentFile("127.0.0.1:1", ended.pid, None, 3).write(tmp_path)
    with pytest.raises(DeploymentError, match="has ended without saying so"):
        running_deployment(tmp_path)
