"""Runs a child process: trains chunks for the process that started it, and ends when that process does.

Started as ``python -m flexlora.engines.process_child SOCKET MEMORY PARENT``: two inherited file descriptors, and the
number of the process that started it. It receives one ``Start`` and then one ``TrainTask`` or ``AskTask`` after the
other, over a socket that only the process that started it has. It answers ``READY`` to the start; it answers a task
with ``READY`` when it begins, then with the outcome or the reply of each client.
"""

import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue

from flexlora.foreign_logs import quiet_libraries
from flexlora.orphans import end_with_parent

READY = b"ready"


def main() -> None:
    """Train what comes over the socket until it is closed."""
    end_with_parent(int(sys.argv[3]))
    quiet_libraries()
    # Only now: importing torch takes longer than this process may outlive the other one.
    from flexlora.engines.chunk_trainer import AskTask, ChunkTrainer

    # Ctrl-C reaches both processes; the one that started this one decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection, inbox = Connection(int(sys.argv[1])), SimpleQueue[bytes]()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    trainer = ChunkTrainer(int(sys.argv[2]), pickle.loads(inbox.get()))
    connection.send_bytes(READY)
    while True:
        task = pickle.loads(inbox.get())
        outcomes = trainer.answers(task) if isinstance(task, AskTask) else trainer.begin(task)
        connection.send_bytes(READY)
        for outcome in outcomes:
            connection.send_bytes(outcome)


def _listen(connection: Connection, inbox: "SimpleQueue[bytes]") -> None:
    """Receive messages as they come, and end this process once no more can come."""
    try:
        while True:
            inbox.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    main()
