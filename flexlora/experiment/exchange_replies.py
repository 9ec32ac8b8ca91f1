"""Finds the replies of a round in folders, and decides which of them the round can use.

A reply that does not belong here (of another run, round or base, damaged beyond its manifest, without a signature that
is trusted) is refused and named. One that does belong but cannot be used (a changed file, NaN, another rank) is a
client that failed, and stands so in the records.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexlora.engines.exchange_folder import ExchangeFolderEngine
from flexlora.engines.exchange_keys import PUBLIC_SUFFIX, check_signature
from flexlora.engines.exchange_manifest import MANIFEST_FILE, BroadcastManifest, ExchangeError, ReplyManifest
from flexlora.engines.exchange_manifest import read_manifest_file as read_manifest
from flexlora.engines.simulation import reason_of
from flexlora.errors import FlexLoraError
from flexlora.experiment.exchange_run import ExchangeRun
from flexlora.experiment.run_folder import KEYS_FOLDER, REPLIES_FOLDER
from flexlora.federation.clients import ClientSpec
from flexlora.files import write_whole
from flexlora.foreign import read_json
from flexlora.text import is_plain_word

MOST_REPLIES = 10_000
"""Folders that are looked at in one call."""

_MOST_LIST_BYTES = 10_000_000


@dataclass(frozen=True)
class Reply:
    """A reply that belongs to the round.

    Attributes:
        folder: Where it lies.
        manifest: What it says of itself.
        digest: SHA-256 of the manifest.
    """

    folder: Path
    manifest: ReplyManifest
    digest: str


@dataclass(frozen=True)
class Refusal:
    """A reply that the round does not use.

    Attributes:
        folder: Where it lies.
        reason: Why, in one line.
        client: Whose it is; None where that is not known.
    """

    folder: Path
    reason: str
    client: str | None = None


@dataclass(frozen=True)
class FoundReplies:
    """The replies of a round.

    Attributes:
        usable: Client -> its reply.
        failed: Client -> a reply of its that belongs to the round and cannot be used.
        refused: All that is not used, those of ``failed`` included.
    """

    usable: Mapping[str, Reply]
    failed: Mapping[str, Reply]
    refused: Sequence[Refusal] = field(default=())

    def clients(self, run: ExchangeRun) -> list[ClientSpec]:
        """Return everybody whose reply belongs to the round, sorted by name."""
        return [
            ClientSpec(name, run.plans[reply.manifest.plan], reply.manifest.num_examples)
            for name, reply in sorted({**self.failed, **self.usable}.items())
        ]

    def engine(self, run: ExchangeRun) -> ExchangeFolderEngine:
        """Return the engine that takes the round's updates from these folders."""
        reasons = {refusal.client: refusal.reason for refusal in self.refused}
        folders = {name: (reply.folder, reply.manifest) for name, reply in self.usable.items()}
        return ExchangeFolderEngine(folders, {name: reasons[name] for name in self.failed}, run.shapes)

    def listed(self) -> dict[str, Any]:
        """Return what the folder of the run keeps of these replies."""
        return {
            "used": {name: reply.digest for name, reply in sorted(self.usable.items())},
            "refused": [
                {"folder": one.folder.name, "client": one.client, "reason": one.reason} for one in self.refused
            ],
        }


def reply_folders(places: Iterable[Path]) -> list[Path]:
    """Return the folders of replies among ``places``: a place is a reply itself, or holds some.

    Raises:
        ExchangeError: If a place is no folder, or there are no replies at all, or too many.
    """
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            raise ExchangeError(f"replies must be folders; {place} is {'a file' if place.exists() else 'not there'}")
        inside = (
            [place] if (place / MANIFEST_FILE).exists() else sorted(path for path in place.iterdir() if path.is_dir())
        )
        found += [path for path in inside if not path.name.startswith(".")]
        if len(found) > MOST_REPLIES:
            raise ExchangeError(f"a round takes at most {MOST_REPLIES:,} replies; {place} brings more")
    if not any((path / MANIFEST_FILE).exists() for path in found):
        raise ExchangeError(f"a round needs replies, folders with a {MANIFEST_FILE}; those given hold none")
    return found


