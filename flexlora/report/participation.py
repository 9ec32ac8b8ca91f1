"""Counts how often the clients of each plan and device took part, what they moved, and which of them failed."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexlora.rounds.records import ClientRecord, ManifestRecord, RoundRecord
from flexlora.text import NONE, describe_ranks


@dataclass(frozen=True)
class PlanRow:
    """The clients of one rank plan: how many, how often sampled, and what they moved."""

    plan: str
    ranks: str
    num_clients: int | None
    num_sampled: int
    num_never_sampled: int | None
    num_ok: int
    num_failed: int
    num_examples: int
    up_bytes: int
    down_bytes: int
    up_bytes_each: float | None
    down_bytes_each: float | None


@dataclass(frozen=True)
class DeviceRow:
    """The clients of one simulated device, over the rounds that sampled them."""

    device: str
    num_clients: int | None
    num_sent: int
    num_ok: int
    num_failed: int
    seconds_each: float | None
    staleness_each: float | None
    up_bytes: int
    down_bytes: int


@dataclass(frozen=True)
class FailureRow:
    """One client that was left out of one round."""

    server_round: int
    client_id: str
    plan: str
    stage: str
    reason: str


def plan_table(records: Sequence[RoundRecord], manifest: ManifestRecord | None) -> list[PlanRow]:
    """Return one row per rank plan, smallest ranks first."""
    by_plan: defaultdict[str, list[ClientRecord]] = defaultdict(list)
    for client in _participations(records):
        by_plan[client.plan].append(client)
    ranks = plan_ranks(records, manifest)
    rows = []
    for plan, module_ranks in ranks.items():
        clients = by_plan[plan]
        ok = [client for client in clients if client.outcome == "ok"]
        num_sampled = len({client.client_id for client in clients})
        num_clients = manifest.plan_counts.get(plan) if manifest else None
        up_bytes = sum(client.up_bytes for client in clients)
        down_bytes = sum(client.down_bytes for client in clients)
        rows.append(
            PlanRow(
                plan=plan,
                ranks=describe_ranks(module_ranks),
                num_clients=num_clients,
                num_sampled=num_sampled,
                num_never_sampled=None if num_clients is None else max(num_clients - num_sampled, 0),
                num_ok=len(ok),
                num_failed=len(clients) - len(ok),
                num_examples=sum(client.num_examples for client in ok),
                up_bytes=up_bytes,
                down_bytes=down_bytes,
                up_bytes_each=sum(client.up_bytes for client in ok) / len(ok) if ok else None,
                down_bytes_each=sum(client.down_bytes for client in ok) / len(ok) if ok else None,
            )
        )
    return rows


def times_sampled(records: Sequence[RoundRecord], manifest: ManifestRecord | None) -> dict[str, Counter[int]]:
    """Return plan name -> how many of its clients were sampled 0, 1, 2, ... times.

    Clients that were never sampled are counted only when the manifest says how many clients there are.
    """
    times = Counter((client.plan, client.client_id) for client in _participations(records))
    counts = {plan: Counter[int]() for plan in plan_ranks(records, manifest)}
    for (plan, _), sampled in times.items():
        counts[plan][sampled] += 1
    for plan, histogram in counts.items():
        never = (manifest.plan_counts.get(plan, 0) if manifest else 0) - histogram.total()
        if never > 0:
            histogram[0] = never
    return counts


def plan_ranks(records: Sequence[RoundRecord], manifest: ManifestRecord | None) -> dict[str, dict[str, int]]:
    """Return plan name -> module path -> rank, smallest ranks first; from the clients where there is no manifest."""
    ranks = dict(manifest.plan_ranks) if manifest else {}
    for client in _participations(records):
        ranks.setdefault(client.plan, client.ranks)
    return dict(sorted(ranks.items(), key=lambda item: (sum(item[1].values()), item[0])))


def device_table(records: Sequence[RoundRecord], manifest: ManifestRecord | None) -> list[DeviceRow]:
    """Return one row per simulated device, the quickest first."""
    by_device: defaultdict[str, list[ClientRecord]] = defaultdict(list)
    for record in records:
        for client in record.clients:
            if client.device:
                by_device[client.device].append(client)
    counts = manifest.device_counts if manifest else {}
    rows = []
    for device in sorted(by_device.keys() | counts.keys()):
        clients = by_device[device]
        ok = [client for client in clients if client.outcome == "ok"]
        rows.append(
            DeviceRow(
                device=device,
                num_clients=counts.get(device),
                num_sent=len(clients),
                num_ok=len(ok),
                num_failed=len(clients) - len(ok),
                seconds_each=_mean([client.virtual_seconds for client in ok]),
                staleness_each=_mean([client.staleness for client in ok]),
                up_bytes=sum(client.up_bytes for client in clients),
                down_bytes=sum(client.down_bytes for client in clients),
            )
        )
    return sorted(rows, key=lambda row: (row.seconds_each is None, row.seconds_each or 0.0, row.device))


def failure_table(records: Sequence[RoundRecord]) -> list[FailureRow]:
    """Return every failure, in the order in which they happened."""
    return [
        FailureRow(record.server_round, client.client_id, client.plan, client.stage or NONE, client.reason or NONE)
        for record in records
        for client in record.clients
        if client.outcome == "failed"
    ]


def _participations(records: Sequence[RoundRecord]) -> Iterable[ClientRecord]:
    return (client for record in records for client in record.clients)


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
