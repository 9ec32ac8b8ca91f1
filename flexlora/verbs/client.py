"""The verb ``client``: trains for a server on the data of this machine, which never leaves it."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexlora.errors import FlexLoraError
from flexlora.progress import stage
from flexlora.verbs.extras import need_flower
from flexlora.verbs.leaving import ended_by_sigterm, interruptible
from flexlora.verbs.terminal import err

if TYPE_CHECKING:
    from flexlora.engines.flower.client_loop import News
    from flexlora.experiment.client_order import ClientSetup

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def client(
    server: Annotated[str | None, typer.Option("--server", help="Where the server is, as HOST:PORT.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="File or folder with the rows to train on; they stay here.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of this client in the federation; that of its key or data if left out."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="LoRA rank of every module; the device decides if left out.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Memory that ranks are chosen for, as 8GiB; what is free if left out."),
    ] = None,
    round_seconds: Annotated[
        float | None,
        typer.Option("--round-seconds", help="Most seconds of training a round that ranks are chosen for."),
    ] = None,
    certificates: Annotated[
        Path | None, typer.Option("--certificates", help="Folder with ca.pem and NAME.key, instead of --ca and --key.")
    ] = None,
    ca: Annotated[Path | None, typer.Option("--ca", help="Certificate of the authority: ca.pem of the server.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="Private key of this client: NAME.key.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Connect without TLS and without a key; on this machine only.")
    ] = False,
    model: Annotated[
        str, typer.Option("--model", help="Base model: hub id, local folder, GGUF file, or embedded.")
    ] = "embedded",
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")] = None,
    device: Annotated[str, typer.Option("--device", help="Where to train: auto, cpu, cuda, cuda:N or mps.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads of training.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for its log and its state; runs/clients/NAME if left out.")
    ] = None,
    wait: Annotated[
        float, typer.Option("--wait", help="Seconds to try to reach a server that does not answer, without --stay.")
    ] = 300,
    stays: Annotated[
        bool, typer.Option("--stay", help="Wait for the next run when one is over, and for its server.")
    ] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="Join flexlora server --demo on this machine, with made-up data.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:
    """Train for a server on the rows of this machine, at the rank that its device affords."""
    need_flower()
    from flexlora.experiment.client_order import ClientRequest, client_setup
    from flexlora.experiment.deployment_file import DEMO_FOLDER, wait_for_deployment

    if demo:
        with stage(err, "Waiting for flexlora server --demo on this machine", hidden=quiet):
            wait_for_deployment(DEMO_FOLDER, wait)
    setup = client_setup(
        ClientRequest(
            server=server,
            data=data,
            name=name,
            rank=rank,
            memory_bytes=None if memory is None else memory_in_bytes(memory),
            round_seconds=round_seconds,
            certificates=certificates,
            authority=ca,
            key=key,
            insecure=insecure,
            model=model,
            revision=revision,
            device=device,
            num_threads=threads,
            folder=folder,
            demo=demo,
        )
    )
    with (
        ended_by_sigterm(),
        interruptible("the server goes on without this client, which can join again"),
        _screen(setup, quiet) as screen,
    ):
        from flexlora.engines.flower.children import make_quiet

        make_quiet()
        # Only here: Flower takes a second to import, and a mistake is told before.
        from flexlora.experiment.client_run import run_client

        run_client(setup, screen, wait_seconds=wait, stays=stays)


def _screen(setup: "ClientSetup", quiet: bool) -> "AbstractContextManager[Callable[[News], None]]":
    if quiet:
        return nullcontext(lambda news: None)
    from flexlora.experiment.client_screen import ClientScreen

    return ClientScreen(err, setup)


def memory_in_bytes(text: str) -> int | None:
    """Return the bytes that ``8GiB`` or ``500 MB`` stand for, None for ``auto``.

    Raises:
        FlexLoraError: If the text is none of these.
    """
    if text.strip().lower() == "auto":
        return None
    found = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([kmgt]i?b)\s*", text.lower())
    size = 0 if found is None else int(float(found[1]) * UNITS[found[2]])
    if size <= 0:
        raise FlexLoraError(f"--memory must be a number above 0 with a unit, as 8GiB or 500MB, or auto; got {text!r}")
    return size
