"""Keeps what answers requests warm in a process of its own, and reaches it over a socket of this machine.

A base model takes seconds to import and load, and Flower starts a new process for each message. So a resident worker
holds model, data and state for as long as its client runs; whoever has a request hands it over as bytes. The socket is
a file in a folder that its owner alone may enter. Nothing else on this machine and nothing beyond it can connect.
"""

import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from flexlora.engines.flower.children import child_environment, module_command
from flexlora.engines.flower.superlink import private_log
from flexlora.errors import FlexLoraError

SOCKET_VARIABLE = "FLEXLORA_RESIDENT"
"""Environment variable that names the socket for ClientApps that Flower starts."""

MOST_BYTES = 1 << 36
"""The largest message that is taken; a longer one is a mistake."""

_SECONDS_TO_START = 120.0
_SECONDS_BETWEEN_LOOKS = 0.02
_SECONDS_TO_END = 2.0
_LAST_WORDS = 1500

_log = logging.getLogger(__name__)

Answer = Callable[[bytes], bytes]


class ResidentError(FlexLoraError, ConnectionError):
    """A resident worker that is not there, or ended while it was asked."""


def serve(path: Path, answer: Answer) -> None:
    """Answer requests at a socket until this process ends, one after the other.

    Args:
        path: Of the socket; its folder must be its owner's alone.
        answer: Request to reply; an error of it ends the connection and not the worker.
    """
    lock = threading.Lock()
    with Listener(str(path), family="AF_UNIX") as listener:
        while True:
            connection = listener.accept()
            threading.Thread(target=_serve_one, args=(connection, answer, lock), daemon=True).start()


def _serve_one(connection: Connection, answer: Answer, lock: threading.Lock) -> None:
    with connection:
        try:
            while True:
                request = connection.recv_bytes(MOST_BYTES)
                with lock:
                    reply = answer(request)
                connection.send_bytes(reply)
        except (EOFError, OSError):
            return  # The one who asked is gone, or asked for too much.
        except Exception as error:
            _log.error("A request could not be answered.", exc_info=error)


def ask(path: Path, request: bytes) -> bytes:
    """Return the reply of the worker at a socket.

    Raises:
        ResidentError: If it is not there, or ends before it has answered.
    """
    try:
        with Client(str(path), family="AF_UNIX") as connection:
            connection.send_bytes(request)
            return connection.recv_bytes(MOST_BYTES)
    except (EOFError, OSError) as error:
        raise ResidentError(
            f"the resident worker at {path} is gone ({error or 'it ended while it was asked'})"
        ) from error


class Resident:
    """A resident worker and the process that it runs in; started again when it dies, ended with this process."""

    def __init__(self, module: str, settings: bytes, log: Path) -> None:
        """Start the process.

        Args:
            module: Run by Python, with the socket and the number of this process as its arguments; it calls ``serve``.
            settings: What it reads from stdin.
            log: File that it writes its messages to.
        """
        self._module, self._settings, self._log_path = module, settings, log
        self._folder = Path(tempfile.mkdtemp(prefix="flexlora-"))  # For its owner alone, and with a short name.
        self.num_restarts = 0
        self._lock = threading.Lock()
        self._is_closed = False
        self._process = self._started()

    @property
    def socket(self) -> Path:
        """The socket that the worker answers at."""
        return self._folder / "socket"

    @property
    def process_id(self) -> int:
        """The number of the worker's process at present."""
        return self._process.pid

    def answer(self, request: bytes) -> bytes:
        """Return the worker's reply; a worker that dies meanwhile is started again and asked once more.

        Raises:
            ResidentError: If it dies twice, or does not start; with what it said last.
        """
        for is_last in (False, True):
            self._wait_until_ready()
            try:
                return ask(self.socket, request)
            except ResidentError:
                code = self._exit_code()
                if is_last or self._is_closed:
                    how = "does not answer" if code is None else f"ended twice (exit code {code})"
                    raise ResidentError(f"the process that trains {how}; it said: {self._last_words()}") from None
                if code is not None:
                    _log.warning("The process that trains ended (exit code %d) and is started again.", code)
        raise AssertionError

    def close(self) -> None:
        """End the process and remove the socket."""
        self._is_closed = True
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "Resident":
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _started(self) -> "subprocess.Popen[bytes]":
        with private_log(self._log_path) as log:
            process = subprocess.Popen(
                module_command(self._module, str(self.socket), str(os.getpid())),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=child_environment(),
                # Ctrl-C is for the process that started this one, which decides what happens.
                start_new_session=True,
            )
        assert process.stdin is not None
        try:
            with process.stdin:
                process.stdin.write(self._settings)
        except BrokenPipeError:  # It has ended already; who waits for it is told.
            pass
        return process

    def _wait_until_ready(self) -> None:
        with self._lock:
            if self._process.poll() is not None:
                self.num_restarts += 1
                self.socket.unlink(missing_ok=True)
                self._process = self._started()
            until = time.monotonic() + _SECONDS_TO_START
            while not _is_listening(self.socket):
                if self._process.poll() is not None or time.monotonic() > until:
                    raise ResidentError(f"the process that trains did not start; it said: {self._last_words()}")
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _exit_code(self) -> int | None:
        """Return what the process ended with; None if it is still there a moment after its connection was lost."""
        try:
            return self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return None

    def _last_words(self) -> str:
        text = self._log_path.read_text(errors="replace")[-_LAST_WORDS:].strip()
        return f"{text or 'nothing'} (more in {self._log_path})"


def _is_listening(path: Path) -> bool:
    """Return whether a worker takes connections: its socket is there a moment before it does."""
    try:
        with Client(str(path), family="AF_UNIX"):
            return True
    except OSError:
        return False


def resident_of_environment() -> Path | None:
    """Return the socket that a ClientApp started by Flower finds its worker at; None without one."""
    named = os.environ.get(SOCKET_VARIABLE)
    return Path(named) if named else None
