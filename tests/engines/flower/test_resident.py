"""A worker at a socket: replies, errors, and what happens when it is not there."""

import socket
import threading
import time
from multiprocessing.connection import Client
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from flexlora.engines.flower import resident
from flexlora.engines.flower.resident import (
    SOCKET_VARIABLE,
    Resident,
    ResidentError,
    _is_listening,
    ask,
    resident_of_environment,
    serve,
)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A worker that answers a request with its letters in reverse, and fails at an empty one."""
    path = tmp_path_factory.mktemp("w") / "socket"

    def answer(request: bytes) -> bytes:
        if not request:
            raise ValueError("nothing was asked")
        return request[::-1]

    threading.Thread(target=serve, args=(path, answer), daemon=True).start()
    until = time.monotonic() + 10
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return path


def test_bytes_go_there_and_back(worker: Path) -> None:
    assert ask(worker, b"abc") == b"cba"
    large = bytes(range(256)) * 20_000
    assert ask(worker, large) == large[::-1]


def test_an_error_of_the_worker_ends_the_request_and_not_the_worker(worker: Path) -> None:
    with pytest.raises(ResidentError, match="is gone"):
        ask(worker, b"")
    assert ask(worker, b"again") == b"niaga"


def test_who_asks_and_leaves_does_no_harm(worker: Path) -> None:
    with Client(str(worker), family="AF_UNIX") as connection:
        connection.send_bytes(b"x" * 1_000_000)
    assert ask(worker, b"next") == b"txen"


def test_a_worker_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ResidentError, match="is gone"):
        ask(tmp_path / "none", b"x")


def test_a_client_app_finds_its_worker_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SOCKET_VARIABLE, raising=False)
    assert resident_of_environment() is None
    monkeypatch.setenv(SOCKET_VARIABLE, "/run/socket")
    assert resident_of_environment() == Path("/run/socket")


def test_a_socket_that_nobody_listens_at_is_not_ready(tmp_path: Path) -> None:
    """It is there from when it is bound, a moment before it takes connections."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        assert path.exists() and not _is_listening(path)
        bound.listen()
        assert _is_listening(path)


def test_a_worker_that_is_alive_and_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It closes each connection at once, as one does whose reply could not be made."""
    module = tmp_path / "closes_at_once.py"
    module.write_text(
        "import sys\nfrom multiprocessing.connection import Listener\n"
        "with Listener(sys.argv[1], family='AF_UNIX') as listener:\n    while True: listener.accept().close()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(resident, "_SECONDS_TO_END", 0.05)
    with Resident("closes_at_once", b"", tmp_path / "log") as worker, pytest.raises(ResidentError, match="not answer"):
        worker.answer(b"x")
