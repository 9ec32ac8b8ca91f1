"""Checks what the user of a client asks for, and turns it into what its processes need, before anything heavy loads."""

import os
import re
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from flexlora.data.data_files import kind_of
from flexlora.engines.flower.certificates import CLIENT_FOLDER, check_client_name, make_client_key, read_private_key
from flexlora.errors import FlexLoraError
from flexlora.experiment.client_process import ClientOrder
from flexlora.experiment.demo_data import write_client_rows
from flexlora.experiment.deployment_file import DEMO_FOLDER, DeploymentFile, running_deployment

CLIENTS_FOLDER = Path("runs/clients")


class ClientRequestError(FlexLoraError, ValueError):
    """Something that a client cannot be started with."""


@dataclass(frozen=True)
class ClientRequest:
    """What the user of a client typed; see the verb ``client``."""

    server: str | None
    data: Path | None
    name: str | None = None
    rank: int | None = None
    memory_bytes: int | None = None
    round_seconds: float | None = None
    certificates: Path | None = None
    authority: Path | None = None
    key: Path | None = None
    insecure: bool = False
    model: str = "embedded"
    revision: str | None = None
    device: str = "auto"
    num_threads: int | None = None
    folder: Path | None = None
    demo: bool = False


@dataclass(frozen=True)
class ClientSetup:
    """What a client is started with.

    Attributes:
        order: For the process that trains.
        server: HOST:PORT.
        authority: Certificate that the server's must be signed by; None connects without TLS.
        key: File that this client proves itself with; None without TLS.
        folder: Of its log and state.
    """

    order: ClientOrder
    server: str
    authority: Path | None
    key: Path | None
    folder: Path


def client_setup(request: ClientRequest) -> ClientSetup:
    """Return what a client is started with.

    Raises:
        FlexLoraError: Saying what is missing or wrong, and how to put it right.
    """
    _check_numbers(request)
    if request.demo:
        request = _joining_demo(request)
    if request.server is None or request.data is None:
        lacking = "--server HOST:PORT" if request.server is None else "--data FILE_OR_FOLDER"
        raise ClientRequestError(f"a client needs {lacking}; or join a demo on this machine: flexlora client --demo")
    _check_address(request.server, request.insecure)
    data = request.data.expanduser()
    if not data.exists():
        raise ClientRequestError(f"--data must be a file or folder with rows to train on; there is none at {data}")
    authority, key = _proofs(request)
    name = request.name or (kind_of(data).stem if key is None else key.stem)
    check_client_name(name)
    if key is not None:
        read_private_key(key)
    order = ClientOrder(
        client_id=name,
        data=str(data.absolute()),
        rank=request.rank,
        model=request.model,
        revision=request.revision,
        device=request.device,
        num_threads=request.num_threads,
        memory_bytes=request.memory_bytes,
        round_seconds=request.round_seconds,
    )
    return ClientSetup(order, request.server, authority, key, request.folder or CLIENTS_FOLDER / name)


def _check_numbers(request: ClientRequest) -> None:
    if request.rank is not None and request.rank < 1:
        raise ClientRequestError(f"--rank must be at least 1; got {request.rank}")
    if request.rank is not None and (request.memory_bytes is not None or request.round_seconds is not None):
        raise ClientRequestError(
            "--rank decides the rank, --memory and --round-seconds let it be chosen; leave one out"
        )
    if request.round_seconds is not None and not 0 < request.round_seconds < float("inf"):
        raise ClientRequestError(f"--round-seconds must be a number above 0; got {request.round_seconds}")
    if request.num_threads is not None and request.num_threads < 1:
        raise ClientRequestError(f"--threads must be at least 1; got {request.num_threads}")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", request.device):
        raise ClientRequestError(f"--device must be auto, cpu, cuda, cuda:N or mps; got {request.device!r}")


def _check_address(server: str, insecure: bool) -> None:
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise ClientRequestError(f"--server must be HOST:PORT, as fed.example.org:9440; got {server!r}")
    if insecure and host.strip("[]") not in ("localhost", "127.0.0.1", "::1"):
        raise ClientRequestError(
            f"--insecure sends factors in the clear and lets anybody answer, so it is for this machine only; {host} is "
            "another: use --ca and --key"
        )


def _proofs(request: ClientRequest) -> tuple[Path | None, Path | None]:
    """Return the authority's certificate and the key of a client, both None without TLS."""
    if request.insecure:
        if request.authority or request.key or request.certificates:
            raise ClientRequestError("--insecure uses no certificates; leave --ca, --key and --certificates out")
        return None, None
    authority, key, folder = request.authority, request.key, request.certificates
    if folder is not None:
        authority = authority or folder / "ca.pem"
        key = key or _key_in(folder, request.name)
    if authority is None or key is None:
        raise ClientRequestError(
            f"a client needs {'--ca ca.pem' if authority is None else '--key NAME.key'}, which the owner of the server "
            "makes by: flexlora certificates --client NAME; for a server of this machine without TLS: --insecure"
        )
    if not authority.is_file():
        raise ClientRequestError(f"--ca must be the certificate ca.pem of the server; there is none at {authority}")
    return authority, key


def _key_in(folder: Path, name: str | None) -> Path:
    """Return the key of a client in a folder of certificates, that of ``name`` or the only one."""
    own = (path for path in folder.glob("*.key") if path.name not in ("ca.key", "server.key"))
    keys = sorted({*own, *(folder / CLIENT_FOLDER).glob("*.key")})
    if name is not None:
        keys = [path for path in keys if path.stem == name]
    if len(keys) != 1:
        found = f"{folder} has {len(keys)}" + (f": {', '.join(path.stem for path in keys[:5])}" if keys else "")
        raise ClientRequestError(f"a client needs one key; {found}. Choose one by --name, or by --key FILE")
    return keys[0]


def _joining_demo(request: ClientRequest) -> ClientRequest:
    """Return the request with what the demo on this machine needs filled in."""
    deployment: DeploymentFile = running_deployment(DEMO_FOLDER)
    certificates = deployment.certificates
    name = request.name or f"{socket.gethostname().partition('.')[0][:20] or 'client'}-{os.getpid()}"
    check_client_name(name)
    data = request.data
    if data is None:
        data = write_client_rows(CLIENTS_FOLDER / name / "rows.jsonl", name)
    key = None
    if certificates is not None:
        key = Path(certificates) / CLIENT_FOLDER / f"{name}.key"
        if not key.exists():
            make_client_key(key)
    return replace(
        request,
        server=request.server or deployment.address,
        data=data,
        name=name,
        authority=None if certificates is None else Path(certificates) / "ca.pem",
        key=key,
        insecure=certificates is None,
    )
