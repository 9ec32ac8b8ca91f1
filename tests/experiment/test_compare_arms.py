"""What --methods may say, and what is refused."""

import pytest

from flexlora.errors import FlexLoraError
from flexlora.experiment.compare_arms import read_arms


def test_a_method_by_its_name_runs_at_the_clients_own_ranks() -> None:
    (arm,) = read_arms("flexlora")
    assert (arm.label, dict(arm.method), arm.clients, arm.learning_rate) == (
        "flexlora",
        {"name": "flexlora"},
        "own",
        None,
    )


def test_a_method_for_one_rank_runs_at_the_smallest() -> None:
    (arm,) = read_arms("fedit")
    assert arm.clients == "smallest"


def test_options_settings_label_clients_and_rate_are_read() -> None:
    (arm,) = read_arms("mine=flexlora:error_compensation=true:training.optimizer=sgd:clients=largest@0.5")
    assert arm.label == "mine"
    assert dict(arm.method) == {"name": "flexlora", "error_compensation": True}
    assert arm.settings == ("training.optimizer=sgd",)
    assert (arm.clients, arm.learning_rate) == ("largest", 0.5)


def test_how_updates_travel_may_differ_between_arms() -> None:
    text = "aligned,four=aligned:rounds.upload_bits=4:rounds.error_feedback=true,secure=aligned:privacy.secure_sum={}"
    settings = [arm.settings for arm in read_arms(text)]
    assert settings == [(), ("rounds.upload_bits=4", "rounds.error_feedback=true"), ("privacy.secure_sum={}",)]
    with pytest.raises(FlexLoraError, match=r"rounds\.cohort_size of .* belongs to the draw"):
        read_arms("aligned:rounds.cohort_size=3")


def test_an_entry_without_a_label_is_called_as_it_is_written() -> None:
    assert [arm.label for arm in read_arms("flexlora:fold_tail=true, flexlora")] == [
        "flexlora:fold_tail=true",
        "flexlora",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one method"),
        ("flexlora,flexlora", "two entries"),
        ("base=flexlora", "that of a control"),
        ("fedit_smallest=fedit", "that of a control"),
        ("flexlorra", "flexlora"),
        ("flexlora:rank=3", "rank"),
        ("flexlora@fast", "number above 0"),
        ("flexlora@-1", "number above 0"),
        ("flexlora@nan", "number above 0"),
        ("flexlora:data.num_clients=3", "belongs to the draw"),
        ("flexlora:training.learning_rate=3", "write the learning rate"),
        ("fedit:clients=own", "one rank"),
        ("x=", "names no method"),
        ("flexlora:fold_tail", "option without a value"),
        ("flexlora@", "no learning rate behind @"),
        ("flexlora:fold_tail=perhaps", "fold_tail: .*valid boolean.*it has "),
        ("own:path=/nowhere.py", "no file"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(FlexLoraError, match=message):
        read_arms(text)
