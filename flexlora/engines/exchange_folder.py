"""Writes broadcasts and updates as folders of files, and takes the updates of a round from such folders.

Each folder is a PEFT adapter that PEFT itself loads. Factors are those that a round's bytes would carry, in the same
type. Where scalings are no whole ``lora_alpha`` over the rank, the PEFT folder holds the same change in float32 under
one that is, and the manifest says which scalings come back.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from flexlora.adapters.folder import open_adapter
from flexlora.adapters.laid_out import common_alpha
from flexlora.adapters.peft_format import WEIGHTS_FILE
from flexlora.adapters.write import write_adapter
from flexlora.engines.base import RoundOrder
from flexlora.engines.exchange_keys import sign
from flexlora.engines.exchange_manifest import (
    FROZEN_FOLDER,
    MANIFEST_FILE,
    BroadcastManifest,
    ExchangeError,
    Manifest,
    ReplyManifest,
    check_files,
    facts_of,
    manifest_text,
    read_manifest_file,
    write_text,
)
from flexlora.engines.simulation import reason_of
from flexlora.federation.known_rows import known_rows
from flexlora.federation.message_checks import check_update
from flexlora.federation.messages import Broadcast, ClientFailure, Update
from flexlora.files import appearing_whole
from flexlora.lora.factors import AdapterState, LoraFactors
from flexlora.uplink.wire import WireDtype, received_update

SLACK_BYTES = 1_000_000
"""Room for the header of a file of weights beside the factors."""

_MOST_BYTES_PER_VALUE = 4

TRAINABLE, FROZEN = "trainable", "frozen"


def why_not_files(broadcast: Broadcast) -> str | None:
    """Return what of a broadcast cannot travel as PEFT adapters in one phase, None if all of it can."""
    if broadcast.cores is not None:
        return "its clients train cores between the factors, for which PEFT folders have no place"
    if broadcast.mask is not None:
        return "its clients train chosen entries of whole matrices, which are no low-rank adapter"
    if broadcast.kept is not None:
        return "its clients keep a factor between rounds, and a file-based client keeps nothing"
    if broadcast.tail_penalty is not None:
        return "it adds a penalty to the loss of its clients, of which no adapter tells"
    return None


def write_broadcast(folder: Path, broadcast: Broadcast, manifest: BroadcastManifest, key: Path | None = None) -> None:
    """Write a broadcast, whole or not at all.

    Args:
        folder: Must not exist.
        broadcast: As it arrives at a client, that is, in the type that travels.
        manifest: Without scalings and files, which are filled in.
        key: The server's private key; None leaves the folder unsigned.

    Raises:
        ExchangeError: If it cannot travel so (``why_not_files``).
    """
    if reason := why_not_files(broadcast):
        raise ExchangeError(f"this method cannot be used with folders of files: {reason}")
    branches = {TRAINABLE: broadcast.trainable} | ({} if broadcast.frozen is None else {FROZEN: broadcast.frozen})
    told = {"train_factors": broadcast.train_factors, "known_A": broadcast.known_A}
    _write(folder, branches, manifest.model_copy(update=told), manifest.run.wire_dtype, manifest.run.base_model, key)


def read_broadcast(folder: Path) -> tuple[BroadcastManifest, Broadcast, str]:
    """Return the manifest of a broadcast, the broadcast itself, and the SHA-256 of the manifest, all files checked.

    Raises:
        ExchangeError: If anything in the folder is not what the manifest says.
        AdapterError: If the adapter is none.
    """
    manifest, content = read_manifest_file(folder, BroadcastManifest)
    check_files(folder, manifest.files)
    dtype = manifest.run.wire_dtype
    trainable = _branch(folder, manifest, TRAINABLE, dtype)
    if manifest.known_A is not None:
        trainable = {
            path: LoraFactors(known_rows(manifest.known_A, path, own.rank, own.shape[1]), own.B, own.scaling)
            for path, own in trainable.items()
        }
    broadcast = Broadcast(
        trainable=trainable,
        frozen=_branch(folder, manifest, FROZEN, dtype) if FROZEN in manifest.scalings else None,
        train_factors=manifest.train_factors,
        known_A=manifest.known_A,
    )
    return manifest, broadcast, hashlib.sha256(content).hexdigest()


def write_reply(
    folder: Path, update: Update, manifest: ReplyManifest, asked: BroadcastManifest, key: Path | None = None
) -> None:
    """Write what a client returns to a broadcast, whole or not at all; other arguments as for ``write_broadcast``."""
    _write(folder, {TRAINABLE: update.payload}, manifest, asked.run.wire_dtype, asked.run.base_model, key)


def read_reply(folder: Path, manifest: ReplyManifest, sent: Broadcast, dtype: WireDtype) -> Update:
    """Return the update in a folder, every file of which is compared with its manifest first.

    Args:
        folder: From a client.
        manifest: What the folder says of itself.
        sent: What the client was sent.
        dtype: Of the factors on their way.

    Raises:
        ExchangeError: If a file is not what the manifest says, or larger than any answer to ``sent``.
        AdapterError: If the adapter is none, or holds NaN or infinity.
    """
    num_values = sum(own.A.numel() + own.B.numel() for own in sent.trainable.values())
    check_files(folder, manifest.files, num_values * _MOST_BYTES_PER_VALUE + SLACK_BYTES)
    if set(manifest.scalings) != {TRAINABLE}:
        raise ExchangeError(f"{folder}: a reply must hold the trained factors alone; got {sorted(manifest.scalings)}")
    for path, scaling in manifest.scalings[TRAINABLE].items():
        if path in sent.trainable and scaling != sent.trainable[path].scaling:
            raise ExchangeError(
                f"{path}: scaling must be {sent.trainable[path].scaling}, as it was sent; got {scaling}"
            )
    told = {"loss": manifest.loss, "steps": None if manifest.steps is None else float(manifest.steps)}
    update = Update(
        manifest.client,
        _branch(folder, manifest, TRAINABLE, dtype),
        float(manifest.num_examples),
        {name: value for name, value in told.items() if value is not None},
    )
    return received_update(update, sent, dtype)


@dataclass(frozen=True)
class ExchangeFolderEngine:
    """An engine whose clients have trained elsewhere: their updates lie in folders.

    Attributes:
        replies: Client id -> its folder and manifest.
        refused: Client id -> why its reply cannot be used.
        shapes: Module path -> (out_features, in_features).
    """

    replies: Mapping[str, tuple[Path, ReplyManifest]]
    refused: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]

    def train(self, order: RoundOrder) -> Iterator[Update | ClientFailure]:
        """Yield one outcome per client of the order's cohort, in cohort order."""
        for client in order.cohort:
            name = client.client_id
            if name in self.refused:
                yield ClientFailure(name, "validate", self.refused[name])
                continue
            try:
                folder, manifest = self.replies[name]
                parcel = order.parcel_of(client)
                yield read_reply(folder, manifest, parcel.arrived, order.wire_dtype)
            except Exception as error:
                yield ClientFailure(name, "validate", reason_of(error))

    def check(self, name: str, sent: Broadcast, dtype: WireDtype) -> None:
        """Raise unless a reply is one that the round can use; its factors are read, checked and dropped.

        Raises:
            FlexLoraError: Naming what is wrong with it.
        """
        folder, manifest = self.replies[name]
        check_update(read_reply(folder, manifest, sent, dtype), sent, self.shapes, dtype)


