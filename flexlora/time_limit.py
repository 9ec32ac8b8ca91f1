"""Ends code of others that runs for too long, such as a chat template that loops.

One thread watches all limits and raises in the thread whose time is up. Only Python code can be ended this way: it is
for templates, which are compiled to Python, and not for a single long step of a library.
"""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LOOKS = 0.2


class TimeIsUp(Exception):
    """Code ran longer than it may."""


class _Watch:
    """The deadlines of all threads that have one, and the thread that watches them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def add(self, thread_id: int, deadline: float) -> None:
        """Watch a thread from now on."""
        with self.lock:
            self.deadlines[thread_id] = deadline
            # A process that was forked has lost the thread.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def remove(self, thread_id: int) -> None:
        """Watch a thread no longer, and take back what was raised in it too late."""
        with self.lock:
            if self.deadlines.pop(thread_id, None) is None:
                _raise_in(thread_id, None)

    def _run(self) -> None:
        while True:
            with self.lock:
                if not self.deadlines:
                    self._thread = None
                    return
                for thread_id, deadline in list(self.deadlines.items()):
                    if time.monotonic() > deadline:
                        del self.deadlines[thread_id]
                        _raise_in(thread_id, TimeIsUp)
            time.sleep(SECONDS_BETWEEN_LOOKS)


_watch = _Watch()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise ``TimeIsUp`` in a ``with`` block, which must hold no other one, once it has run this long.

    Raises:
        TimeIsUp: In the block.
    """
    thread_id = threading.get_ident()
    _watch.add(thread_id, time.monotonic() + seconds)
    try:
        yield
    finally:
        _watch.remove(thread_id)


def _raise_in(thread_id: int, error: type[Exception] | None) -> None:
    """Make a thread raise an error at its next step; None takes back one that it has not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread_id), ctypes.py_object(error) if error is not None else None
    )
