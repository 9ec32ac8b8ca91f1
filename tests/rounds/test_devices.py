"""Device profiles and their files, who has which device, and ranks that fit a budget."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from flexlora.data.prompts import EncodedExample
from flexlora.experiment.device_ranks import Affordable, Budget, affordable_ranks
from flexlora.experiment.workload import Workload
from flexlora.federation.clients import ClientError
from flexlora.rounds.costs import STEP_EFFICIENCY, BaseShape, DeviceCost, device_cost, matrix_rate
from flexlora.rounds.devices import COLUMNS, PROFILES, DeviceError, DeviceProfile, assign_devices, device_profiles
from flexlora.training.one_client import LocalTraining, step_batches

HEADER = "name,memory_megabytes,gigaflops_per_second,down_megabits_per_second,up_megabits_per_second"
IDS = [f"client{number}" for number in range(400)]


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "devices.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def problem(tmp_path: Path, *lines: str) -> str:
    with pytest.raises(DeviceError) as caught:
        device_profiles(str(written(tmp_path, *lines)))
    return str(caught.value)


def test_no_source_is_no_device_and_the_built_in_ones_grow() -> None:
    assert device_profiles(None) == {}
    assert list(device_profiles("built_in")) == ["phone", "laptop", "workstation", "server"]
    for smaller, larger in itertools.pairwise(PROFILES.values()):
        assert smaller.memory_bytes < larger.memory_bytes
        assert smaller.flops_per_second < larger.flops_per_second
        assert smaller.up_bytes_per_second < larger.up_bytes_per_second
        assert smaller.availability < larger.availability and smaller.dropout > larger.dropout


def test_a_file_of_devices_is_read_in_its_own_units(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER + ",dropout,from_hour,to_hour", "tv, 500, 8, 16, 4, 0.25, 22, 4", "pc,1,1,8,8,,,")
    found = device_profiles(str(path))
    # 16 and 4 megabits are 2 and half a megabyte; 22 to 4 o'clock is a quarter of the day.
    assert found["tv"] == DeviceProfile("tv", 5e8, 8e9, 2e6, 5e5, availability=0.25, dropout=0.25, hours=(22.0, 4.0))
    assert found["pc"] == DeviceProfile("pc", 1e6, 1e9, 1e6, 1e6)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "tv,lots,8,16,4",
            "line 3 (tv), column memory_megabytes: must be a number above 0; got 'lots': write, say, 2000",
        ),
        (
            "tv,500,0,16,4",
            "line 3 (tv), column gigaflops_per_second: must be a number above 0; got '0': write, say, 50",
        ),
        ("tv,500,8,,4", "line 3 (tv), column down_megabits_per_second: must be a number above 0; got ''"),
        ("tv,500,8,16,nan", "line 3 (tv), column up_megabits_per_second: must be a number above 0; got 'nan'"),
        (",500,8,16,4", "line 3, column name: must not be empty"),
        ("pc,500,8,16,4", "line 3, column name: must be unique; 'pc' is there twice"),
        ("tv,500,8,16,4,5", "line 3 (tv): has more cells than there are columns"),
    ],
)
def test_a_mistake_in_a_file_is_named_by_line_column_value_and_fix(tmp_path: Path, line: str, expected: str) -> None:
    assert expected in problem(tmp_path, HEADER, "pc,1,1,8,8", line)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("availability", "1.5", "column availability: must be above 0 and at most 1; got '1.5': write, say, 0.3"),
        ("dropout", "1", "column dropout: must be 0 or more and below 1; got '1': write, say, 0.05"),
        ("latency_seconds", "-1", "column latency_seconds: must be 0 or more; got '-1'"),
        ("weight", "0", "column weight: is 0 everywhere"),
        ("from_hour", "3", "column to_hour: must be given with the other one"),
        ("memory", "3", "there is no column 'memory'; known are name, memory_megabytes"),
    ],
)
def test_optional_columns_have_ranges_too(tmp_path: Path, column: str, value: str, expected: str) -> None:
    assert expected in problem(tmp_path, f"{HEADER},{column}", f"tv,500,8,16,4,{value}")


def test_all_mistakes_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    message = problem(tmp_path, HEADER, "tv,x,8,16,4", "pc,500,y,16,4")
    assert "line 2 (tv)" in message and "line 3 (pc)" in message
    message = problem(tmp_path, "name,memory_megabytes", "tv,3")
    assert "gigaflops_per_second, down_megabits_per_second, up_megabits_per_second missing" in message
    assert "there is no device" in problem(tmp_path, HEADER)
    with pytest.raises(DeviceError, match="cannot be read as CSV"):
        device_profiles(str(tmp_path / "nowhere.csv"))


def test_the_columns_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8")
    for column in COLUMNS:
        assert f"`{column}`" in page
    for name in PROFILES:
        assert f"| {name} |" in page


def test_a_clients_device_depends_on_the_seed_and_its_id_alone() -> None:
    none: dict[str, int] = {}
    drawn = assign_devices(IDS, PROFILES, 1, distribution={}, counts=none, assigned={})
    fewer = assign_devices(IDS[::-1][:50], PROFILES, 1, distribution={}, counts=none, assigned={})
    assert all(drawn[client_id] == device for client_id, device in fewer.items())
    assert drawn != assign_devices(IDS, PROFILES, 2, distribution={}, counts=none, assigned={})
    # Weights of the profiles: 60 % phones, of 400 draws; five standard deviations are 49.
    assert abs(list(drawn.values()).count("phone") - 240) < 49
    only = assign_devices(IDS, PROFILES, 1, distribution={"server": 2}, counts=none, assigned={IDS[3]: "phone"})
    assert {client_id for client_id, device in only.items() if device != "server"} == {IDS[3]}


def test_counts_of_devices_are_met_exactly_and_unknown_names_refused() -> None:
    counts = {"phone": 300, "laptop": 99}
    dealt = assign_devices(IDS, PROFILES, 1, distribution={}, counts=counts, assigned={"client7": "server"})
    assert {name: list(dealt.values()).count(name) for name in PROFILES} == {**counts, "server": 1, "workstation": 0}
    with pytest.raises(ClientError, match=r"devices\.counts must add up to 400"):
        assign_devices(IDS, PROFILES, 1, distribution={}, counts=counts, assigned={})
    with pytest.raises(DeviceError, match=r"devices\.distribution must name devices .* phone, laptop.*; got tablet"):
        assign_devices(IDS, PROFILES, 1, distribution={"tablet": 1}, counts={}, assigned={})
    with pytest.raises(ClientError, match=r"devices\.assigned must name clients of the data; 1 of 1 are unknown"):
        assign_devices(IDS, PROFILES, 1, distribution={}, counts={}, assigned={"nobody": "phone"})


SHAPES = {
    "l.0.self_attn.q_proj": (48, 32),
    "l.0.self_attn.k_proj": (12, 32),
    "l.0.mlp.up_proj": (80, 32),
    "l.0.mlp.down_proj": (32, 80),
}


def workload(max_steps: int = 3) -> Workload:
    base = BaseShape(
        num_parameters=20_000,
        num_layers=1,
        hidden_size=32,
        intermediate_size=80,
        vocab_size=50,
        bytes_per_parameter=4,
    )
    training = LocalTraining(batch_size=4, max_steps=max_steps)
    return Workload(base, SHAPES, batch_tokens=100, answer_tokens=20, training=training, wire_bytes=4)


def afforded(profile: DeviceProfile, budget: Budget, num_examples: float = 30) -> Affordable:
    load = workload()

    def cost_of(ranks: Mapping[str, int]) -> DeviceCost:
        cost = load.cost(ranks, num_examples, matrix_rate(profile))
        return device_cost(profile, cost, cost.transfer_bytes, cost.transfer_bytes)

    return affordable_ranks(profile, budget, SHAPES, cost_of)


def needs(attention: int, ffn: int, profile: DeviceProfile) -> tuple[float, float, float]:
    """Return memory, seconds and traffic by sums of their own over SHAPES, not by the code under test."""
    trained = attention * (48 + 32 + 12 + 32) + ffn * (80 + 32 + 32 + 80)
    inputs = 32 + attention + 32 + attention + 32 + ffn + 80 + ffn
    memory = 20_000 * 4 + trained * 16 + 100 * ((10 * 32 + 6 * 80) * 4 + inputs * 4) + 20 * 50 * 12
    sent = trained * 4 + 2 * 4 * 110
    compute = 3 * 100 * (4 * 20_000 + 6 * trained) / profile.flops_per_second
    links = sent / profile.down_bytes_per_second + sent / profile.up_bytes_per_second + 2 * profile.latency_seconds
    return memory, compute + links, 2 * sent


@pytest.mark.parametrize("memory", [480_000, 490_000, 495_000, 500_000, 520_000, 600_000, 5_000_000])
@pytest.mark.parametrize(("seconds", "traffic"), [(None, None), (0.21, None), (None, 30_000), (0.25, 26_000)])
def test_ranks_are_the_largest_that_an_independent_search_finds(
    memory: float, seconds: float | None, traffic: int | None
) -> None:
    profile = DeviceProfile("box", memory, 2e8, 4e5, 2e5, latency_seconds=0.01)
    budget = Budget((1, 2, 4, 8, 16, 32), seconds, traffic)
    # k_proj has 12 outputs, so attention stops at 8; the FFN's smallest dimension is 32.
    best = None
    for attention in (1, 2, 4, 8):
        for ffn in (1, 2, 4, 8, 16, 32):
            spent = needs(attention, ffn, profile)
            fits = spent[0] <= memory and spent[1] <= (seconds or 1e9) and spent[2] <= (traffic or 1e9)
            key = (min(attention, ffn), ffn, attention)
            if fits and (best is None or key > best):
                best = key
    found = afforded(profile, budget)
    if best is None:
        assert found.plan is None and found.reason.startswith("at rank 1 it needs ")
        return
    assert found.plan is not None and found.plan.name == "box"
    ranks = found.plan.resolve(SHAPES)
    assert (ranks["l.0.self_attn.q_proj"], ranks["l.0.mlp.up_proj"]) == (best[2], best[1])
    spent = needs(best[2], best[1], profile)
    assert found.cost.memory_bytes == int(spent[0])
    assert found.cost.seconds == pytest.approx(spent[1])
    assert found.cost.down_bytes + found.cost.up_bytes == spent[2]


def test_what_limits_a_device_is_named() -> None:
    roomy = DeviceProfile("roomy", 1e9, 1e12, 1e9, 1e9)
    assert afforded(roomy, Budget((1, 2, 4))).limited_by == ()
    # 80,000 weights in bytes, 16 a trained parameter, 393,600 of activations and 12,000 of logits at rank 2.
    tight = DeviceProfile("tight", 500_000, 1e12, 1e9, 1e9)
    assert afforded(tight, Budget((1, 2, 4, 8, 16))).limited_by == ("memory",)
    assert afforded(roomy, Budget((1, 2, 4, 8), round_bytes=20_000)).limited_by == ("traffic",)
    slow = DeviceProfile("slow", 1e9, 2e8, 1e9, 1e9)
    found = afforded(slow, Budget((1, 2, 4, 8), round_seconds=0.01))
    assert found.plan is None and found.limited_by == ("time",)
    assert "at rank 1 it needs 123 ms a round where 10 ms (devices.round_seconds) are allowed" in found.reason
    hopeless = afforded(DeviceProfile("toy", 1000, 1e12, 1e9, 1e9), Budget((2, 4)))
    assert hopeless.reason == "at rank 2 it needs 497 kB of memory and has 1.0 kB"


def test_the_rate_of_a_profile_is_that_of_whole_steps() -> None:
    assert matrix_rate(DeviceProfile("box", 1e9, 1e6, 1e9, 1e9)) * STEP_EFFICIENCY == 1e6
    # 3 steps of 4 examples of 25 tokens; more examples than steps allow change nothing, fewer do.
    profile = DeviceProfile("box", 1e9, 1e6, 1e9, 1e9)
    assert afforded(profile, Budget((1,))).cost.compute_seconds == pytest.approx(
        3 * 100 * (4 * 20_000 + 6 * (124 + 224)) / 1e6
    )
    assert afforded(profile, Budget((1,)), num_examples=8).cost.compute_seconds == pytest.approx(
        2 * 100 * (4 * 20_000 + 6 * (124 + 224)) / 1e6
    )


@pytest.mark.parametrize("num_examples", [1, 2, 3, 4, 5, 9, 10, 23])
@pytest.mark.parametrize(("batch_size", "accumulated"), [(1, 1), (4, 1), (2, 4), (16, 2)])
@pytest.mark.parametrize(("num_epochs", "max_steps"), [(1.0, None), (3.0, None), (0.5, None), (2.5, 3), (1.0, 2)])
def test_the_work_of_a_client_is_what_it_will_train_on(num_examples, batch_size, accumulated, num_epochs, max_steps):
    options = {"batch_size": batch_size, "gradient_accumulation_steps": accumulated, "max_steps": max_steps}
    load = dataclasses.replace(workload(), training=LocalTraining(num_epochs=num_epochs, **options))
    example = EncodedExample((1, 2), (-100, 2))
    batches = step_batches(
        [example] * num_examples, LocalTraining(num_epochs=num_epochs, **options), np.random.default_rng(0)
    )
    assert load.num_seen(num_examples) == sum(map(len, batches))


def test_ranks_are_never_above_the_smallest_side_even_if_all_choices_are() -> None:
    found = afforded(DeviceProfile("roomy", 1e9, 1e12, 1e9, 1e9), Budget((300,)))
    assert found.plan is not None
    assert set(found.plan.resolve(SHAPES).values()) == {12, 32}
