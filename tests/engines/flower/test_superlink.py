"""A SuperLink whose process ends: when it is started again, and when no more."""

import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from flexlora.engines.flower import superlink
from flexlora.engines.flower.superlink import LinkError, SuperLink


class Ending(SuperLink):
    """One whose process ends at once."""

    def _started(self) -> "subprocess.Popen[bytes]":
        self._log_path.write_text("the disk is full")
        return subprocess.Popen(["true"])


def test_one_that_does_not_start_is_given_up_with_what_it_said(tmp_path: Path) -> None:
    with Ending("127.0.0.1", 0, None) as link:
        link.start(tmp_path)
        with pytest.raises(LinkError, match="did not start; it said: the disk is full"):
            link.wait_until_ready()
        assert link.has_ended and link.num_restarts == superlink._MOST_RESTARTS


def test_one_that_served_for_long_is_always_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "_SECONDS_OF_A_GOOD_START", 0.0)
    with Ending("127.0.0.1", 0, None) as link:
        link.start(tmp_path)
        until = time.monotonic() + 30
        while link.num_restarts < superlink._MOST_RESTARTS + 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert link.num_restarts >= superlink._MOST_RESTARTS + 3 and not link.has_ended
