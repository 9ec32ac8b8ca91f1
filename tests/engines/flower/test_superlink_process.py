"""The guard before Flower's server: who knows the secret, and when clients are let in."""

import asyncio
from typing import Any

import pytest

from flexlora.engines.flower.superlink_process import MOST_BODY_BYTES, SECRET_HEADER, Guard


def status_of(guard: Guard, path: str, secret: str | None = None, number: int = 1) -> int:
    """Return the status of a request, 200 if it reached the application behind the guard."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    headers = [] if secret is None else [(SECRET_HEADER.encode(), secret.encode())] * number
    asyncio.run(guard({"type": "http", "path": path, "headers": headers}, receive, send))
    return sent[0]["status"]


def guarded(*, is_open: bool) -> Guard:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    return Guard(app, "secret", is_open)


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task"])
def test_control_answers_only_who_knows_the_secret(path: str) -> None:
    guard = guarded(is_open=True)
    assert status_of(guard, path) == 403
    assert status_of(guard, path, "Secret") == 403
    assert status_of(guard, path, "secret", number=2) == 403
    assert status_of(guard, path, "secret") == 200


def test_clients_are_let_in_once_a_run_has_been_started() -> None:
    guard = guarded(is_open=False)
    assert status_of(guard, "/health") == 200
    assert status_of(guard, "/v1/fleet/activate-node") == 503
    assert status_of(guard, "/v1/control/start-run", "wrong") == 403
    assert status_of(guard, "/v1/fleet/activate-node") == 503
    assert status_of(guard, "/v1/control/start-run", "secret") == 200
    assert status_of(guard, "/v1/fleet/activate-node") == 200


def test_a_server_that_is_started_again_lets_clients_in_at_once() -> None:
    assert status_of(guarded(is_open=True), "/v1/fleet/pull-messages") == 200


def test_a_request_that_is_too_long_is_not_read() -> None:
    """Neither one that says so, nor one that goes on; the application keeps at most what is allowed."""
    read, sent = [0], list[Any]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            read[0] += len(message["body"])
        await send({"type": "left"})

    async def receive() -> Any:
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    guard, path = Guard(app, "secret", True), "/v1/fleet/push-object"
    length = [(b"content-length", str(MOST_BODY_BYTES + 1).encode())]
    asyncio.run(guard({"type": "http", "path": path, "headers": length}, receive, send))
    assert sent[0]["status"] == 413 and not read[0]
    asyncio.run(guard({"type": "http", "path": path, "headers": []}, receive, send))
    assert sent[-1]["type"] == "left" and 0 < read[0] <= MOST_BODY_BYTES
