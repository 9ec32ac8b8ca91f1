"""The verb ``certificates``: makes what server and clients prove themselves with."""

from pathlib import Path
from typing import Annotated

import typer

from flexlora.verbs.arguments import JsonOption
from flexlora.verbs.extras import need_flower
from flexlora.verbs.terminal import out, print_json


def certificates(
    folder: Annotated[Path, typer.Option("--out", help="Folder of certificates, made or added to.")] = Path(
        "certificates"
    ),
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or address that clients call the server by, besides localhost; repeatable."),
    ] = None,
    clients: Annotated[
        list[str] | None, typer.Option("--client", help="Name of a client that gets a key; repeatable.")
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Make a new certificate of the server, from the same authority.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make an authority, the server's certificate and a key for each client; what exists is kept."""
    need_flower()
    from flexlora.engines.flower.certificates import Certificates, make_certificates, names_in

    new = make_certificates(folder, hosts or (), clients or (), renew=renew)
    files = Certificates(folder)
    names = names_in(files.server)
    if as_json:
        known = [path.stem for path in files.public_keys()]
        print_json({"new": [str(path) for path in new], "hosts": names, "clients": known})
        return

    def say(line: str) -> None:
        """Print a line as it is."""
        out.print(line, highlight=False, markup=False, soft_wrap=True)

    for path in new:
        say(f"Wrote {path}")
    if not new:
        say(f"{folder} holds all of this already; nothing was changed.")
    say(f"The server is known as {', '.join(names)}.")
    for name in clients or ():
        say(f"{name} needs two files, over a channel you trust: {files.authority} and {files.client_key(name)}")
    if not files.public_keys():
        say(f"No client has a key yet: flexlora certificates --out {folder} --client NAME")
