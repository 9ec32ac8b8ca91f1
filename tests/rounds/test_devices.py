"""Device profiles and their files, and who has which device."""

import itertools
from pathlib import Path

import pytest

from flexlora.federation.clients import ClientError
from flexlora.rounds.devices import COLUMNS, PROFILES, DeviceError, DeviceProfile, assign_devices, device_profiles

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


def test_mistakes_in_columns_and_in_lines_are_told_together(tmp_path: Path) -> None:
    header = "name,memory_megabyte,gigaflops_per_second,down_megabits_per_second,up_megabits_per_second,weight"
    text = problem(tmp_path, header, "tv,500,zero,16,4,0", "tv,500,8,-1,4,0", ",1,1,1,1,0")
    for expected in (
        "memory_megabytes missing from the first line",
        "there is no column 'memory_megabyte'",
        "line 2 (tv), column gigaflops_per_second: must be a number above 0; got 'zero'",
        "line 3 (tv), column down_megabits_per_second: must be a number above 0; got '-1'",
        "line 3, column name: must be unique",
        "line 4, column name: must not be empty",
        "column weight: is 0 everywhere",
    ):
        assert expected in text
    # The missing column is told once, and not for each line.
    assert text.count("  - ") == 7
