"""Keeps who takes part in a real federation, so that a restarted server samples the same cohorts."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.experiment.run_folder import FEDERATION_FILE, ExperimentError
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.files import write_whole
from flexlora.seal import SealError, sealed, unsealed


class _ClientRow(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    client_id: str
    plan: str
    patterns: tuple[tuple[str, int], ...]
    num_examples: int = Field(ge=1)


class _FederationRow(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    clients: tuple[_ClientRow, ...]


@dataclass(frozen=True)
class KnownFederation:
    """A federation whose clients are known.

    Attributes:
        run_id: Name of the run, which every request and reply carries.
        clients: Everybody who can be sampled, sorted by id.
    """

    run_id: str
    clients: tuple[ClientSpec, ...]


def new_run_id() -> str:
    """Return a name that no other run has."""
    return secrets.token_hex(8)


def known_federation(run_id: str, clients: Sequence[ClientSpec]) -> KnownFederation:
    """Return the federation of these clients, sorted; plans that differ get names that differ."""
    named: dict[str, RankPlan] = {}
    sorted_clients = []
    for client in sorted(clients, key=lambda client: client.client_id):
        plan, number = client.plan, 1
        while named.setdefault(plan.name, plan).patterns != plan.patterns:
            number += 1
            plan = RankPlan(f"{client.plan.name}-{number}", client.plan.patterns)
        sorted_clients.append(ClientSpec(client.client_id, plan, client.num_examples))
    return KnownFederation(run_id, tuple(sorted_clients))


def write_federation(folder: Path, federation: KnownFederation) -> None:
    """Write a federation into a run folder."""
    rows = tuple(
        _ClientRow(
            client_id=client.client_id,
            plan=client.plan.name,
            patterns=client.plan.patterns,
            num_examples=client.num_examples,
        )
        for client in federation.clients
    )
    text = _FederationRow(run_id=federation.run_id, clients=rows).model_dump_json(indent=1)
    write_whole(folder / FEDERATION_FILE, sealed(text) + "\n")


def read_federation(folder: Path) -> KnownFederation | None:
    """Return the federation in a run folder; None if there is none yet.

    Raises:
        ExperimentError: If its file is damaged.
    """
    path = folder / FEDERATION_FILE
    if not path.exists():
        return None
    try:
        row = _FederationRow.model_validate_json(unsealed(path.read_bytes())[0])
    except (SealError, ValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExperimentError(f"{path} is not what it should be ({reason}); put a copy of it back") from error
    clients = [ClientSpec(one.client_id, RankPlan(one.plan, one.patterns), one.num_examples) for one in row.clients]
    return known_federation(row.run_id, clients)
