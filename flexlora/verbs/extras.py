"""Says which extra a verb needs before anything that needs it is imported."""

import importlib.util

from flexlora.errors import FlexLoraError


def need_flower() -> None:
    """Refuse to go on without Flower.

    Raises:
        FlexLoraError: If it is not installed.
    """
    missing = [name for name in ("flwr", "cryptography") if importlib.util.find_spec(name) is None]
    if missing:
        raise FlexLoraError(
            f"server and client need Flower; {missing[0]} is not installed: pip install 'flexlora[flower]'"
        )
