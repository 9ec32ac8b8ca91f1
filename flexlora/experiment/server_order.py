"""Checks what the user of a server asks for before anything heavy loads."""

from collections.abc import Sequence
from pathlib import Path

from flexlora.engines.flower.certificates import Certificates, make_certificates, names_in
from flexlora.engines.flower.superlink import SuperLink, is_loopback
from flexlora.errors import FlexLoraError
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import load_config
from flexlora.experiment.demo_data import write_server_rows
from flexlora.experiment.deployment_file import DEMO_FOLDER
from flexlora.experiment.run_folder import SERVER_FOLDER
from flexlora.experiment.starter import STARTER_FOLDER

ALL_ADDRESSES = ("0.0.0.0", "::")


class ServerRequestError(FlexLoraError, ValueError):
    """Something that a server cannot be started with."""


def server_config(
    config: Path | None, overrides: Sequence[str], folder: Path | None, demo: bool
) -> tuple[Config, Path]:
    """Return the configuration of a server and the folder of its run.

    Raises:
        FlexLoraError: If both or neither of ``config`` and ``demo`` are given, or the configuration is wrong.
    """
    if demo:
        # What looks like a configuration is a setting then.
        overrides = [*([str(config)] if config is not None else []), *overrides]
        if wrong := next((one for one in overrides if "=" not in one), None):
            raise ServerRequestError(f"--demo comes with its configuration; leave {wrong} out, or --demo")
        folder = folder or DEMO_FOLDER
        rows = write_server_rows(folder / SERVER_FOLDER / "rows.jsonl")
        own = [f"data.path={rows}", f"deployment.scored_on={rows}", *overrides]
        return load_config(STARTER_FOLDER / "federation.yaml", own, check_paths=True), folder
    if config is None:
        raise ServerRequestError("a server needs a configuration, as flexlora server federation.yaml; or --demo")
    return load_config(config, overrides), folder or Path("runs/run")


def opened_link(folder: Path, host: str, port: int, certificates: Path | None, insecure: bool, demo: bool) -> SuperLink:
    """Return a server that has taken its port and has all it needs to start.

    Args:
        folder: Of the run.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        certificates: Folder of certificates; None takes ``certificates``, or makes some for a demo.
        insecure: Whether to serve without TLS.
        demo: Whether certificates are made where they are missing.

    Raises:
        FlexLoraError: If certificates are missing, or nothing can listen there.
    """
    if insecure:
        if certificates is not None:
            raise ServerRequestError("--insecure uses no certificates; leave --certificates out")
        if not is_loopback(host):
            raise ServerRequestError(
                f"--insecure lets anybody join and read what is sent, so it is for this machine only; others reach "
                f"{host}: make certificates by flexlora certificates, and leave --insecure out"
            )
        return SuperLink(host, port, None)
    place = certificates or (folder / SERVER_FOLDER / "certificates" if demo else Path("certificates"))
    if demo and certificates is None:
        make_certificates(place)
    files = Certificates(place)
    files.check_server_files()
    if host not in ALL_ADDRESSES and host not in names_in(files.server):
        raise ServerRequestError(
            f"the server's certificate must name {host}, where it listens; make one by: flexlora certificates --renew "
            f"--out {place} --host {host}"
        )
    if not demo and not files.public_keys():
        raise ServerRequestError(
            f"no client has a key, so none could join; make one by: flexlora certificates --out {place} --client NAME"
        )
    return SuperLink(host, port, files)
