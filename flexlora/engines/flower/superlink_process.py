"""Runs a SuperLink, Flower's server process, on a socket that is bound already; ends with the process that started it.

Started as ``python -m flexlora.engines.flower.superlink_process SOCKET PARENT``: an inherited file descriptor, and the
number of the process that started it. What it needs to know comes as one line of JSON over stdin, for it holds secrets:
``LinkSettings`` as a mapping.

Flower serves three interfaces on one port: Fleet for clients, Control and Runtime for whoever starts runs. Without
accounts, which are not in its open version, everybody who reaches the port can register nodes and start runs through
Control. So here, Control answers only who knows the secret of this deployment, and so does the one call of Runtime that
needs no token of a run. Clients are asked to come back later until the first run is started: the keys of clients are
registered before it.
"""

import hmac
import json
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from flexlora.orphans import end_with_parent

SECRET_HEADER = "x-flexlora-control"

MOST_BODY_BYTES = 1 << 26
"""The longest request that is read, which happens before its sender is known; factors come in pieces of 5 MB."""

_GUARDED = ("/v1/control/", "/v1/runtime/acquire-task", "/docs", "/openapi.json")
_FOR_CLIENTS, _OPENING = "/v1/fleet/", "/v1/control/start-run"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class LinkSettings:
    """What a SuperLink is started with.

    Attributes:
        database: File that its state is in, so that it survives a kill.
        control_secret: What requests to Control must carry.
        authority: Certificate that clients trust; None serves without TLS and lets every client in.
        certificate: Of the server.
        key: Of the server.
        is_open: Whether clients are let in at once.
    """

    database: str
    control_secret: str
    authority: str | None = None
    certificate: str | None = None
    key: str | None = None
    is_open: bool = False


class Guard:
    """An ASGI application that lets requests to Control through only if they carry the secret."""

    def __init__(self, app: App, secret: str, is_open: bool) -> None:
        """Guard ``app``."""
        self._app, self._secret, self._is_open = app, secret.encode(), is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        path = scope["path"] if scope["type"] == "http" else ""
        if path.startswith(_GUARDED) and not self._knows_secret(scope):
            await _refuse(send, 403, b"Runs of this server are started by flexlora alone.\n")
        elif path.startswith(_FOR_CLIENTS) and not self._is_open:
            await _refuse(send, 503, b"The server is starting.\n")
        elif _length(scope) > MOST_BODY_BYTES:
            await _refuse(send, 413, b"The request is too long.\n")
        else:
            await self._app(scope, _bounded(receive), send)
            self._is_open = self._is_open or path == _OPENING

    def _knows_secret(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == SECRET_HEADER.encode()]
        return len(given) == 1 and hmac.compare_digest(given[0], self._secret)


def _length(scope: Scope) -> int:
    """Return the length of its body that a request announces, 0 if it announces none."""
    told = [value for name, value in scope.get("headers", ()) if name == b"content-length"]
    return int(told[0]) if told and told[0].isdigit() else 0


def _bounded(receive: Receive) -> Receive:
    """Return ``receive`` that ends a request whose body goes on for too long, as if its sender had left."""
    num_bytes = 0

    async def receive_some() -> MutableMapping[str, Any]:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        return {"type": "http.disconnect"} if num_bytes > MOST_BODY_BYTES else message

    return receive_some


async def _refuse(send: Send, status: int, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """Serve until this process is ended."""
    end_with_parent(int(sys.argv[2]))
    settings = LinkSettings(**json.loads(sys.stdin.readline()))
    listening = socket.socket(fileno=int(sys.argv[1]))
    import uvicorn

    uvicorn.Server(
        uvicorn.Config(
            Guard(_flower_app(settings), settings.control_secret, settings.is_open),
            access_log=False,
            ws="none",
            # The address of a client is that of its connection: nobody stands before this server.
            proxy_headers=False,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.key,
        )
    ).run(sockets=[listening])


def _flower_app(settings: LinkSettings) -> App:
    """Return Flower's own application: no process of its own, no second port."""
    from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app

    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="",
        port=0,
        insecure=settings.authority is None,
        certificates=None,
        superexec_auth_secret=None,
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=settings.authority is not None,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=settings.authority,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
        database=settings.database,
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


if __name__ == "__main__":
    main()
