"""Reads what a comparison compares: methods with options, and the controls that every comparison has."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from flexlora.errors import FlexLoraError
from flexlora.experiment.method_config import (
    FEDERATED_AVERAGING,
    MethodConfig,
    method_model,
    method_named,
    read_method,
)
from flexlora.foreign import ForeignError, read_yaml

ArmKind = Literal["method", "base", "centralised", "alone"]
RANKS_OF = ("own", "smallest", "largest", "only_largest")
"""What ``clients`` of an arm may be, besides the name of a client type."""

ALLOWED_SETTINGS = (
    "training",
    "lora.scaling",
    "lora.lora_alpha",
    "rounds.wire_dtype",
    "rounds.upload_bits",
    "rounds.error_feedback",
    "rounds.robust",
    "privacy.secure_sum",
)
"""Settings and sections an arm may have of its own: how clients train, and how their updates travel and are combined.
All others belong to the draw, which all arms share."""

RUNS_TO_ITS_END = "rounds.patience=null"
"""A setting of every arm, whatever the configuration says: curves of one length can be compared."""


class CompareError(FlexLoraError, ValueError):
    """A comparison that cannot be made, or that does not fit what is in its folder."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        label: What rows and tables call it.
        kind: ``method``, or a control that is no federated method.
        method: Its ``method`` section.
        settings: ``key=value`` overrides of its own.
        clients: Whose ranks are used: the clients' ``own``, the ``smallest`` or ``largest`` for everybody, those of the
            client type of this name for everybody, or own ranks of those clients ``only_largest`` alone.
        learning_rate: Fixed; None is chosen on tuning draws.
        start: Where its trials begin; None is the learning rate of the configuration.
    """

    label: str
    kind: ArmKind = "method"
    method: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    clients: str = "own"
    learning_rate: float | None = None
    start: float | None = None

    @property
    def client_type(self) -> str | None:
        """The client type whose ranks everybody has; None unless one is named."""
        return None if self.clients in RANKS_OF else self.clients

    @property
    def depends_on_ranks(self) -> bool:
        """Whether the arm differs between distributions of the same client types."""
        return self.kind == "alone" or (self.kind == "method" and self.clients in ("own", "only_largest"))

    def described(self) -> dict[str, Any]:
        """Return the arm as plain values, for the record of a comparison."""
        path = self.method.get("path")
        code = {"code": sha256(Path(path).read_bytes()).hexdigest()[:16]} if path else {}
        return code | {
            "label": self.label,
            "kind": self.kind,
            "method": dict(self.method),
            "settings": list(self.settings),
            "clients": self.clients,
            "learning_rate": self.learning_rate,
            "start": self.start,
        }


def controls() -> tuple[Arm, ...]:
    """Return what every comparison has besides its methods."""
    fedit = {"name": FEDERATED_AVERAGING}
    return (
        Arm("base", "base"),
        Arm("fedit_smallest", method=fedit, clients="smallest"),
        Arm("fedit_largest", method=fedit, clients="largest"),
        Arm("large_alone", method=fedit, clients="only_largest"),
        Arm("centralised", "centralised"),
        Arm("alone", "alone"),
    )


def read_arms(text: str) -> tuple[Arm, ...]:
    """Return the arms of ``--methods``: ``[LABEL=]METHOD[:KEY=VALUE]...[@RATE]``, separated by commas.

    A key without a dot is an option of the method, but ``clients`` says whose ranks are used and ``start`` at which
    learning rate the trials begin. A key with a dot is one of `ALLOWED_SETTINGS`.

    Raises:
        CompareError: If an entry cannot be read, names no method or refuses its options, or two have one label.
    """
    arms = [_read_arm(entry) for entry in _entries(text)]
    if not arms:
        raise CompareError("--methods must name at least one method, as --methods fedit,flexlora,aligned")
    reserved = {arm.label for arm in controls()}
    seen: set[str] = set()
    for arm in arms:
        if arm.label in reserved:
            raise CompareError(f"--methods: the label {arm.label} is that of a control; choose another one")
        if arm.label in seen:
            raise CompareError(
                f"--methods: two entries are called {arm.label}; give one of them a label, as other={arm.label}:..."
            )
        seen.add(arm.label)
    return tuple(arms)


def _entries(text: str) -> Iterator[str]:
    """Yield the parts between commas that are not inside brackets."""
    depth, start = 0, 0
    for index, letter in enumerate(f"{text},"):
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            if entry := text[start:index].strip():
                yield entry
            start = index + 1


def _read_arm(entry: str) -> Arm:
    body, marked, rate = entry.partition("@")
    if marked and not rate.strip():
        raise CompareError(f"--methods: {entry!r} has no learning rate behind @; write one, as @0.01, or leave @ out")
    head, *pairs = re.split(r":(?=[A-Za-z_][\w.]*=)", body)
    label, _, name = head.rpartition("=")
    method: dict[str, Any] = {"name": name.strip()}
    settings: list[str] = []
    clients, start = None, None
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key == "clients":
            clients = value.strip()
        elif key == "start":
            start = _rate(entry, value)
        elif "." in key:
            settings.append(_own_setting(entry, key, value))
        else:
            method[key] = _value(entry, key, value)
    if not name or ":" in name:
        raise CompareError(
            f"--methods: {entry!r} names no method, or an option without a value; write "
            "[LABEL=]METHOD[:KEY=VALUE]...[@RATE]"
        )
    section = _section(entry, method)
    if clients is None:
        clients = "smallest" if section.traits().needs_one_rank else "own"
    if clients == "own" and section.traits().needs_one_rank:
        raise CompareError(f"--methods: {name} needs one rank for all clients; give {entry!r} clients=smallest")
    return Arm(label or _label_of(body), "method", method, tuple(settings), clients, _rate(entry, rate), start)


def _section(entry: str, method: Mapping[str, Any]) -> MethodConfig:
    try:
        return read_method(dict(method))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)]
        known = sorted(method_model(*method_named(dict(method))).model_fields.keys() - {"name", "path"})
        raise CompareError(
            f"--methods: {method['name']} refuses options of {entry!r} ({'; '.join(wrong)}); "
            f"it has {', '.join(known) or 'none'}"
        ) from None


def _label_of(body: str) -> str:
    return body.replace(" ", "")


def _own_setting(entry: str, key: str, value: str) -> str:
    if not any(key == own or key.startswith(f"{own}.") for own in ALLOWED_SETTINGS):
        raise CompareError(
            f"--methods: {key} of {entry!r} belongs to the draw, which all methods share; set it for all of them "
            f"(KEY=VALUE behind CONFIG), an entry may only set {', '.join(ALLOWED_SETTINGS)}"
        )
    if key == "training.learning_rate":
        raise CompareError(f"--methods: write the learning rate of {entry!r} as @{value}, or leave it to be chosen")
    return f"{key}={value}"


def _value(entry: str, key: str, text: str) -> Any:
    try:
        return read_yaml(text, key)
    except ForeignError as error:
        raise CompareError(f"--methods: the value of {key} in {entry!r} is {error.reason}") from error


def _rate(entry: str, text: str) -> float | None:
    if not text:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise CompareError(f"--methods: the learning rate of {entry!r} must be a number above 0; got {text!r}")
    return rate


def by_label(arms: Sequence[Arm]) -> dict[str, Arm]:
    """Return label -> arm."""
    return {arm.label: arm for arm in arms}
