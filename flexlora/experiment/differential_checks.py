"""Checks `privacy.differential` and `rounds.sampling` against the other settings."""

from collections.abc import Iterator
from importlib.util import find_spec

from flexlora.aggregators.registry import package_methods
from flexlora.experiment.config import Config
from flexlora.experiment.method_config import read_method


def differential_disagreements(config: Config) -> Iterator[str]:
    """Yield a sentence for each setting that Poisson sampling or differential privacy does not fit."""
    rounds = config.rounds
    has_devices = config.devices.profiles is not None
    if rounds.sampling == "poisson" and has_devices:
        yield (
            "rounds.sampling=poisson draws every client on its own, but simulated devices are there at some hours "
            "only; set devices.profiles=null or rounds.sampling=fixed"
        )
    if rounds.sampling == "poisson" and config.privacy.secure_sum is not None:
        yield (
            "rounds.sampling=poisson draws cohorts of any size, none included, and privacy.secure_sum needs a few "
            "clients in each; set rounds.sampling=fixed or privacy.secure_sum=null"
        )
    differential = config.privacy.differential
    if differential is None:
        return
    if config.privacy.secure_sum is not None:
        yield (
            "privacy.differential clips each client's change at the server, and privacy.secure_sum shows it none; set "
            "one of the two to null"
        )
    if config.method.traits().private_changes is None:
        yield (
            "privacy.differential needs a method in which one client's share of a round has a bound; "
            f"method.name={config.method.name}, as it is set, has none: choose one of {', '.join(_bounded())}, or set "
            "privacy.differential=null"
        )
    if differential.noise_multiplier is None and differential.target_epsilon is None:
        yield "privacy.differential needs noise_multiplier, target_epsilon or both; got neither"
    if find_spec("dp_accounting") is None:
        yield "privacy.differential needs the package dp-accounting; install it with: pip install 'flexlora[privacy]'"
    if has_devices:
        yield (
            "privacy.differential accounts for clients that are all there and drawn at random, but simulated devices "
            "come, go and are late; set devices.profiles=null or privacy.differential=null"
        )
    if rounds.patience is not None:
        yield (
            "rounds.patience stops a run by the data of clients, which privacy.differential does not account for; set "
            "rounds.patience=null"
        )
    if rounds.min_updates > 1:
        yield (
            f"rounds.min_updates={rounds.min_updates} decides by the number of clients that came, which "
            "privacy.differential must not tell; set rounds.min_updates=1"
        )
    count_noise = None if differential.adaptive is None else differential.adaptive.count_noise
    half = (differential.noise_multiplier or 0.0) / 2
    if count_noise is not None and not count_noise > half:
        yield (
            f"privacy.differential.adaptive.count_noise must be above half of noise_multiplier, {half:g}; got "
            f"{count_noise:g}"
        )


def _bounded() -> list[str]:
    """Return the methods of the package that take clipped changes, as they are by default."""
    return [name for name in package_methods() if read_method({"name": name}).traits().private_changes is not None]
