"""Checks the `privacy` section of a configuration against the other settings."""

from collections.abc import Iterator
from importlib.util import find_spec

from flexlora.aggregators.registry import package_methods
from flexlora.experiment.config import Config
from flexlora.experiment.method_config import read_method

FEWEST_CLIENTS = 3
"""Smallest cohort of a secure sum, which `uplink.masking_server` refuses to go below."""


def privacy_disagreements(config: Config) -> Iterator[str]:
    """Yield a sentence for each setting of a secure sum that does not fit the others."""
    secure_sum = config.privacy.secure_sum
    if secure_sum is None:
        return
    summed, name = config.method.traits().secure_sums, config.method.name
    if summed is None:
        yield (
            f"privacy.secure_sum shows the server no single update, and method.name={name} does not say that it can do "
            f"with sums of factors or products; choose one of {', '.join(_summable())}, or set privacy.secure_sum=null"
        )
    if summed == "factors" and (secure_sum.sketch_columns is not None or secure_sum.max_bytes is not None):
        yield (
            f"privacy.secure_sum.sketch_columns and max_bytes are about sums of products; method.name={name} adds up "
            "factors, without a sketch: leave them out"
        )
    if find_spec("cryptography") is None:
        yield "privacy.secure_sum needs the package cryptography; install it with: pip install 'flexlora[privacy]'"
    if config.clock.policy == "async":
        yield (
            "clock.policy=async takes updates as they come, and privacy.secure_sum needs a cohort; set another "
            "clock.policy or privacy.secure_sum=null"
        )
    size, clients = config.rounds.cohort_size, config.data.num_clients
    for setting, number in (("rounds.cohort_size", size), ("data.num_clients", clients)):
        if number is not None and number < FEWEST_CLIENTS:
            yield (
                f"{setting} must be at least {FEWEST_CLIENTS} with privacy.secure_sum, because of two clients each "
                f"could read the other's; got {number}"
            )
    if size is not None and 2 ** (secure_sum.word_bits - 1) - 1 < size:
        yield f"privacy.secure_sum.word_bits={secure_sum.word_bits} cannot hold the sum of {size} clients; raise it"
    optimizer = config.method.traits().local_optimizer or config.training.optimizer
    if optimizer == "sgd" and config.training.max_grad_norm is None and secure_sum.largest_change is None:
        yield (
            "privacy.secure_sum needs a bound of what training changes, and training.optimizer=sgd has none without "
            "training.max_grad_norm; set either that or privacy.secure_sum.largest_change"
        )


def _summable() -> list[str]:
    """Return the methods of the package of which a sum is enough."""
    return [name for name in package_methods() if read_method({"name": name}).traits().secure_sums is not None]