def find_replies(run: ExchangeRun, state: Any, server_round: int, folders: Sequence[Path]) -> FoundReplies:
    """Return which of the replies in ``folders`` the round can use, each of them read and checked to its last number.

    Args:
        run: The run.
        state: Of its method, as it was when the round's broadcasts were written.
        server_round: The round that the replies must be of.
        folders: Of replies, in any order.
    """
    refused: list[Refusal] = []
    belonging: dict[str, list[Reply]] = {}
    started = {plan: _digest(run.broadcasts(server_round) / plan / MANIFEST_FILE) for plan in run.plans}
    for folder in folders:
        try:
            manifest, content = read_manifest(folder, ReplyManifest)
            _check_belonging(run, server_round, manifest)
            _check_client(run, folder, manifest, content)
        except FlexLoraError as error:
            refused.append(Refusal(folder, reason_of(error)))
            continue
        reply = Reply(folder, manifest, hashlib.sha256(content).hexdigest())
        belonging.setdefault(manifest.client, []).append(reply)
    usable: dict[str, Reply] = {}
    failed: dict[str, Reply] = {}
    sent = {name: run.arrived(state, plan) for name, plan in run.plans.items()}
    for client, replies in sorted(belonging.items()):
        first = replies[0]
        try:
            refused += _surplus(client, replies)
            if first.manifest.started_from != started[first.manifest.plan]:
                raise ExchangeError(
                    f"{client} must have trained from what round {server_round} sent to {first.manifest.plan}; it "
                    "names another broadcast"
                )
            engine = ExchangeFolderEngine({client: (first.folder, first.manifest)}, {}, run.shapes)
            engine.check(client, sent[first.manifest.plan], run.config.rounds.wire_dtype)
            usable[client] = first
        except MemoryError:
            raise
        except Exception as error:  # What damaged files make libraries raise cannot be listed.
            failed[client] = first
            refused += [Refusal(reply.folder, reason_of(error), client) for reply in replies]
    return FoundReplies(usable, failed, tuple(refused))


def write_list(run: ExchangeRun, server_round: int, found: FoundReplies) -> None:
    """Write which replies a round uses, before it does."""
    path = _list_file(run, server_round)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(found.listed(), indent=1) + "\n")


def was_used(run: ExchangeRun, server_round: int, folders: Sequence[Path]) -> bool:
    """Return whether a round that is over has used these replies, and none is of a later round."""
    path = _list_file(run, server_round)
    if not path.is_file():
        return False
    listed = read_json(path.read_bytes()[:_MOST_LIST_BYTES], path)
    used = listed.get("used") if isinstance(listed, dict) else None
    found: dict[str, str] = {}
    for folder in folders:
        try:
            manifest, content = read_manifest(folder, ReplyManifest)
        except FlexLoraError:
            continue
        if manifest.run_id == run.record.run_id and manifest.server_round > server_round:
            return False
        if manifest.run_id == run.record.run_id and manifest.server_round == server_round:
            digest = hashlib.sha256(content).hexdigest()
            found[manifest.client] = digest if found.get(manifest.client, digest) == digest else ""
    known = used if isinstance(used, dict) else {}
    return bool(found) and known.items() <= found.items()


def _check_belonging(run: ExchangeRun, server_round: int, manifest: ReplyManifest) -> None:
    """Raise unless a reply is one of this run, base and round."""
    record = run.record
    if manifest.run_id != record.run_id:
        raise ExchangeError(f"it belongs to another run, {manifest.run_id}; this one is {record.run_id}")
    if manifest.server_round != server_round:
        late = "came too late" if manifest.server_round < server_round else "is of a round that has not begun"
        raise ExchangeError(
            f"it must be a reply of round {server_round}; it is of round {manifest.server_round} and {late}"
        )
    if manifest.base_sha256 != record.base_sha256:
        raise ExchangeError("it was trained on another base model: the SHA-256 of the weights differ")
    if manifest.config_sha256 != record.config_sha256:
        raise ExchangeError("it was trained under another configuration than that of this run")


def _check_client(run: ExchangeRun, folder: Path, manifest: ReplyManifest, content: bytes) -> None:
    """Raise unless a reply names a client, its rank plan, and is signed where signatures are asked for."""
    if not is_plain_word(manifest.client):
        raise ExchangeError(f"the name of a client must be one word; it says {manifest.client!r:.120}")
    keys = run.folder / KEYS_FOLDER
    if keys.is_dir():
        key = keys / f"{manifest.client}{PUBLIC_SUFFIX}"
        if not key.is_file():
            raise ExchangeError(
                f"replies must be signed by a client whose key is in {keys}; {manifest.client} has none"
            )
        check_signature(folder, content, key)
    if manifest.plan not in run.plans:
        raise ExchangeError(
            f"the rank plan must be one that was offered, {', '.join(run.plans)}; it says {manifest.plan!r:.120}"
        )


def _surplus(client: str, replies: Sequence[Reply]) -> list[Refusal]:
    """Return the copies of a client's first reply.

    Raises:
        ExchangeError: If two of its replies differ.
    """
    if len({reply.digest for reply in replies}) > 1:
        raise ExchangeError(
            f"{client} must reply once; {len(replies)} different replies have its name, and nobody can tell which "
            "counts: give one of them"
        )
    return [Refusal(reply.folder, f"the same reply of {client} twice; it counts once", client) for reply in replies[1:]]


def _list_file(run: ExchangeRun, server_round: int) -> Path:
    return run.folder / REPLIES_FOLDER / f"round-{server_round:04d}.json"


def _digest(path: Path) -> str:
    read_manifest(path.parent, BroadcastManifest)
    return hashlib.sha256(path.read_bytes()).hexdigest()