def _write(
    folder: Path,
    branches: Mapping[str, AdapterState],
    manifest: Manifest,
    dtype: WireDtype,
    base_model: str,
    key: Path | None,
) -> None:
    with appearing_whole(folder, replace=False) as partial:
        for branch, adapter in branches.items():
            if adapter:
                place = partial if branch == TRAINABLE else partial / FROZEN_FOLDER
                written = dtype if _is_written_as_it_is(adapter) else "float32"
                write_adapter(place, adapter, base_model, dtype=written, ranks="exact")
        scalings = {name: {path: own.scaling for path, own in adapter.items()} for name, adapter in branches.items()}
        whole = manifest.model_copy(update={"scalings": scalings, "files": facts_of(partial)})
        write_text(partial / MANIFEST_FILE, manifest_text(whole))
        if key is not None:
            sign(partial, key)


def _is_written_as_it_is(adapter: AdapterState) -> bool:
    """Return whether PEFT's one ``lora_alpha`` can say all scalings, so that factors stay as they are."""
    lora_alpha = common_alpha(adapter, {path: own.rank for path, own in adapter.items()})
    return all(lora_alpha / own.rank == own.scaling for own in adapter.values())


def _branch(folder: Path, manifest: Manifest, branch: str, dtype: WireDtype) -> dict[str, LoraFactors]:
    """Return an adapter of a folder with the scalings of the manifest, in the type that travels."""
    place, scalings = folder if branch == TRAINABLE else folder / FROZEN_FOLDER, manifest.scalings[branch]
    if not scalings:
        return {}
    if not (place / WEIGHTS_FILE).is_file():
        raise ExchangeError(f"{place} must hold an adapter, as the manifest says; it holds none")
    adapter: dict[str, LoraFactors] = {}
    with open_adapter(place) as found:
        if found.copies or sorted(found.modules) != sorted(scalings):
            raise ExchangeError(
                f"{place}: the adapter must have the {len(scalings)} modules of the manifest, no others"
            )
        for path in sorted(found.modules):
            factors, scaling = found.factors(path), scalings[path]
            if scaling > 0:
                factors = factors.with_balanced_scaling(scaling)
            adapter[path] = factors.to(getattr(torch, dtype))
    return adapter
