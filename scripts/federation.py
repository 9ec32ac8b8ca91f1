"""Runs a server and three clients of ranks 1, 4 and 16 on this machine, each a process of its own; ends them all.

    python scripts/federation.py    # or: make federation

What it shows is what the server and the clients show; nothing is left running.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

RANKS = {"small": 1, "medium": 4, "large": 16}
COMMAND = [sys.executable, "-m", "flexlora.cli"]
SECONDS_TO_LEAVE = 20


@contextmanager
def started(name: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Start a command whose lines are shown under a name, and end it after the ``with`` block if it has not ended."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    threading.Thread(target=_show, args=(name, process), daemon=True).start()
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def _show(name: str, process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(f"{name:>7} | {line}")
        sys.stdout.flush()


def main() -> int:
    """Return the exit code of the first command that failed, 0 if none did."""
    with started("server", "server", "--demo", "--port", "0", "--min-clients", str(len(RANKS))) as server:
        clients = [
            started(name, "client", "--demo", "--name", name, "--rank", str(rank)) for name, rank in RANKS.items()
        ]
        with clients[0] as first, clients[1] as second, clients[2] as third:
            code = server.wait()
            for process in (first, second, third):
                try:
                    code = code or process.wait(SECONDS_TO_LEAVE)
                except subprocess.TimeoutExpired:
                    code = code or 1
    return code


if __name__ == "__main__":
    # Whoever ends this script ends what it has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
