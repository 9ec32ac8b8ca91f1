"""Names the function and the line of a user's own method that fails in the middle of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from flexlora.errors import FlexLoraError

BLAMED_ON_METHOD = ("flexlora.aggregators.", "flexlora.lora.", "flexlora.federation.messages")
"""Modules of the package that fail when a method calls them wrongly; an error in others is not the method's."""


class MethodFailure(FlexLoraError):
    """A function of a method from outside the package raised an error of its own."""


@contextmanager
def naming_failures(method: object, name: str) -> Iterator[None]:
    """Turn an error that the code of a user's own method raises in a ``with`` block into a ``MethodFailure``.

    Errors of the package's own methods, of clients whose updates a method was reading, and of a machine that runs out
    of memory or disk pass as they are.

    Args:
        method: The object whose functions are called in the block.
        name: What messages call it.

    Raises:
        MethodFailure: With the function, the file and the line.
    """
    try:
        yield
    except (FlexLoraError, OSError, MemoryError):
        raise
    except Exception as error:
        own = not type(method).__module__.startswith("flexlora.") and type(error).__name__ != "OutOfMemoryError"
        place = _place(error.__traceback__, method) if own else None
        if place is None:
            raise
        raise MethodFailure(
            f"the method {name} failed in {place}: {type(error).__name__}: {error}. The run keeps its last checkpoint; "
            "mend the method and go on with --resume (resume=True)"
        ) from error


def _place(trace: TracebackType | None, method: object) -> str | None:
    """Return function, file and line of a method in a traceback; None if the error arose elsewhere.

    Of functions that call each other, the first one and the last line of the method's module are told.
    """
    function, place = None, None
    while trace is not None:
        frame = trace.tb_frame
        module, code = str(frame.f_globals.get("__name__")), frame.f_code
        arguments = code.co_varnames[: code.co_argcount]
        if arguments[:1] == ("self",) and frame.f_locals.get("self") is method:
            function = function or code.co_name
        if function is not None and module == type(method).__module__:
            place = f"{function}, {code.co_filename}, line {trace.tb_lineno}"
        elif function is not None and module.startswith("flexlora.") and not module.startswith(BLAMED_ON_METHOD):
            return None
        trace = trace.tb_next
    return place
