"""Refuses configurations that cannot be run over folders of files, before anything heavy is loaded."""

from collections.abc import Iterator, Mapping

from flexlora.experiment.client_plans import config_plans
from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.one_rank_methods import refuse_ranks
from flexlora.federation.client_types import type_weights
from flexlora.federation.clients import RankPlan
from flexlora.text import is_plain_word


def offered_plans(config: Config) -> dict[str, RankPlan]:
    """Return the rank plans that clients may choose from: the types that a configuration gives to anybody."""
    plans, clients = config_plans(config), config.clients
    names = {name for name, count in clients.counts.items() if count} | set(clients.assigned.values())
    if not clients.counts:
        weights = type_weights(plans, clients.distribution)
        names |= {name for name, weight in weights.items() if weight > 0}
    return {name: plan for name, plan in plans.items() if name in names}


def refuse_exchange(config: Config) -> None:
    """Raise if a run of this configuration cannot exchange files with its clients.

    Raises:
        ConfigError: With every reason.
    """
    plans = {} if config.clients.ranks_from == "devices" else offered_plans(config)
    if problems := list(_problems(config, plans)):
        raise ConfigError(problems, "the configuration, for rounds over files")
    refuse_ranks(config, plans)


def _problems(config: Config, plans: Mapping[str, RankPlan]) -> Iterator[str]:
    traits, name = config.method.traits(), config.method.name
    if traits.per_client:
        yield (
            f"method.name={name} sends every client something of its own, so it has to know them before they reply; "
            "choose a method that sends one broadcast per rank"
        )
    if traits.personal:
        yield (
            f"method.name={name} lets clients keep a factor between rounds, and a client that exchanges files keeps "
            "nothing; choose another method"
        )
    if not traits.takes_own_training:
        yield (
            f"clients of method.name={name} train cores or chosen entries, or under a penalty, in some rounds, "
            "and no PEFT folder can carry that; choose another method"
        )
    if config.rounds.upload_bits is not None:
        yield (
            f"rounds.upload_bits={config.rounds.upload_bits} rounds what is sent over a network, and PEFT folders have "
            "no such type; set rounds.upload_bits=null"
        )
    if config.devices.profiles is not None or config.clients.ranks_from == "devices":
        yield (
            "devices.profiles and clients.ranks_from=devices are about simulated devices; leave them out, real clients "
            "choose among the ranks of clients.types"
        )
    if config.privacy != type(config.privacy)():
        yield (
            "privacy asks for rounds of several phases, and over files there is one: the server sees every update "
            "as it is; leave privacy out if that may be, or run the federation over Flower"
        )
    if config.rounds.robust is not None or config.rounds.sampling != "fixed":
        yield (
            "rounds.robust and rounds.sampling are about cohorts that the server draws and compares, and over files "
            "clients come as they like; leave them out"
        )
    if config.deployment != type(config.deployment)():
        yield (
            "deployment is about clients that connect; leave it out, and say --min-clients when you aggregate: nobody "
            "waits for files"
        )
    if config.ray is not None:
        yield "ray is about clients that the server trains itself; set ray=null"
    if config.rounds.patience is not None:
        yield "rounds.patience waits for a validation loss, and the server has no data; set rounds.patience=null"
    if config.rounds.cohort_size is not None:
        yield (
            f"rounds.cohort_size={config.rounds.cohort_size} draws clients, but here everybody who replies takes part; "
            "set rounds.cohort_size=null"
        )
    for plan in plans:
        if not is_plain_word(plan):
            yield (
                f"clients.types names the type {plan!r}, which becomes the name of a folder; use letters, digits and "
                ". _ - + @, at most 100"
            )
