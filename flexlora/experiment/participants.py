"""Gathers who takes part in a run, with which data, ranks and devices."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from flexlora.aggregators.settings import Traits
from flexlora.data.examples import Example, FederatedCorpus
from flexlora.data.owned_examples import OwnedRow
from flexlora.data.partition import fixed_validation
from flexlora.experiment.client_plans import devices_of_each, plan_of_each
from flexlora.experiment.config import Config
from flexlora.experiment.corpora import corpus_of
from flexlora.experiment.device_ranks import Affordable, affordable_plans, left_out_clients, never_there
from flexlora.experiment.one_rank_methods import refuse_expected_ranks, refuse_ranks
from flexlora.experiment.workload import Workload, workload_of
from flexlora.federation.clients import ClientError, ClientSpec, RankPlan, count_plans
from flexlora.federation.streams import stream
from flexlora.rounds.clock import Clock, Policy
from flexlora.rounds.costs import ClientCost, matrix_rate
from flexlora.rounds.devices import DeviceProfile


@dataclass(frozen=True)
class Participants:
    """The clients of a run and their data, without any model.

    Attributes:
        corpus: All examples.
        validation: The fixed validation set, from clients' validation parts.
        clients: Sorted by id.
        plans: Rank plans that at least one client has, by name.
        warnings: What a person should know, for example how many tasks were left out.
        devices: Profiles of the devices that at least one client has, by name; empty when none are simulated.
        affordable: Name of a plan -> what its device affords, for the client with the most examples of those that have
            it; empty unless ranks are chosen from devices.
        left_out: Of each device with clients that it affords no ranks for, the one with the fewest examples.
        workload: What rounds take; None when no devices are simulated.
    """

    corpus: FederatedCorpus
    validation: tuple[Example, ...]
    clients: tuple[ClientSpec, ...]
    plans: Mapping[str, RankPlan]
    warnings: tuple[str, ...]
    devices: Mapping[str, DeviceProfile] = field(default_factory=dict)
    affordable: Mapping[str, Affordable] = field(default_factory=dict)
    left_out: Sequence[Affordable] = ()
    workload: Workload | None = None

    def in_words(self) -> str:
        """Return how many clients of each type there are, and how many unseen tasks."""
        counts = count_plans(client.plan for client in self.clients)
        types = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        return f"{len(self.clients):,} clients ({types}), {len(self.corpus.unseen)} unseen tasks"


def gather_participants(config: Config, examples: Iterable[OwnedRow] | None = None) -> Participants:
    """Read the data, deal them to clients and give each client its ranks.

    Args:
        config: The run.
        examples: Those of ``data.name: in_memory``, None for every other.
    """
    refuse_expected_ranks(config)
    corpus, warnings = corpus_of(config, examples)
    rng = stream(config.seed, "validation")
    validation = fixed_validation(corpus.clients, config.data.validation_examples, rng)
    ids = sorted(corpus.clients)
    profiles, device_of = devices_of_each(ids, config)
    workload = workload_of(config, corpus) if profiles else None
    chosen: Mapping[str, Affordable] = {}
    if config.clients.ranks_from == "devices":
        assert workload is not None, "the configuration has been checked"
        chosen = affordable_plans(config, corpus, workload, profiles, device_of)
        plan_of = {client_id: found.plan for client_id, found in chosen.items()}
        warnings = (*warnings, *left_out_clients(chosen, corpus))
    else:
        plan_of = plan_of_each(ids, config, device_of)
    clients = tuple(
        ClientSpec(client_id, plan, len(splits.train), splits.category, device_of[client_id])
        for client_id, splits in sorted(corpus.clients.items())
        if (plan := plan_of[client_id]) is not None
    )
    if chosen and not clients:
        raise ClientError(f"no device affords any rank. {' '.join(left_out_clients(chosen, corpus))}")
    used = {client.plan.name: client.plan for client in clients}
    refuse_ranks(config, used)
    had = {client.device for client in clients}
    devices = {name: profile for name, profile in profiles.items() if name in had}
    by_size = [chosen[client_id] for client_id in sorted(chosen, key=lambda name: len(corpus.clients[name].train))]
    found = Participants(
        corpus,
        validation,
        clients,
        dict(sorted(used.items())),
        warnings,
        devices,
        affordable={own.plan.name: own for own in by_size if own.plan is not None},
        left_out=list({own.profile.name: own for own in reversed(by_size) if own.plan is None}.values()),
        workload=workload,
    )
    never = [] if workload is None else never_there(config, workload, devices, clients)
    return replace(found, warnings=(*warnings, *never))


def policy_of(config: Config, traits: Traits, cohort_size: int) -> Policy:
    """Return what the server does about clients that differ in speed.

    A method that cannot add late changes, as that of a reference, waits even where the run does not.
    """
    settings = config.clock.model_dump(exclude={"policy", "buffer_size"})
    name = config.clock.policy
    if name == "async" and (traits.per_client or traits.personal or not traits.adds_changes):
        name = "wait"
    return Policy(name=name, buffer_size=config.clock.buffer_size or max(1, cohort_size // 2), **settings)


def clock_of(config: Config, participants: Participants, traits: Traits, cohort_size: int) -> Clock | None:
    """Return the virtual clock of a loop whose method has these traits; None when no devices are simulated."""
    workload = participants.workload
    if workload is None:
        return None

    @cache
    def ranks_of(plan: RankPlan) -> dict[str, int]:
        """Return the rank of each module under a plan."""
        return plan.resolve(workload.shapes)

    def cost_of(client: ClientSpec) -> ClientCost:
        """Return what a round costs a client on its device."""
        rate = matrix_rate(participants.devices[client.device])
        return workload.cost(ranks_of(client.plan), client.num_examples, rate)

    return Clock(participants.devices, cost_of, policy_of(config, traits, cohort_size), config.seed)
