"""What commands write to: results to stdout, progress and messages to stderr."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flexlora.console import plain_console
from flexlora.progress import can_move, stage

out = plain_console()
err = plain_console(stderr=True)


def hide_other_progress_bars() -> None:
    """Turn off the bars of transformers, which would break ours, and send its messages the way of ours."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # Its own handler writes names of tensors to stderr as they are.
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    # Messages of the hub's client reach ours as well, and would be printed twice.
    client = hub_logging.get_logger("huggingface_hub")
    for handler in list(client.handlers):
        client.removeHandler(handler)


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Show in a terminal that a configuration is being read, which is over at once on a free machine."""
    with stage(err, f"Reading {what}", hidden=not can_move(err)):
        yield


def print_json(value: Any) -> None:
    """Print a result to stdout for programs."""
    # Not through rich: it wraps long lines, and programs read this.
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
