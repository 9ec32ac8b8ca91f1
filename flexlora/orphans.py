"""Ends a worker process soon after the process that started it, whatever that one died of.

Watching must begin before the imports of a worker, which take longer than a worker may outlive its parent. So this file
imports nothing, and what a worker is to do reaches it as bytes that are read afterwards.
"""

import os
import pickle
import threading
import time
from collections.abc import Callable

SECONDS_BETWEEN_LOOKS = 0.25


def end_with_parent(parent: int) -> None:
    """End this process once it is no longer a child of ``parent``, the number of a process."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def packed_call(function: Callable[..., None], *arguments: object) -> bytes:
    """Return a call for ``call_watched``, which can be sent to another process of this package."""
    return pickle.dumps((function, arguments))


def call_watched(parent: int, call: bytes) -> None:
    """Make a packed call in a process that ends with ``parent``."""
    end_with_parent(parent)
    function, arguments = pickle.loads(call)
    function(*arguments)


def _watch(parent: int) -> None:
    # On Windows, a process keeps the number of its parent.
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)
