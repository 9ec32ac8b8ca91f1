"""Opens a run on a SuperLink for this process, which then talks to all clients through Flower's ``Grid``.

Flower starts a new process for a ServerApp, from an app that is uploaded first. Here the process that the user started
takes the place of that one: it can show progress, it ends with the exit code of the run, and nothing is unpacked.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from flexlora.engines.flower.certificates import CertificateError, Certificates
from flexlora.engines.flower.children import reach_directly
from flexlora.engines.flower.prompt_grid import PromptGrid
from flexlora.engines.flower.superlink import LinkError, SuperLink
from flexlora.engines.flower.superlink_process import SECRET_HEADER

_SECONDS_BETWEEN_HEARTBEATS = 5.0
_SECONDS_BETWEEN_KEY_LOOKS = 0.5
_SECONDS_BETWEEN_LINK_LOOKS = 0.5
_SECONDS_FOR_A_TASK = 15.0
_SECONDS_TO_LEAVE = 6.0

_log = logging.getLogger(__name__)

# What a stock SuperNode that connects is told to run for messages of this run. The ServerApp is the process that opens
# the run, so nobody loads the one that has to be named here.
_APP = """\
[project]
name = "flexlora"
version = "1.0.0"
description = "Federated fine-tuning across clients of different LoRA ranks"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "flexlora"

[tool.flwr.app.components]
serverapp = "flexlora.flower:server_app"
clientapp = "flexlora.engines.flower.client_app:app"

[tool.flwr.app.config]
"""


@contextmanager
def open_run(link: SuperLink) -> Iterator[Grid]:
    """Open a run for a ``with`` block, and register the keys of clients as they appear.

    If the block ends without an error, the run is over for the clients too, which have some seconds to leave. If it
    raises, they wait for the server to come back.

    Args:
        link: Ready to answer.

    Raises:
        LinkError: If the SuperLink refuses it.
    """
    reach_directly(link.local_host)
    control_retry = make_simple_http_retry_invoker()
    control = ControlHttpClient.from_server_address(
        link.address,
        link.certificates is None,
        link.authority,
        [RuntimeVersionHttpInterceptor("flwr"), _Secret(link.control_secret)],
        retry_invoker=control_retry,
    )
    over = threading.Event()
    with control:
        known: set[str] = set()
        if link.certificates is not None:
            register_keys(control, link.certificates, known)
        grid = PromptGrid(link.address, link.certificates is None, link.authority, token=_task_token(link, control))
        retries = (control_retry, grid._retry_invoker)
        for one in retries:
            without_interrupts(one)
        is_done = threading.Event()
        beating = threading.Thread(target=_beat, args=(grid, is_done), daemon=True)
        threads = [
            beating,
            threading.Thread(target=_watch_link, args=(link, retries, over), daemon=True),
        ]
        if link.certificates is not None:
            grid.name_of_key = partial(_name_of_key, control)
            arguments = (control, link.certificates, known, over)
            threads.append(threading.Thread(target=_keep_registering, args=arguments, daemon=True))
        try:
            task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
            grid.set_run(run_from_proto(task.run))
            # Flower writes these into messages.
            TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
            TaskIdentity.node_id = task.context.node_id
            for thread in threads:
                thread.start()
            try:
                yield grid
            except httpx.TransportError as error:
                if link.has_ended:
                    raise LinkError(
                        f"the SuperLink ended again and again; --resume continues the run. It said: {link.last_words()}"
                    ) from error
                raise
            # The token ends with the task: a heartbeat that came after it would be refused.
            is_done.set()
            beating.join()
            # The server process may be gone; what the run came to is in its records.
            grid._retry_invoker.max_tries = 1
            with suppress(httpx.HTTPError):
                grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details=""))
                _wait_until_left(control)
        finally:
            is_done.set()
            over.set()
            _give_up(retries)
            for thread in threads:
                if thread.is_alive():
                    thread.join()
            grid.close()


def without_interrupts(invoker: RetryInvoker) -> None:
    """Have a request that is refused as unauthorized fail; Flower would send this process an interruption instead."""
    before = invoker.should_giveup

    def should_give_up(error: Exception) -> bool:
        """Return whether to raise an error instead of trying again."""
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
            return True
        return before is not None and before(error)

    invoker.should_giveup = should_give_up


def register_keys(control: ControlHttpClient, certificates: Certificates, known: set[str]) -> list[str]:
    """Let the clients in whose public keys are in the folder and not in ``known``, and return their names.

    Raises:
        CertificateError: If a file is no public key; the others are let in before.
        LinkError: If the SuperLink refuses a key.
    """
    new, wrong = [], None
    for path in certificates.public_keys():
        if path.stem in known:
            continue
        try:
            key = certificates.read_public_key(path)
        except CertificateError as error:
            # It must not keep the clients out whose files come after it.
            wrong = wrong or error
            continue
        try:
            control.RegisterNode(RegisterNodeRequest(public_key=public_key_to_bytes(key), name=path.stem))
        except httpx.HTTPStatusError as error:
            if "already in use" not in error.response.text:
                raise LinkError(f"the SuperLink refused the key {path}: {error.response.text[:300]}") from error
        known.add(path.stem)
        new.append(path.stem)
    if wrong is not None:
        raise wrong
    return new


class _Secret:
    """Adds the secret of a deployment to requests to Control."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send a request with the secret."""
        add_headers(context.request, {SECRET_HEADER: self._secret})
        return call_next(context)


