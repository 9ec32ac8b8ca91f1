import dataclasses

import pytest

from flexlora.data.prompts import EncodedExample
from flexlora.engines.chunks import cut_into_chunks
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.training.one_client import LocalTraining

PLAN = RankPlan("any", (("", 1),))
SETTINGS = LocalTraining(batch_size=4)


def cohort_of(num_clients, num_examples=8):
    return [ClientSpec(f"{index:04}", PLAN, num_examples) for index in range(num_clients)]


def examples_of_length(length, num_examples=8):
    def examples_of(client_id):
        return [EncodedExample((1,) * length, (1,) * length)] * num_examples

    return examples_of


def sizes(cohort, examples_of, settings=SETTINGS):
    return [len(chunk.clients) for chunk in cut_into_chunks(cohort, examples_of, settings, "cpu")]


def test_chunks_are_the_cohort_in_order_with_its_examples():
    cohort = cohort_of(30)
    chunks = list(cut_into_chunks(cohort, examples_of_length(50), SETTINGS, "cpu"))
    assert [client for chunk in chunks for client in chunk.clients] == cohort
    assert all([client.client_id for client in chunk.clients] == list(chunk.examples) for chunk in chunks)


def test_a_step_of_a_chunk_fills_passes_and_the_last_chunks_are_small():
    # 4 rows of 64 tokens are 256 tokens a client: 3 clients are the least that fills a pass, 16 the most.
    found = sizes(cohort_of(200), examples_of_length(64))
    assert found[0] == 16
    assert found[-2] == 3
    assert found == sorted(found, reverse=True)


def test_long_clients_are_chunks_of_their_own():
    assert sizes(cohort_of(5), examples_of_length(1024)) == [1] * 5


def test_gradient_accumulation_and_few_examples_count_towards_a_step():
    accumulating = dataclasses.replace(SETTINGS, gradient_accumulation_steps=2)
    assert sizes(cohort_of(4), examples_of_length(96), accumulating) == [1] * 4
    assert sizes(cohort_of(4, 2), examples_of_length(64, 2)) == [4]


def test_examples_are_asked_for_once_and_only_when_their_chunk_is():
    asked = []

    def examples_of(client_id):
        asked.append(client_id)
        return examples_of_length(1024)(client_id)

    chunks = cut_into_chunks(cohort_of(3), examples_of, SETTINGS, "cpu")
    next(chunks)
    assert asked == ["0000"]
    list(chunks)
    assert asked == ["0000", "0001", "0002"]


def test_a_client_whose_examples_fail_keeps_its_place_without_them():
    def examples_of(client_id):
        if client_id == "0001":
            raise OSError("gone")
        return examples_of_length(64)(client_id)

    (chunk,) = cut_into_chunks(cohort_of(2), examples_of, SETTINGS, "cpu")
    assert [client.client_id for client in chunk.clients] == ["0000", "0001"]
    assert list(chunk.examples) == ["0000"]


def test_an_interruption_is_not_a_client_without_examples():
    def examples_of(client_id):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(cut_into_chunks(cohort_of(2), examples_of, SETTINGS, "cpu"))


def test_passes_of_a_larger_base_are_full_with_fewer_tokens():
    def number(num_parameters, device_type="cpu"):
        chunks = cut_into_chunks(cohort_of(8), examples_of_length(40), SETTINGS, device_type, num_parameters)
        return len(list(chunks))

    assert (number(1_400_000), number(135_000_000), number(135_000_000, "cuda")) == (2, 4, 1)
