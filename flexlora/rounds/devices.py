"""Reads device profiles and says which client has which device.

The numbers of the built-in profiles are round, plausible assumptions of ours, measured on no device: use them to
compare methods and policies, not to predict a fleet. Describe a fleet you know in a CSV file.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from flexlora.errors import FlexLoraError
from flexlora.federation.client_types import check_known, deal_names, draw_names

BUILT_IN = "built_in"
MEGABYTE, MEGABIT, GIGAFLOP = 1e6, 1e6 / 8, 1e9
HOURS_PER_DAY = 24


class DeviceError(FlexLoraError, ValueError):
    """Devices that cannot be read or assigned, or that afford no rank."""


@dataclass(frozen=True)
class DeviceProfile:
    """One kind of device.

    Attributes:
        name: What reports call it.
        memory_bytes: Memory that training may use.
        flops_per_second: Sustained over whole training steps, not the peak on its data sheet.
        down_bytes_per_second: From the server to the device.
        up_bytes_per_second: From the device to the server.
        latency_seconds: Added to every transfer.
        availability: Share (0 to 1) of each day during which it can be sampled.
        dropout: Chance (0 to 1) of failing in a round it was sampled for.
        weight: How common it is, in any unit.
        hours: First and last hour of the day at which it can be sampled, the same for all devices of the profile; None
            gives each device its ``availability`` at a time of its own.
    """

    name: str
    memory_bytes: float
    flops_per_second: float
    down_bytes_per_second: float
    up_bytes_per_second: float
    latency_seconds: float = 0.0
    availability: float = 1.0
    dropout: float = 0.0
    weight: float = 1.0
    hours: tuple[float, float] | None = None


PROFILES: Mapping[str, DeviceProfile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            DeviceProfile("phone", 2e9, 50e9, 20 * MEGABIT, 5 * MEGABIT, 0.1, 0.3, 0.10, weight=60),
            DeviceProfile("laptop", 8e9, 300e9, 50 * MEGABIT, 10 * MEGABIT, 0.05, 0.5, 0.05, weight=25),
            DeviceProfile("workstation", 24e9, 10e12, 200 * MEGABIT, 50 * MEGABIT, 0.02, 0.9, 0.02, weight=10),
            DeviceProfile("server", 80e9, 100e12, 1000 * MEGABIT, 1000 * MEGABIT, 0.01, 1.0, 0.01, weight=5),
        )
    }
)
"""Our assumptions; see the module's docstring."""


@dataclass(frozen=True)
class _Column:
    """A column of a device CSV: what it holds, in which range, and how a value is written."""

    rule: str
    example: str
    unit: float = 1.0
    low: float = 0.0
    high: float = math.inf
    with_low: bool = True
    with_high: bool = True
    default: float | None = None

    def holds(self, value: float) -> bool:
        """Return whether a value is in the range."""
        above = value >= self.low if self.with_low else value > self.low
        below = value <= self.high if self.with_high else value < self.high
        return math.isfinite(value) and above and below


_POSITIVE = "a number above 0"


# In the order of a profile's fields; a field is the value in the file times the unit.
COLUMNS: Mapping[str, _Column] = MappingProxyType(
    {
        "memory_megabytes": _Column(_POSITIVE, "2000", MEGABYTE, with_low=False),
        "gigaflops_per_second": _Column(_POSITIVE, "50", GIGAFLOP, with_low=False),
        "down_megabits_per_second": _Column(_POSITIVE, "20", MEGABIT, with_low=False),
        "up_megabits_per_second": _Column(_POSITIVE, "5", MEGABIT, with_low=False),
        "latency_seconds": _Column("0 or more", "0.1", default=0.0),
        "availability": _Column("above 0 and at most 1", "0.3", high=1, with_low=False, default=1.0),
        "dropout": _Column("0 or more and below 1", "0.05", high=1, with_high=False, default=0.0),
        "weight": _Column("0 or more", "10", default=1.0),
    }
)


HOUR_COLUMNS = ("from_hour", "to_hour")


_HOUR = _Column(f"0 or more and below {HOURS_PER_DAY}", "22", high=HOURS_PER_DAY, with_high=False)


def device_profiles(source: str | None) -> Mapping[str, DeviceProfile]:
    """Return name -> profile: the built-in ones for ``built_in``, those of a CSV file, or none for None.

    Raises:
        DeviceError: Every mistake in the file, with line, column, value and what to write instead.
    """
    if source is None:
        return {}
    return PROFILES if source == BUILT_IN else read_profiles(Path(source).expanduser())


