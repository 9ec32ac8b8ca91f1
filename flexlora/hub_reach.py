"""Finds out in bounded time whether the Hugging Face hub can be asked; without it, only its local cache is looked into.

The hub's own client tries for about a minute before it says that there is no network.
"""

import os
from threading import Thread

from huggingface_hub import constants
from huggingface_hub.utils import get_session

LONGEST_SECONDS = 8.0
"""Time within which the hub has to answer; a slow network needs a second or two."""

_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def offline_switch() -> str | None:
    """Return the environment variable that forbids asking the hub, None if there is none."""
    return next((name for name in _SWITCHES if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


def hub_address() -> str:
    """Return where the hub is: ``HF_ENDPOINT``, or its public address."""
    return constants.ENDPOINT


def hub_is_reached(seconds: float = LONGEST_SECONDS) -> bool:
    """Return whether the hub may be asked and answers within so many seconds, whatever it answers."""
    if offline_switch() or constants.is_offline_mode():
        return False
    answers: list[bool] = []
    # In a thread: looking up a name cannot be given a time limit.
    asking = Thread(target=_ask, args=(hub_address(), seconds, answers), daemon=True)
    asking.start()
    asking.join(seconds)
    return bool(answers)


def why_not_reached() -> str:
    """Return in words why the hub was not asked or did not answer."""
    switch = offline_switch()
    if switch is not None:
        return f"the hub was not asked, because {switch} is set"
    return f"the hub ({hub_address()}) was not reached: check the network, or HF_ENDPOINT where it is a mirror"


def _ask(address: str, seconds: float, answers: list[bool]) -> None:
    try:
        get_session().head(address, timeout=seconds)
    except Exception:  # The errors of the client depend on its version.
        return
    answers.append(True)
