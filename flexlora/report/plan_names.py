"""Names rank plans for people: by their devices, not ``type1`` to ``type4``."""

from collections import defaultdict
from collections.abc import Sequence

from flexlora.rounds.records import RoundRecord

DEVICES_OF_TYPES = {"type1": "phone", "type2": "laptop", "type3": "workstation", "type4": "server"}
"""The four types of the paper, smallest ranks first -> the built-in devices that stand for them."""


def plan_names(plans: Sequence[str], records: Sequence[RoundRecord]) -> dict[str, str]:
    """Return plan -> what a page calls it; all different.

    Where devices were simulated, a plan has the names of those that had it. Otherwise the four types are called after
    the built-in devices, and types of the user's own keep their names.

    Args:
        plans: Of the run, in order.
        records: Of its rounds.
    """
    devices: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        for client in record.clients:
            if client.device:
                devices[client.plan].add(client.device)
    if any(devices.values()):
        names = {plan: ", ".join(sorted(devices[plan])) or plan for plan in plans}
    elif set(plans) <= DEVICES_OF_TYPES.keys():
        names = {plan: DEVICES_OF_TYPES[plan] for plan in plans}
    else:
        names = {plan: plan for plan in plans}
    shown = list(names.values())
    return {plan: name if shown.count(name) == 1 else f"{name} ({plan})" for plan, name in names.items()}
