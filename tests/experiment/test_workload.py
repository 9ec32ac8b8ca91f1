"""The work of a client, against the batches that it really trains on."""

import numpy as np
import pytest

from flexlora.data.prompts import EncodedExample
from flexlora.experiment.workload import Workload
from flexlora.rounds.costs import BaseShape
from flexlora.training.one_client import LocalTraining, step_batches


def workload(training: LocalTraining) -> Workload:
    base = BaseShape(
        num_parameters=20_000,
        num_layers=1,
        hidden_size=32,
        intermediate_size=80,
        vocab_size=50,
        bytes_per_parameter=4,
    )
    return Workload(base, {"q_proj": (48, 32)}, 100, 20, training, wire_bytes=4)


@pytest.mark.parametrize("num_examples", [1, 2, 3, 4, 5, 9, 10, 23])
@pytest.mark.parametrize(("batch_size", "accumulated"), [(1, 1), (4, 1), (2, 4), (16, 2)])
@pytest.mark.parametrize(("num_epochs", "max_steps"), [(1.0, None), (3.0, None), (0.5, None), (2.5, 3), (1.0, 2)])
def test_the_work_of_a_client_is_what_it_will_train_on(num_examples, batch_size, accumulated, num_epochs, max_steps):
    options = {"batch_size": batch_size, "gradient_accumulation_steps": accumulated, "max_steps": max_steps}
    training = LocalTraining(num_epochs=num_epochs, **options)
    example = EncodedExample((1, 2), (-100, 2))
    batches = step_batches([example] * num_examples, training, np.random.default_rng(0))
    assert workload(training).num_seen(num_examples) == sum(map(len, batches))


def test_a_mean_number_of_examples_counts_as_a_fraction_of_an_epochs_last_step() -> None:
    # Two steps an epoch of 4 and 2.5 examples; 3 steps are an epoch and a whole step.
    training = LocalTraining(batch_size=4, num_epochs=2.0, max_steps=3)
    assert workload(training).num_seen(6.5) == 6.5 + 4
