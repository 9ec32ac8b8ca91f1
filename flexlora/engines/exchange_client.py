"""Takes part in a round as one client that has nothing but a folder from the server: checks it, trains, and replies."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexlora.data.data_files import owner_of
from flexlora.engines.exchange_folder import read_broadcast, write_reply
from flexlora.engines.exchange_keys import check_signature, private_key
from flexlora.engines.exchange_manifest import (
    MANIFEST_FILE,
    MOST_LOSS,
    BroadcastManifest,
    ExchangeError,
    ReplyManifest,
    read_manifest_file,
)
from flexlora.engines.flower.client_settings import ClientSettings
from flexlora.engines.flower.client_work import ClientWork
from flexlora.engines.flower.envelope import Envelope, from_bytes, to_bytes
from flexlora.federation.clients import RankPlan
from flexlora.federation.messages import Broadcast, Update
from flexlora.text import is_plain_word
from flexlora.training.one_client import TrainClient
from flexlora.uplink.wire import decode_update, encode_broadcast


@dataclass(frozen=True)
class OpenedBroadcast:
    """A broadcast as it lies in a folder, every file of which has been checked.

    Attributes:
        folder: Where it lies.
        manifest: What the server says of it.
        sent: What the client starts from.
        digest: SHA-256 of the manifest, which a reply names.
    """

    folder: Path
    manifest: BroadcastManifest
    sent: Broadcast
    digest: str

    def reply_manifest(self, client: str, num_examples: int, loss: float | None, steps: int | None) -> ReplyManifest:
        """Return what a client's reply says of itself, without scalings and files."""
        asked = self.manifest
        return ReplyManifest(
            run_id=asked.run_id,
            server_round=asked.server_round,
            base_sha256=asked.base_sha256,
            config_sha256=asked.config_sha256,
            plan=asked.plan,
            rank=asked.rank,
            scalings={},
            files={},
            client=checked_name(client),
            num_examples=num_examples,
            started_from=self.digest,
            loss=loss if loss is not None and 0 <= loss <= MOST_LOSS else None,
            steps=steps,
        )


def open_broadcast(folder: Path | str, rank: int | None = None, server_key: Path | None = None) -> OpenedBroadcast:
    """Return the broadcast in a folder, or that of one rank in a folder with those of a whole round.

    Args:
        folder: Of a broadcast, or with one for each rank.
        rank: The largest rank of the broadcast; None takes the only one there is.
        server_key: Public key of the server; None asks for no signature.

    Raises:
        ExchangeError: If there is none of this rank, or anything in it is not what its manifest says.
    """
    found = _of_rank(Path(folder), rank)
    if server_key is not None:
        check_signature(found, read_manifest_file(found, BroadcastManifest)[1], server_key)
    manifest, sent, digest = read_broadcast(found)
    if manifest.base_sha256 != manifest.run.base_sha256 or manifest.run_id != manifest.run.run_id:
        raise ExchangeError(f"{found}: a manifest must name one run and one base model; it names two: send it again")
    return OpenedBroadcast(found, manifest, sent, digest)


def train_reply(
    opened: OpenedBroadcast,
    own: ClientSettings,
    out: Path,
    key: Path | None = None,
    train_one: TrainClient | None = None,
) -> Update:
    """Train on a client's own data as a simulation of the same run would, write the reply and return the update.

    Args:
        opened: What the server sent.
        own: What the client's user has decided; ``plan`` is left to the broadcast.
        out: Folder of the reply; must not exist.
        key: The client's private key; None leaves the reply unsigned.
        train_one: Trains in place of the package's own loop.

    Raises:
        ExchangeError: If the client cannot train, with the reason, or there is a folder ``out``.
    """
    checked_name(own.client_id)
    check_new(out)
    if key is not None:
        private_key(key)
    manifest, sent = opened.manifest, opened.sent
    plan = RankPlan(manifest.plan, (("", manifest.rank),))
    fields = {
        "run": manifest.run.model_dump(mode="json"),
        "client_id": own.client_id,
        "server_round": manifest.server_round,
        "learning_rate": manifest.learning_rate,
    }
    work = ClientWork(replace(own, plan=plan), train_one=train_one)
    request = Envelope("train", fields, encode_broadcast(sent, manifest.run.wire_dtype))
    reply = from_bytes(work.answer(to_bytes(request)))
    if reply.kind != "update":
        raise ExchangeError(f"{own.client_id} could not train: {reply.text('reason')}")
    metrics = reply.fields["metrics"]
    update = decode_update(reply.payload, Update(own.client_id, {}, float(reply.whole("num_examples")), metrics), sent)
    steps = None if "steps" not in metrics else int(metrics["steps"])
    told = opened.reply_manifest(own.client_id, reply.whole("num_examples"), metrics.get("loss"), steps)
    write_reply(out, update, told, manifest, key)
    return update


def name_from(data: Path | str) -> str:
    """Return what a client is called that gave no name: the name of its file or folder, without endings."""
    path = Path(data).expanduser()
    name = path.name if path.is_dir() else owner_of(path, path.parent)
    if not is_plain_word(name):
        raise ExchangeError(f"a client needs a name of one word; {path.name!r} gives {name!r}: name it with --name")
    return name


def checked_name(name: str) -> str:
    """Return a client's name.

    Raises:
        ExchangeError: If it is not one word of at most 100 characters.
    """
    if not is_plain_word(name):
        raise ExchangeError(
            "a client's name must be one word of at most 100 letters, digits and . _ - + @, beginning with a letter or "
            f"digit; got {name!r:.120}"
        )
    return name


def check_new(folder: Path) -> None:
    """Raise unless a folder to write is new.

    Raises:
        ExchangeError: If something has its name.
    """
    if folder.is_symlink() or folder.exists():
        raise ExchangeError(f"the folder to write must not exist yet; {folder} does")


def _of_rank(folder: Path, rank: int | None) -> Path:
    """Return the folder of one broadcast."""
    if (folder / MANIFEST_FILE).is_file() or not folder.is_dir():
        places: Sequence[Path] = [folder]
    else:
        places = sorted(path for path in folder.iterdir() if (path / MANIFEST_FILE).is_file())
    ranks = {place: read_manifest_file(place, BroadcastManifest)[0].rank for place in places}
    fitting = [place for place, own in ranks.items() if rank is None or own == rank]
    if len(fitting) == 1:
        return fitting[0]
    offered = ", ".join(f"{place.name} (rank {own})" for place, own in ranks.items()) or "none"
    if not fitting:
        raise ExchangeError(f"there must be a broadcast of rank {rank} in {folder}; it has {offered}")
    raise ExchangeError(f"{folder} has more than one broadcast that fits, {offered}; name the folder of one, or --rank")
