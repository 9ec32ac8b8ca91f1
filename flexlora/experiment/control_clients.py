"""Chooses who takes part in a control, and at which ranks: everybody at one rank, or those with the largest alone."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from flexlora.experiment.gathered import GatheredRun
from flexlora.experiment.scoring import sampled_clients
from flexlora.federation.clients import ClientSpec, RankPlan, smallest_ranks


def at_smallest_ranks(loaded: GatheredRun, plans: Sequence[RankPlan] = ()) -> list[ClientSpec]:
    """Return the same clients, each at the ranks that all of them can afford: the bucket effect.

    Args:
        loaded: The clients.
        plans: Those that count, here and below; empty for those that the clients have.
    """
    ranks = smallest_ranks(plans or list(loaded.participants.plans.values()), loaded.shapes)
    plan = RankPlan("smallest", tuple((f"^{re.escape(module)}$", rank) for module, rank in ranks.items()))
    return at_ranks_of(plan, loaded.participants.clients)


def at_largest_ranks(loaded: GatheredRun, plans: Sequence[RankPlan] = ()) -> list[ClientSpec]:
    """Return the same clients, each with the largest plan: what it would be if all could afford it."""
    return at_ranks_of(largest_plan(loaded, plans), loaded.participants.clients)


def at_ranks_of(plan: RankPlan, clients: Iterable[ClientSpec]) -> list[ClientSpec]:
    """Return the same clients, all with one rank plan."""
    return [dataclasses.replace(client, plan=plan) for client in clients]


def only_largest(loaded: GatheredRun) -> list[ClientSpec]:
    """Return the clients that have the largest ranks, without the others."""
    largest = largest_plan(loaded).resolve(loaded.shapes)
    names = {name for name, plan in loaded.participants.plans.items() if plan.resolve(loaded.shapes) == largest}
    return [client for client in loaded.participants.clients if client.plan.name in names]


def clients_alone(loaded: GatheredRun) -> list[ClientSpec]:
    """Return the sampled clients that also train alone, by plan and id: one of each plan in turn.

    So no plan is left out before another has a second client.
    """
    number = loaded.config.evaluation.local_only_clients
    sampled = sampled_clients(loaded, number, "local-only").values()
    in_turn = [client for turn in zip_longest(*sampled) for client in turn if client is not None]
    return sorted(in_turn[:number], key=lambda client: (client.plan.name, client.client_id))


def largest_plan(loaded: GatheredRun, plans: Sequence[RankPlan] = ()) -> RankPlan:
    """Return the rank plan with the most parameters."""
    named = sorted(plans or loaded.participants.plans.values(), key=lambda plan: plan.name)
    return max(named, key=lambda plan: sum(r * sum(loaded.shapes[m]) for m, r in plan.resolve(loaded.shapes).items()))
