"""What a run will cost: sizes worked out here from shapes, counts from the settings."""

import itertools
import json
import re
from collections.abc import Iterator

import pytest
import torch
from safetensors import safe_open

import flexlora
from flexlora.data.pretraining import BASE_FOLDER
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.estimate import Estimate, estimate_experiment
from flexlora.text import bytes_text

# Client type -> rank of attention, rank of FFN.
RANKS = {"type1": (1, 1), "type2": (4, 4), "type3": (4, 16), "type4": (16, 16)}


def config_of(**sections: dict[str, object]) -> Config:
    tree: dict[str, dict[str, object]] = {
        "model": {"num_threads": 1, "num_processes": 1},
        "data": {
            "name": "generated",
            "num_clients": 8,
            "examples_per_task": 12,
            "num_unseen_tasks": 2,
            "test_examples_per_task": 1,
            "validation_examples": 4,
            "max_length": 160,
        },
        "clients": {"types": "small", "counts": {"type1": 2, "type2": 2, "type3": 2, "type4": 2}},
        "rounds": {"num_rounds": 3, "cohort_size": 4},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return parse_config(tree, "test")


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Iterator[None]:
    """Estimates measure with the threads of the run."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def estimate() -> Estimate:
    return estimate_experiment(config_of())


def base_shapes() -> dict[str, tuple[int, int]]:
    """Return the shapes of all linear layers of the embedded base, from its file."""
    with safe_open(BASE_FOLDER / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if re.search(r"(self_attn|mlp)\..*_proj\.weight$", name)]
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


@pytest.mark.parametrize("name", RANKS)
def test_trained_numbers_and_transfers_follow_from_the_shapes(estimate: Estimate, name: str) -> None:
    attention, ffn = RANKS[name]
    expected = sum((attention if "self_attn" in path else ffn) * sum(shape) for path, shape in base_shapes().items())
    row = next(row for row in estimate.types if row.name == name)
    assert row.num_clients == 2
    assert row.cost.num_trainable == expected
    # Four bytes a number, and headers.
    assert 4 * expected < row.cost.transfer_bytes < 4 * expected + 200 * 2 * len(base_shapes())
    assert row.down_bytes == row.cost.transfer_bytes == row.cost.up_bytes


def test_facts_count_clients_rounds_and_traffic(estimate: Estimate) -> None:
    facts = dict(estimate.facts)
    assert facts["Method"] == "flexlora" and facts["Unseen tasks"] == "2"
    assert re.fullmatch(r"8 with \d+ training examples; 4 in each of 3 rounds", facts["Clients"])
    mean = sum(row.num_clients * (row.down_bytes + row.cost.transfer_bytes) for row in estimate.types) / 8
    assert facts["Traffic of the run"] == bytes_text(3 * 4 * mean)
    assert facts["Local training of the run"].endswith(" on this machine")
    assert not estimate.devices and not any("devices" in note for note in estimate.notes)


def test_larger_ranks_cost_more_memory(estimate: Estimate) -> None:
    rows = {row.name: row.cost for row in estimate.types}
    costs = [rows[name] for name in RANKS]
    for smaller, larger in itertools.pairwise(costs):
        assert smaller.memory_bytes < larger.memory_bytes


def test_a_folded_tail_is_counted_on_the_way_down_only() -> None:
    folded = estimate_experiment(config_of(method={"name": "flexlora", "fold_tail": True, "server_rank": 20}))
    for row in folded.types:
        attention, ffn = RANKS[row.name]
        tail = sum(
            (20 - (attention if "self_attn" in path else ffn)) * sum(shape) for path, shape in base_shapes().items()
        )
        assert row.down_bytes - row.cost.transfer_bytes == 4 * tail


@pytest.mark.parametrize("name", ["ffa_lora", "fed_sb", "slora"])
def test_traffic_of_other_messages_than_both_factors_is_said_to_be_that_of_both(estimate: Estimate, name: str) -> None:
    options = {"stage_two": "flexlora", "sparse_rounds": 1} if name == "slora" else {}
    found = estimate_experiment(config_of(method={"name": name, **options}))
    assert any(f"as if both factors travelled both ways each round; {name} sends" in note for note in found.notes)
    assert not any("both factors" in note for note in estimate.notes)


@pytest.mark.parametrize("name", ["flora", "florist"])
def test_what_is_folded_round_by_round_is_said_to_be_left_out(name: str) -> None:
    found = estimate_experiment(config_of(method={"name": name}))
    for row in found.types:
        assert row.down_bytes == row.cost.transfer_bytes
    # Both factors at the rank of the shorter side.
    most = 4 * sum(min(shape) * sum(shape) for shape in base_shapes().values())
    (note,) = [note for note in found.notes if "has folded" in note]
    assert f"what {name} has folded" in note and f"up to {bytes_text(most)} a client" in note


def test_an_estimate_is_plain_json(estimate: Estimate) -> None:
    tree = json.loads(json.dumps(estimate.to_json(), allow_nan=False))
    assert list(tree) == ["run", "types", "devices", "privacy", "notes"]
    assert tree["types"]["type4"]["num_clients"] == 2 and tree["types"]["type4"]["num_trainable"] > 0


def test_a_plan_counts_references_and_scores_in_numbers(estimate: Estimate) -> None:
    run = json.loads(json.dumps(estimate.to_json()))["run"]
    # 3 rounds of 4 clients; 2 unseen tasks with an example each, scored before round 1 and after round 3, and the rank
    # groups at the end: 4 types, each on the 2 unseen tasks, and with own tests of at most 2 clients, base and adapter.
    assert run["parts"]["rounds"]["trainings"] == 12
    assert 2 * 2 + 4 * 2 <= run["parts"]["rounds"]["answers"] <= 2 * 2 + 4 * 2 + 2 * 8
    assert run["parts"]["fedit_smallest_rank"]["trainings"] == 12
    assert run["parts"]["fedit_smallest_rank"]["answers"] == 2
    smallest = 2 * 4 * sum(sum(shape) for shape in base_shapes().values())  # Rank 1, both ways, four bytes.
    assert (
        12 * smallest
        < run["parts"]["fedit_smallest_rank"]["traffic_bytes"]
        < 12 * (smallest + 800 * len(base_shapes()))
    )
    seconds = sum(part["training_seconds"] + part["scoring_seconds"] for part in run["parts"].values())
    assert run["seconds"] == pytest.approx(seconds) and seconds > 0
    assert run["num_clients"] == 8 and run["num_rounds"] == 3 and run["num_unseen_tasks"] == 2
    facts = dict(estimate.facts)
    assert "fedit smallest rank" in facts["Training of references"] and "answers in all" in facts["Scoring"]


def test_only_notes_are_sentences_in_json(estimate: Estimate) -> None:
    tree = estimate.to_json()
    del tree["notes"]
    texts: list[str] = []

    def walk(value: object) -> None:
        if isinstance(value, dict):
            for own in value.values():
                walk(own)
        elif isinstance(value, list | tuple):
            for own in value:
                walk(own)
        elif isinstance(value, str):
            texts.append(value)

    walk(tree)
    assert not [text for text in texts if " " in text]


def test_the_first_names_of_estimates_still_import() -> None:
    assert flexlora.Plan is Estimate
    assert flexlora.plan_experiment is estimate_experiment
