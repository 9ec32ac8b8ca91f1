"""Keeps Flower's processes from calling home, looking for updates and installing packages."""

import os
from collections.abc import MutableMapping

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Progress bars and colours of others end in log files.
    "NO_COLOR": "1",
}


def make_quiet(environment: MutableMapping[str, str] | None = None) -> None:
    """Turn telemetry, update checks and dependency installation off, whatever was set before.

    Args:
        environment: Of the process that will run Flower's code; None takes that of this process. It must happen before
            anything of Flower is imported.
    """
    (os.environ if environment is None else environment).update(QUIET)
