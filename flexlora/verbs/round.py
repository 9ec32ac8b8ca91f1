"""The verb ``round``: runs a federation whose server and clients exchange nothing but files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flexlora.errors import FlexLoraError
from flexlora.progress import stage
from flexlora.text import bytes_text, count_text
from flexlora.verbs.arguments import ConfigArgument, JsonOption, OverridesArgument, RunArgument
from flexlora.verbs.group import Steps
from flexlora.verbs.leaving import interruptible
from flexlora.verbs.terminal import err, hide_other_progress_bars, out, print_json, reading

if TYPE_CHECKING:
    from flexlora.experiment.exchange_replies import Refusal

KeyOption = Annotated[
    Path | None, typer.Option("--key", help="Private Ed25519 key to sign with, as flexlora round key makes it.")
]

steps = typer.Typer(cls=Steps, no_args_is_help=True)


@steps.command("init", epilog="Example: flexlora round init federation.yaml --out runs/hospitals")
def init_run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the run; must be new or empty.")] = Path("runs/run"),
    key: KeyOption = None,
    trusted: Annotated[
        list[Path] | None,
        typer.Option("--trust", help="Public key NAME.pub of the client NAME; with any, replies must be signed."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Server: begin a run and write what the clients of round 1 start from."""
    with reading(config):
        from flexlora.experiment.config_file import load_config
        from flexlora.experiment.exchange_limits import refuse_exchange

        # What data the configuration names is not read: clients bring their own.
        settings = load_config(config, overrides or ())
        refuse_exchange(settings)
    with stage(err, "Reading the base model", hidden=as_json):
        from flexlora.experiment.exchange_init import begin_exchange

        hide_other_progress_bars()
        begun = begin_exchange(settings, folder, key=key, trusted=trusted or ())
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "run": begun.run_id,
                "broadcasts": {name: str(place) for name, place in begun.broadcasts.items()},
                "ranks": begun.ranks,
                "trusted": list(begun.clients),
            }
        )
        return
    _say(f"Began run {begun.run_id[:8]} in {folder}. Send each client one of these folders:")
    for name, place in begun.broadcasts.items():
        _say(f"  {place}  (rank {begun.ranks[name]}, {bytes_text(_size(place))})")
    signed = f"signed by {', '.join(begun.clients)}" if begun.clients else "unsigned: no --trust was given"
    _say(f"Replies are taken {signed}.")


@steps.command("train", epilog="Example: flexlora round train type2 --data clinic.jsonl --out reply")
def train(
    broadcast: Annotated[Path, typer.Argument(metavar="BROADCAST", help="Folder from the server.")],
    data: Annotated[Path, typer.Option("--data", help="File or folder with this client's rows; they stay here.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder of the reply; must not exist.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Of this client; default is that of its file. Keep it in all rounds.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Which broadcast to take from a folder with several.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or hub id of the base model here; default as the server says.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of --model on the hub.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N, mps.")] = "auto",
    quantization: Annotated[
        Literal["8bit", "4bit"] | None,
        typer.Option("--quantization", help="Store the base in 8 or 4 bits (extra flexlora[bitsandbytes])."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Take less memory and more time.")
    ] = False,
    key: KeyOption = None,
    server_key: Annotated[
        Path | None, typer.Option("--server-key", help="Public key of the server; the broadcast must be signed then.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Client: train on data of your own and write the reply to send back."""
    if folder.exists():
        raise FlexLoraError(f"the folder to write must not exist yet; {folder} does")
    with (
        interruptible("nothing was written; the same command trains again"),
        stage(err, "Training", hidden=as_json),
    ):
        from flexlora.engines.exchange_client import name_from, open_broadcast, train_reply
        from flexlora.engines.flower.client_settings import ClientSettings

        hide_other_progress_bars()
        client = name or name_from(data)
        opened = open_broadcast(broadcast, rank, server_key)
        own = ClientSettings(
            client,
            data,
            None,
            model or opened.manifest.run.base_model,
            revision=revision,
            device=device,
            quantization=quantization,
            gradient_checkpointing=gradient_checkpointing,
        )
        update = train_reply(opened, own, folder, key)
    told = {
        "folder": str(folder),
        "client": client,
        "round": opened.manifest.server_round,
        "rank": opened.manifest.rank,
        "examples": int(update.weight),
        "loss": update.metrics.get("loss"),
        "steps": update.metrics.get("steps"),
    }
    if as_json:
        print_json(told)
        return
    loss = "" if told["loss"] is None else f", mean loss {told['loss']:.3f}"
    _say(
        f"Trained {client} on {count_text(int(update.weight), 'example')} at rank {told['rank']} for round "
        f"{told['round']}{loss}. Send back {folder} ({bytes_text(_size(folder))})."
    )


@steps.command("aggregate", epilog="Example: flexlora round aggregate runs/hospitals replies/")
def aggregate(
    run_folder: RunArgument,
    replies: Annotated[list[Path], typer.Argument(metavar="REPLY", help="Folders of replies, or folders with some.")],
    min_clients: Annotated[
        int, typer.Option("--min-clients", min=1, help="Fewest replies that can be used; with fewer, nothing changes.")
    ] = 1,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Server: aggregate the replies of a round and write what the next one starts from."""
    with (
        interruptible("the same command goes on where it was"),
        stage(err, "Aggregating", hidden=as_json),
    ):
        from flexlora.experiment.exchange_aggregate import aggregate_replies

        hide_other_progress_bars()
        done = aggregate_replies(run_folder, replies, min_clients=min_clients, key=key)
    if as_json:
        print_json(
            {
                "round": done.server_round,
                "num_rounds": done.num_rounds,
                "used": list(done.used),
                "refused": [_refusal(one) for one in done.refused],
                "is_repeat": done.is_repeat,
                "broadcasts": None if done.broadcasts is None else str(done.broadcasts),
                "train_loss": done.record.train_loss,
                "note": done.record.note,
            }
        )
        return
    for one in done.refused:
        err.print(f"Not used: {one.folder}: {one.reason}", markup=False, highlight=False, soft_wrap=True)
    loss = "" if done.record.train_loss is None else f", mean training loss {done.record.train_loss:.3f}"
    over = "was over before" if done.is_repeat else "is over"
    _say(f"Round {done.server_round} of {done.num_rounds} {over}: {', '.join(done.used) or 'nobody'}{loss}.")
    if done.record.note:
        err.print(done.record.note, markup=False, highlight=False, soft_wrap=True)
    if done.broadcasts is not None:
        _say(f"Send clients their folder of {done.broadcasts} for round {done.server_round + 1}.")
    else:
        _say(f"That was the last round. flexlora export {run_folder} takes the adapter out.")


@steps.command("key", epilog="Example: flexlora round key keys/clinic-a")
def make_key(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The private key; FILE.pub will be the public one.")],
) -> None:
    """Make an Ed25519 key pair to sign broadcasts or replies with."""
    from flexlora.engines.exchange_keys import make_keys

    public = make_keys(path)
    _say(f"Wrote {path}, which stays with you, and {public}, which others need to trust you.")


def _refusal(refusal: "Refusal") -> dict[str, str | None]:
    return {"folder": str(refusal.folder), "client": refusal.client, "reason": refusal.reason}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _say(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)
