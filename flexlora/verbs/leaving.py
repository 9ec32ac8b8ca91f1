"""How a command ends: its exit codes and what it says about each."""

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flexlora.errors import FlexLoraError
from flexlora.text import printable
from flexlora.verbs.terminal import err

EXIT_ERROR, EXIT_WRONG_INPUT, EXIT_NO_PROGRESS, EXIT_MACHINE, EXIT_INTERRUPTED = 1, 2, 3, 4, 130


class Interrupted(Exception):
    """The user interrupted the command; the message says what that means."""


@contextmanager
def interruptible(consequence: str) -> Iterator[None]:
    """Say ``consequence`` if the user interrupts the ``with`` block."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(consequence) from None


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C in the ``with`` block: containers and service managers end a process by it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def guarded(command: Callable[[], None]) -> int:
    """Call ``command`` and return its exit code, having said on stderr what went wrong."""
    try:
        command()
    except FlexLoraError as error:
        err.print("[bold red]Error:[/]", end=" ")
        # What a server or a file of others says is in some messages.
        err.print(printable(str(error), keep_lines=True), markup=False, highlight=False, soft_wrap=True)
        return EXIT_WRONG_INPUT
    except Interrupted as interruption:
        err.print(f"Interrupted; {interruption}.")
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        err.print("Interrupted.")
        return EXIT_INTERRUPTED
    except SystemExit as leaving:
        if leaving.code == EXIT_INTERRUPTED:
            err.print("Interrupted.")  # Caught by typer, which says nothing.
        return leaving.code if isinstance(leaving.code, int) else EXIT_ERROR
    except (OSError, MemoryError) as error:
        err.print("[bold red]System error:[/]", end=" ")
        err.print(f"{error or type(error).__name__}", markup=False, highlight=False)
        return EXIT_MACHINE
    except Exception as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error):
            err.print("[bold red]Out of memory.[/] Lower training.batch_size, evaluation.batch_size or ranks.")
            return EXIT_MACHINE
        if type(error).__name__ == "OutOfMemoryError":
            err.print("[bold red]Out of device memory.[/] Lower training.batch_size, evaluation.batch_size or ranks.")
            return EXIT_MACHINE
        err.print(traceback.format_exc(), markup=False, highlight=False)
        err.print("[bold red]This should not have happened.[/] Please report it with the lines above.")
        return EXIT_ERROR
    return 0
