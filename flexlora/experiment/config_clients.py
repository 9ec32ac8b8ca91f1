"""Defines what clients afford, on which devices they run, and the virtual clock: three sections of a configuration."""

from typing import Annotated, Literal

from pydantic import Field

from flexlora.experiment.config_section import Section


class RankConfig(Section):
    """Ranks of one client type; 0 leaves the part without adapter."""

    attention: int = Field(ge=0, description="Rank of attention projections.")
    ffn: int = Field(ge=0, description="Rank of every other adapted module.")
    patterns: dict[str, int] = Field(
        default_factory=dict, description="Regular expression over module paths -> rank; comes before the two above."
    )


class ClientsConfig(Section):
    """What the clients' devices can afford."""

    ranks_from: Literal["types", "devices"] = Field(
        default="types",
        description=(
            "`types` below, or `devices`: the largest ranks that fit each device's memory, `devices.round_seconds` and "
            "`devices.round_bytes`, by the estimates of `flexlora plan`; the settings below are then ignored."
        ),
    )
    types: Literal["paper", "small"] | dict[str, RankConfig] = Field(
        default="small",
        description=(
            "`paper` (8/8, 30/30, 30/200, 200/200 for attention/FFN), `small` (the same idea for small models), or "
            "a mapping of type name to `{attention: RANK, ffn: RANK}`."
        ),
    )
    distribution: (
        Literal["uniform", "heavy_tail_light", "heavy_tail_strong", "normal", "extreme_heavy_tail"] | dict[str, float]
    ) = Field(
        default="heavy_tail_light",
        description="How types are spread over clients: a named distribution, or `{type: weight}` in any unit.",
    )
    counts: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict,
        description=(
            "Exact number of clients of each type, dealt by the seed; replaces `clients.distribution`, whatever that "
            "says. Must add up to the clients that `clients.assigned` does not name."
        ),
    )
    assigned: dict[Annotated[str, Field(coerce_numbers_to_str=True)], str] = Field(
        default_factory=dict,
        description="Client id -> its type, for clients whose device is known; all others are drawn.",
    )


class DevicesConfig(Section):
    """Simulated devices of the clients: what they afford, how fast and how reliable they are."""

    profiles: str | None = Field(
        default=None,
        description=(
            "`built_in` (phone, laptop, workstation, server: assumptions of ours), or a CSV file of devices; null "
            "simulates none."
        ),
    )
    distribution: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="How devices are spread over clients: `{device: weight}` in any unit; empty takes the profiles'.",
    )
    counts: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict,
        description="Exact number of clients of each device; replaces `devices.distribution`.",
    )
    assigned: dict[Annotated[str, Field(coerce_numbers_to_str=True)], str] = Field(
        default_factory=dict, description="Client id -> its device, for clients whose device is known."
    )
    types: dict[str, str] = Field(
        default_factory=dict,
        description="Device -> client type, with `clients.ranks_from: types`; other devices' clients draw their type.",
    )
    max_rank: int = Field(
        default=64, ge=1, description="Largest rank chosen, with `clients.ranks_from: devices`; powers of two below it."
    )
    rank_choices: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="Ranks to choose from instead of powers of two, for example `[8, 30, 200]`."
    )
    round_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Most virtual seconds a round may take a device, transfers included; bounds ranks. Null is any.",
    )
    round_bytes: int | None = Field(
        default=None, ge=1, description="Most bytes a round may move, down and up; bounds ranks. Null is any."
    )


class ClockConfig(Section):
    """The virtual clock that runs when devices are simulated, and what the server does about slow clients."""

    policy: Literal["wait", "deadline", "over_select", "async"] = Field(
        default="wait",
        description=(
            "`wait` for the slowest; `deadline` drops who is late; `over_select` samples more clients and takes the "
            "first; `async` keeps a cohort at work and steps after every `clock.buffer_size` updates, on changes."
        ),
    )
    deadline_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Virtual seconds after which `deadline`, and if set `over_select`, drop clients.",
    )
    over_selection: float = Field(
        default=1.3, ge=1, description="Clients sampled by `over_select` for each client of the cohort."
    )
    jitter: float = Field(
        default=0.0, ge=0, description="Standard deviation of the logarithm of a factor on each client's time."
    )
    day_seconds: float = Field(
        default=86400.0, gt=0, description="Length of a virtual day; availability repeats daily."
    )
    buffer_size: int | None = Field(
        default=None, ge=1, description="Updates in each server step of `async`; null is half a cohort."
    )
    staleness: Literal["constant", "polynomial", "exponential"] = Field(
        default="polynomial",
        description="Weight of a change t server steps old: 1, (1 + t)^-rate, or exp(-rate t); for `async`.",
    )
    staleness_rate: float = Field(default=0.5, ge=0, description="The rate in it.")
    max_staleness: int | None = Field(
        default=None, ge=0, description="Staler updates are dropped by `async`; null drops none."
    )