def _task_token(link: SuperLink, control: ControlHttpClient) -> str:
    """Start a run and return the token of its task, as the process that Flower would start has it."""
    content, _ = build_fab_from_files({"pyproject.toml": _APP.encode()})
    try:
        started = control.StartRun(StartRunRequest(fab=fab_to_proto(Fab("", content, {}))))
    except httpx.HTTPStatusError as error:
        raise LinkError(f"the SuperLink refused the run: {error.response.text[:300]}") from error
    retry = make_simple_http_retry_invoker()
    without_interrupts(retry)
    runtime = RuntimeHttpClient.from_server_address(
        link.address,
        link.certificates is None,
        link.authority,
        [RuntimeVersionHttpInterceptor("SuperExec"), _Secret(link.control_secret)],
        retry_invoker=retry,
    )
    until = time.monotonic() + _SECONDS_FOR_A_TASK
    with runtime:
        while time.monotonic() < until:
            answer = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if answer.token and answer.task.run_id == started.run_id:
                return answer.token
            time.sleep(0.05)
    raise LinkError("the SuperLink accepted the run and offers no task for it; its log says more")


def _name_of_key(control: ControlHttpClient, node_id: int) -> str | None:
    """Return the name under which the key of a node was registered; None if there is no such node."""
    nodes = control.ListNodes(ListNodesRequest()).nodes_info
    return next((node.name for node in nodes if node.node_id == node_id), None)


def _wait_until_left(control: ControlHttpClient) -> None:
    """Wait until no client is connected any more, for some seconds."""
    until = time.monotonic() + _SECONDS_TO_LEAVE
    while time.monotonic() < until:
        nodes = control.ListNodes(ListNodesRequest()).nodes_info
        if not any(node.status == NodeStatus.ONLINE for node in nodes):
            return
        time.sleep(0.2)


def _beat(grid: PromptGrid, over: threading.Event) -> None:
    """Tell the SuperLink that the run is alive; one that is started again takes it up where it was."""
    while not over.wait(_SECONDS_BETWEEN_HEARTBEATS):
        with suppress(httpx.HTTPError):
            grid._runtime_client.SendTaskHeartbeat(SendTaskHeartbeatRequest())


def _watch_link(link: SuperLink, retries: Sequence[RetryInvoker], over: threading.Event) -> None:
    """Have requests fail once nobody will answer them any more; they are tried again for ever until then."""
    while not over.wait(_SECONDS_BETWEEN_LINK_LOOKS):
        if link.has_ended:
            _give_up(retries)


def _give_up(retries: Sequence[RetryInvoker]) -> None:
    for one in retries:
        one.max_time = 0.0


def _keep_registering(
    control: ControlHttpClient, certificates: Certificates, known: set[str], over: threading.Event
) -> None:
    """Register keys that appear in the folder while the server runs."""
    last = told = ""
    while not over.wait(_SECONDS_BETWEEN_KEY_LOOKS):
        try:
            register_keys(control, certificates, known)
        except httpx.HTTPError:
            continue
        except (LinkError, CertificateError) as error:
            # A file that is being copied is whole the next time. What stays wrong is told once.
            if str(error) == last != told:
                _log.warning("A client cannot be let in: %s", error)
                told = last
            last = str(error)
