"""Checks `rounds.robust` against the other settings."""

from collections.abc import Iterator

from flexlora.aggregators.registry import package_methods
from flexlora.experiment.config import Config
from flexlora.experiment.method_config import read_method
from flexlora.uplink.robust_settings import RobustSettings, least_clients


def robust_disagreements(config: Config) -> Iterator[str]:
    """Yield a sentence for each setting that a robust rule does not fit."""
    robust = config.rounds.robust
    if robust is None:
        return
    traits, name = config.method.traits(), config.method.name
    if config.privacy.differential is not None:
        yield (
            f"rounds.robust.rule={robust.rule} lets one client decide how far others count, which no clip of "
            "privacy.differential bounds; set one of the two to null"
        )
    if config.privacy.secure_sum is not None:
        yield (
            f"rounds.robust.rule={robust.rule} compares the clients of a cohort, and privacy.secure_sum shows only "
            "their sum; set one of the two to null"
        )
    if config.clock.policy == "async":
        yield "rounds.robust compares a cohort, which clock.policy=async does not wait for; set another clock.policy"
    if traits.personal or traits.per_client or not traits.sends_both_factors:
        yield (
            "rounds.robust compares what clients changed, which needs whole factors that start from one model; "
            f"method.name={name} sends less or starts clients apart: choose another, such as flexlora"
        )
    if robust.rule == "norm_bound" and traits.private_changes is None:
        able = [one for one in package_methods() if read_method({"name": one}).traits().private_changes is not None]
        yield (
            "rounds.robust.rule=norm_bound needs a method that can add a part of a change; "
            f"method.name={name} cannot: choose one of {', '.join(able)}, or another rule"
        )
    if robust.rule != "norm_bound" and robust.max_norm is not None:
        yield f"rounds.robust.max_norm={robust.max_norm:g} is for rule=norm_bound alone; leave it out"
    least, size = least_clients(RobustSettings(robust.rule, robust.num_malicious)), config.rounds.cohort_size
    if size is not None and size < least:
        yield (
            f"rounds.cohort_size must be at least {least} for rounds.robust.rule={robust.rule} to bear "
            f"{robust.num_malicious} that lie; got {size}"
        )