def read_profiles(path: Path) -> dict[str, DeviceProfile]:
    """Return the profiles in a CSV file, in its order: one line each, under the names of ``COLUMNS``.

    Raises:
        DeviceError: Every mistake in the file, with line, column, value and what to write instead.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DeviceError(f"devices.profiles: {path} cannot be read as CSV: {error}") from error
    problems = list(_column_problems(columns))
    profiles: dict[str, DeviceProfile] = {}
    for line, row in rows:
        found: list[str] = []
        # A column that is not there is said once, not again on every line.
        profile = _read_row(row, f"line {line}", found, columns)
        if profile.name in profiles and profile.name:
            found.append(f"line {line}, column name: must be unique; {profile.name!r} is there twice: rename one")
        profiles[profile.name] = profile
        problems += found
    if not rows:
        problems.append("there is no device: add a line below the names of the columns")
    if profiles and not any(profile.weight for profile in profiles.values()):
        problems.append("column weight: is 0 everywhere; raise at least one")
    if problems:
        raise DeviceError(f"devices.profiles: {path} cannot be used:", *(f"  - {text}" for text in problems))
    return profiles


def _column_problems(columns: Sequence[str]) -> Iterator[str]:
    known = ("name", *COLUMNS, *HOUR_COLUMNS)
    needed = ["name", *(name for name, column in COLUMNS.items() if column.default is None)]
    missing = [name for name in needed if name not in columns]
    if missing:
        yield f"the columns {', '.join(needed)} must be there; {', '.join(missing)} missing from the first line"
    for name in sorted(set(columns) - set(known)):
        yield f"there is no column {name!r}; known are {', '.join(known)}"
    for name in sorted({name for name in columns if columns.count(name) > 1}):
        yield f"column {name}: must be there once; remove one"


def _read_row(
    row: Mapping[str | None, str | None], where: str, problems: list[str], columns: Sequence[str]
) -> DeviceProfile:
    """Return the profile on a line; append what is wrong with the cells of the file's columns to ``problems``."""
    name = (row.get("name") or "").strip()
    if not name and "name" in columns:
        problems.append(f"{where}, column name: must not be empty; write what reports are to call the device")
    if None in row:
        problems.append(f"{where} ({name}): has more cells than there are columns; put cells with commas in quotes")
    where = f"{where} ({name})" if name else where

    def number(key: str, column: _Column) -> float | None:
        """Return the number in a cell; None if it is wrong, which is then among the problems."""
        text = (row.get(key) or "").strip()
        if key not in columns or (not text and column.default is not None):
            return column.default
        value = _number(text)
        if value is None or not column.holds(value):
            problems.append(f"{where}, column {key}: must be {column.rule}; got {text!r}: write, say, {column.example}")
            return None
        return value

    values = [(number(key, column) or 0.0) * column.unit for key, column in COLUMNS.items()]
    hours = None
    given = [bool((row.get(key) or "").strip()) for key in HOUR_COLUMNS]
    if all(given):
        first, last = (number(key, _HOUR) for key in HOUR_COLUMNS)
        if first is not None and first == last:
            problems.append(f"{where}, column to_hour: must differ from from_hour; got {last:g} for both: empty both")
        hours = (first or 0.0, last or 0.0)
    elif any(given):
        empty = HOUR_COLUMNS[given.index(False)]
        problems.append(f"{where}, column {empty}: must be given with the other one; got '': write, say, 6")
    if hours is not None:
        values[list(COLUMNS).index("availability")] = (hours[1] - hours[0]) % HOURS_PER_DAY / HOURS_PER_DAY
    return DeviceProfile(name, *values, hours=hours)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def assign_devices(
    client_ids: Sequence[str],
    profiles: Mapping[str, DeviceProfile],
    seed: int,
    *,
    distribution: Mapping[str, float],
    counts: Mapping[str, int],
    assigned: Mapping[str, str],
) -> dict[str, str]:
    """Return client id -> device name: those assigned, and the others by exact counts or drawn by weight.

    A drawn device depends on the seed and the client's id alone.

    Args:
        distribution: Device -> weight; empty takes the weights of the profiles.
        counts: Device -> exact number of clients; empty draws them.
        assigned: Client id -> device.

    Raises:
        DeviceError: For a device that has no profile, or weights that are all 0.
        ClientError: For counts of another sum, or clients that the data do not have.
    """
    for key, named in (("distribution", distribution), ("counts", counts), ("assigned", assigned.values())):
        unknown = sorted(set(named) - set(profiles))
        if unknown:
            raise DeviceError(
                f"devices.{key} must name devices of devices.profiles, which has {', '.join(profiles)}; "
                f"got {', '.join(unknown)}"
            )
    check_known(client_ids, assigned, "devices")
    others = [client_id for client_id in client_ids if client_id not in assigned]
    weights = distribution or {name: profile.weight for name, profile in profiles.items()}
    if counts:
        return dict(assigned) | deal_names(others, counts, seed, "client-device", "devices")
    if not any(weight > 0 for weight in weights.values()):
        raise DeviceError("devices.distribution gives every device weight 0; raise at least one")
    return dict(assigned) | draw_names(others, weights, seed, "client-device")
