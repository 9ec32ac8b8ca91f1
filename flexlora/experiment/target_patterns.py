"""Checks that every pattern of a client type matches a module of the base model."""

import difflib
import re

from flexlora.experiment.base import BaseModelError
from flexlora.experiment.config import Config
from flexlora.training.targets import Targets


def check_patterns(config: Config, targets: Targets) -> None:
    """Refuse patterns in ``clients.types`` that decide nothing, as a spelling mistake would.

    A pattern of rank 0 may also match what cannot be adapted anyway.

    Raises:
        BaseModelError: Naming type and pattern, and modules whose paths are near it.
    """
    types = config.clients.types
    if config.clients.ranks_from == "devices" or isinstance(types, str):
        return
    for name, ranks in types.items():
        for pattern, rank in ranks.patterns.items():
            if any(re.search(pattern, path) for path in targets.shapes):
                continue
            rest = [path for path in targets.left_out if re.search(pattern, path)]
            if rest and not rank:
                continue
            if rest:
                why = f"it matches {len(rest)} that get no adapter, such as {rest[0]} ({targets.left_out[rest[0]]})"
            else:
                near = difflib.get_close_matches(pattern, targets.shapes, n=2, cutoff=0.3) or list(targets.shapes)[:2]
                why = f"it matches none of the {len(targets.shapes)}, such as {' and '.join(near)}"
            raise BaseModelError(
                f"clients.types.{name}.patterns must match target modules of the base model; got {pattern!r}: {why}"
            )
