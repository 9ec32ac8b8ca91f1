"""Keys that are registered while a server runs."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from flexlora.engines.flower.certificates import CertificateError, Certificates, make_certificates
from flexlora.engines.flower.open_run import _keep_registering, register_keys


class Control:
    """Remembers whose keys were registered, and ends the watch after some looks."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def RegisterNode(self, request: Any) -> None:
        self.names.append(request.name)


class Looks(threading.Event):
    """An event that is set after five waits, which take no time."""

    num_waits = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.num_waits += 1
        return self.num_waits > 5


def test_a_file_that_is_no_key_keeps_no_other_client_out_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_certificates(tmp_path, [], ["north", "south"])
    (tmp_path / "clients" / "odd.pub").write_text("no key")
    control, known = Control(), set[str]()
    with pytest.raises(CertificateError, match=r"odd\.pub must be a public key"):
        register_keys(control, Certificates(tmp_path), known)  # type: ignore[arg-type]
    assert control.names == ["north", "south"]
    with caplog.at_level(logging.WARNING):
        _keep_registering(control, Certificates(tmp_path), known, Looks())  # type: ignore[arg-type]
    assert caplog.text.count("odd.pub must be a public key") == 1
    assert control.names == ["north", "south"]
