"""Keys that are registered while a server runs."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import httpx
from flwr.supercore.retry import make_simple_http_retry_invoker

from flexlora.engines.flower.certificates import CertificateError, Certificates, make_certificates
from flexlora.engines.flower.open_run import _keep_registering, register_keys, without_interrupts


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


def test_a_request_that_is_unauthorized_fails_and_does_not_interrupt_the_process() -> None:
    """Flower's own rule sends SIGINT here, which would end these tests."""
    invoker, calls = make_simple_http_retry_invoker(), []
    without_interrupts(invoker)

    def refused() -> None:
        calls.append(1)
        request = httpx.Request("POST", "http://127.0.0.1:1/heartbeat")
        httpx.Response(401, request=request).raise_for_status()

    with pytest.raises(httpx.HTTPStatusError, match="401"):
        invoker.invoke(refused)
    assert len(calls) == 1
