"""How long does a command say nothing to somebody who watches a terminal?

    python benchmarks/silence.py                                   # flexlora run demo, into a folder that is removed
    python benchmarks/silence.py plan demo                         # any other verb

The command runs in a pseudo terminal of 100 columns. A silence is the time between two pieces of output, the start of
the process and its end included; a bar or a clock that moves is output. The longest ones are listed with what stood
on the last line meanwhile.
"""

import os
import pty
import re
import select
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

BOUND = 2.0
"""Seconds after which somebody wonders whether anything is happening."""

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


@dataclass(frozen=True)
class Silence:
    """Seconds without output, when they began, and the last line before them."""

    seconds: float
    begin: float
    line: str


def silences_of(command: list[str]) -> tuple[list[Silence], int]:
    """Return every silence of a command in a terminal, and its exit code."""
    begin = time.monotonic()
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"COLUMNS": "100", "LINES": "40", "TERM": "xterm-256color"}
        os.execvp(command[0], command)
    silences, last, line = [], begin, "(start)"
    while True:
        select.select([terminal], [], [])
        try:
            piece = os.read(terminal, 65536)
        except OSError:
            # How Linux says that the other side has closed.
            piece = b""
        now = time.monotonic()
        silences.append(Silence(now - last, last - begin, line))
        if not piece:
            break
        last = now
        lines = _CONTROL.sub("", piece.decode("utf-8", "replace")).replace("\r", "\n").split("\n")
        line = next((text.strip() for text in reversed(lines) if text.strip()), line)
    os.close(terminal)
    return silences, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = sys.argv[1:] or ["run", "demo", "--out", str(Path(folder) / "run")]
        command = [shutil.which("flexlora", path=str(Path(sys.executable).parent)) or "flexlora", *arguments]
        silences, code = silences_of(command)
    whole = silences[-1].begin + silences[-1].seconds
    above = [silence for silence in silences if silence.seconds > BOUND]
    print(f"flexlora {' '.join(arguments)}: {whole:.1f} s, exit code {code}")
    print(f"{len(above)} silences above {BOUND:g} s; the longest ones:")
    for silence in sorted(silences, key=lambda silence: -silence.seconds)[:8]:
        print(f"{silence.seconds:6.2f} s from {silence.begin:7.1f} s on, after: {silence.line[:90]}")


if __name__ == "__main__":
    main()
