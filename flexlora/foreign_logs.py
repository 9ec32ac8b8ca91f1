"""Keeps what other libraries log about themselves out of a program's output."""

import logging


def quiet_libraries(*, verbose: bool = False) -> None:
    """Show what other libraries log only where it is an error, or where a user wants all of it.

    PEFT imports bitsandbytes, which warns that a faster kernel is missing even where nothing is quantised.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.INFO if verbose else logging.ERROR)
