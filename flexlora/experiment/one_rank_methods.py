"""Refuses clients of several ranks under a method that needs one, before data are read and again when all are known."""

from collections.abc import Mapping

from flexlora.experiment.client_plans import config_plans
from flexlora.experiment.config import Config, ConfigError
from flexlora.federation.client_types import type_weights
from flexlora.federation.clients import RankPlan


def refuse_expected_ranks(config: Config) -> None:
    """Raise if the client types of a configuration cannot all have the one rank that its method needs.

    Raises:
        ConfigError: Two types that clients will have are of different ranks.
    """
    if config.clients.ranks_from != "devices":
        plans = config_plans(config)
        _require_one(config, {name: plans[name] for name in _expected_types(config, plans)})


def refuse_ranks(config: Config, used: Mapping[str, RankPlan]) -> None:
    """Raise if the method needs one rank and the clients have several.

    Args:
        config: The run.
        used: Plans that at least one client has, by name.

    Raises:
        ConfigError: Two of them are of different ranks.
    """
    _require_one(config, used)


def _expected_types(config: Config, plans: Mapping[str, RankPlan]) -> list[str]:
    """Return the types with clients whatever is drawn: those that are counted out, or else the only ones there are."""
    clients, devices = config.clients, config.devices
    if clients.assigned or devices.types:
        # Who is assigned may be everybody or nobody that takes part.
        return []
    weights = clients.counts or type_weights(plans, clients.distribution)
    return [name for name in plans if weights.get(name, 0) > 0]


def _require_one(config: Config, plans: Mapping[str, RankPlan]) -> None:
    if not config.method.traits().needs_one_rank or len({frozenset(plan.patterns) for plan in plans.values()}) <= 1:
        return
    one_type = f"clients.distribution='{{{min(plans)}: 1}}' without clients.counts and clients.assigned"
    one_rank = "devices.rank_choices=[1]" if config.clients.ranks_from == "devices" else one_type
    raise ConfigError(
        [
            f"method.name={config.method.name} needs one rank for all clients, but they have the types "
            f"{', '.join(sorted(plans))}; give all of them one, for example {one_rank}"
        ],
        "the configuration",
    )
