"""Names what clients can do in further phases of a round, so that a request can ask for it."""

from collections.abc import Callable, Mapping

from flexlora.uplink.phases import ClientPhases
from flexlora.uplink.secure_sum import SecureSum

PHASES: Mapping[str, Callable[[], ClientPhases]] = {"secure_sum": SecureSum}
"""Name on the wire -> what makes the phases."""


def phases_name(phases: ClientPhases) -> str | None:
    """Return the name of phases, None if clients of this version do not know them."""
    return next((name for name, make in PHASES.items() if phases == make()), None)
