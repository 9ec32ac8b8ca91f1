"""Starts a SuperLink, Flower's server process, keeps it running, and says where it is."""

import dataclasses
import errno
import ipaddress
import json
import logging
import os
import secrets
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import IO

from flexlora.engines.flower.certificates import Certificates
from flexlora.engines.flower.children import child_environment, module_command
from flexlora.engines.flower.superlink_process import LinkSettings
from flexlora.errors import FlexLoraError

LOOPBACK = "127.0.0.1"
"""Where a server listens unless it is told otherwise: only this machine reaches it."""

DEFAULT_PORT = 9440

DATABASE = "superlink.db"
LOG = "superlink.log"

_SECONDS_TO_START = 90.0
_SECONDS_BETWEEN_LOOKS = 0.05
_MOST_RESTARTS = 5
# One that served for so long did not fail to start.
_SECONDS_OF_A_GOOD_START = 60.0
_LAST_WORDS = 1500

_log = logging.getLogger(__name__)


class LinkError(FlexLoraError, OSError):
    """A server process that could not be started, or whose place is taken."""


class SuperLink:
    """A SuperLink in a process of its own, which is started again if it dies and ends with this process.

    Its socket belongs to this process: clients that connect while it is started again wait a moment.
    """

    def __init__(self, host: str, port: int, certificates: Certificates | None) -> None:
        """Take the port; clients that connect wait until the process is started.

        Args:
            host: Address to listen on.
            port: Port to listen on; 0 takes a free one.
            certificates: None serves without TLS and lets every client in.

        Raises:
            LinkError: If nothing can listen there.
        """
        self.host, self.certificates = host, certificates
        self._socket = _listening(host, port)
        self.port: int = self._socket.getsockname()[1]
        self.control_secret = secrets.token_hex(32)
        self._closing = threading.Event()
        self._num_restarts, self._has_ended = 0, False
        self._process: subprocess.Popen[bytes] | None = None
        self._watch = threading.Thread(target=self._keep_running, daemon=True)

    def start(self, folder: Path) -> None:
        """Start the process.

        Args:
            folder: Where its database and its log go; state of an earlier server there is removed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._remove_state(folder)
        self._database, self._log_path = folder / DATABASE, folder / LOG
        _create_private(self._database)
        self._process = self._started()
        self._watch.start()

    @property
    def address(self) -> str:
        """Where this process reaches it, as HOST:PORT."""
        return join_address(self.local_host, self.port)

    @property
    def listens_at(self) -> str:
        """Where it listens, as HOST:PORT."""
        return join_address(self.host, self.port)

    @property
    def local_host(self) -> str:
        """The name that this process calls it by: loopback where it listens on all addresses."""
        return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)

    @property
    def authority(self) -> bytes | None:
        """The certificate that clients trust; None without TLS."""
        return None if self.certificates is None else self.certificates.authority.read_bytes()

    @property
    def process_id(self) -> int:
        """The number of the process that serves at present; 0 before it is started."""
        return 0 if self._process is None else self._process.pid

    @property
    def num_restarts(self) -> int:
        """How often the process has been started again."""
        return self._num_restarts

    @property
    def has_ended(self) -> bool:
        """Whether it has ended so often in a row that it is not started again."""
        return self._has_ended

    def wait_until_ready(self) -> None:
        """Return once it answers.

        Raises:
            LinkError: If it ends or takes too long; with what it said last.
        """
        until = time.monotonic() + _SECONDS_TO_START
        scheme = "http" if self.certificates is None else "https"
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self._tls())
        )
        while time.monotonic() < until:
            try:
                with opener.open(f"{scheme}://{self.address}/health", timeout=2):
                    return
            except OSError:
                if self._has_ended:
                    break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        raise LinkError(f"the SuperLink did not start; it said: {self.last_words()}")

    def close(self) -> None:
        """End the process and free the port; its state is removed, its log stays."""
        self._closing.set()
        if self._process is not None:
            # First of all: it may be starting another process at this moment.
            self._watch.join()
            process = self._process
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._remove_state(self._database.parent)
        self._socket.close()

    @staticmethod
    def _remove_state(folder: Path) -> None:
        for left in folder.glob(f"{DATABASE}*"):
            left.unlink(missing_ok=True)

    def __enter__(self) -> "SuperLink":
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _tls(self) -> ssl.SSLContext:
        cafile = None if self.certificates is None else str(self.certificates.authority)
        context = ssl.create_default_context(cafile=cafile)
        # Only this process's own server is asked, and perhaps under an address that its certificate does not name.
        context.check_hostname = False
        return context

    def _started(self) -> "subprocess.Popen[bytes]":
        files = self.certificates
        settings = LinkSettings(
            database=str(self._database),
            control_secret=self.control_secret,
            authority=None if files is None else str(files.authority),
            certificate=None if files is None else str(files.server),
            key=None if files is None else str(files.server_key),
            is_open=self._num_restarts > 0,
        )
        descriptor = self._socket.fileno()
        module = "flexlora.engines.flower.superlink_process"
        with private_log(self._log_path) as log:
            process = subprocess.Popen(
                module_command(module, str(descriptor), str(os.getpid())),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=child_environment(),
                pass_fds=[descriptor],
                # Ctrl-C is for the process that started this one, which decides what happens.
                start_new_session=True,
            )
        assert process.stdin is not None
        try:
            with process.stdin:
                process.stdin.write(json.dumps(dataclasses.asdict(settings)).encode() + b"\n")
        except BrokenPipeError:  # It has ended already; who waits for it is told.
            pass
        return process

    def _keep_running(self) -> None:
        num_in_a_row, began = 0, time.monotonic()
        while not self._closing.is_set():
            process = self._process
            assert process is not None
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
            if self._closing.is_set():
                return
            num_in_a_row = 1 if time.monotonic() - began > _SECONDS_OF_A_GOOD_START else num_in_a_row + 1
            if num_in_a_row > _MOST_RESTARTS:
                self._has_ended = True
                return
            _log.warning("The SuperLink ended (exit code %s) and is started again.", process.returncode)
            self._num_restarts, began = self._num_restarts + 1, time.monotonic()
            self._process = self._started()

    def last_words(self) -> str:
        """Return the end of its log, and where the rest is."""
        text = self._log_path.read_text(errors="replace")[-_LAST_WORDS:].strip()
        return f"{text or 'nothing'} (more in {self._log_path})"


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address or name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def private_log(path: Path) -> IO[bytes]:
    """Open a log for appending, readable for its owner alone: names of others are in it."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def _create_private(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, which no other process can take."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise LinkError(f"--host must be an address of this machine; {host}: {error.strerror}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise LinkError(
                f"port {port} of {host} is taken by another process; choose another --port, or end that process"
            ) from error
        raise LinkError(
            f"nothing can listen at {join_address(host, port)}: {error.strerror}; choose another --host"
        ) from error
    bound.set_inheritable(True)
    return bound
