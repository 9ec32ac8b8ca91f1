"""What commands write to: results to stdout, progress and messages to stderr."""

import json
import sys
from typing import Any

from rich.console import Console

# A client may be called task:100:a, and :100: is no emoji here.
out = Console(emoji=False)
err = Console(emoji=False, stderr=True)


def hide_other_progress_bars() -> None:
    """Turn off the bars of transformers, which would break ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def print_json(value: Any) -> None:
    """Print a result to stdout for programs."""
    # Not through rich: it wraps long lines, and programs read this.
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
