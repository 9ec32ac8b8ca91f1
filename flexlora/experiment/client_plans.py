"""Gives every client the rank plan and the device that a configuration says, before any data are read."""

from collections.abc import Mapping, Sequence

from flexlora.experiment.config import Config
from flexlora.experiment.config_clients import RankConfig
from flexlora.federation.client_types import TypeRanks, assign_plans, deal_plans, fixed_plans, rank_plans
from flexlora.federation.clients import RankPlan
from flexlora.rounds.devices import DeviceProfile, assign_devices, device_profiles


def devices_of_each(client_ids: Sequence[str], config: Config) -> tuple[Mapping[str, DeviceProfile], dict[str, str]]:
    """Return the device profiles and client id -> name of its device; no profiles and empty names without devices."""
    devices = config.devices
    profiles = device_profiles(devices.profiles)
    if not profiles:
        return {}, dict.fromkeys(client_ids, "")
    device_of = assign_devices(
        client_ids,
        profiles,
        config.seed,
        distribution=devices.distribution,
        counts=devices.counts,
        assigned=devices.assigned,
    )
    return profiles, device_of


def config_plans(config: Config) -> dict[str, RankPlan]:
    """Return type name -> plan of the types that a configuration defines."""
    types = config.clients.types
    return rank_plans(types if isinstance(types, str) else {name: _type_ranks(own) for name, own in types.items()})


def plan_of_each(client_ids: Sequence[str], config: Config, device_of: Mapping[str, str]) -> dict[str, RankPlan]:
    """Return client id -> plan: those assigned, by name or by device, and the others by counts or distribution.

    Args:
        device_of: Client id -> name of its device, empty without devices.
    """
    plans, by_device = config_plans(config), config.devices.types
    fixed = {
        client_id: plans[by_device[device]] for client_id, device in device_of.items() if device in by_device
    } | fixed_plans(client_ids, plans, config.clients.assigned)
    others = [client_id for client_id in client_ids if client_id not in fixed]
    if config.clients.counts:
        return fixed | deal_plans(others, plans, config.clients.counts, config.seed)
    return fixed | assign_plans(others, plans, config.clients.distribution, config.seed)


def group_of_each(client_ids: Sequence[str], config: Config) -> dict[str, str]:
    """Return client id -> the name of its client type, or of its device where ranks are chosen from devices."""
    _, device_of = devices_of_each(client_ids, config)
    if config.clients.ranks_from == "devices":
        return device_of
    return {client_id: plan.name for client_id, plan in plan_of_each(client_ids, config, device_of).items()}


def _type_ranks(ranks: RankConfig) -> TypeRanks:
    return {"attention": ranks.attention, "ffn": ranks.ffn, "patterns": ranks.patterns}
