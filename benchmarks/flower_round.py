"""Rounds of Flower's simulation, one each time ``simulation.py`` asks for it; needs flwr[simulation].

    python benchmarks/flower_round.py FOLDER     # with job.pickle and the pipes go and done

Every node is a client of the job. It gets its factors, trains them with stock PEFT in an actor that keeps one model for
each set of ranks, and sends them back.
"""

import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

FOLDER = os.environ.setdefault("FLOWER_ROUND_FOLDER", sys.argv[1] if len(sys.argv) > 1 else "")
sys.path.insert(0, str(Path(__file__).parent))

client_app = ClientApp()
server_app = ServerApp()
_job: dict[str, Any] = {}
_models: dict[tuple[tuple[str, int], ...], Any] = {}


def job() -> dict[str, Any]:
    """Return the job, read once per process."""
    if not _job:
        _job.update(pickle.loads((Path(FOLDER) / "job.pickle").read_bytes()))
    return _job


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the factors of a message."""
    from peft import set_peft_model_state_dict
    from simulation import make_network, stock, stock_steps

    torch.set_num_threads(1)
    state = message.content["arrays"].to_torch_state_dict()
    examples = job()["clients"][message.content["config"]["client"]][1]
    suffix = ".lora_A.weight"
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(suffix): A.shape[0]
        for name, A in state.items()
        if name.endswith(suffix)
    }
    key = tuple(sorted(ranks.items()))
    if key not in _models:
        _models[key] = stock(make_network(job()["base"], "sdpa"), ranks)
    model = _models[key]
    set_peft_model_state_dict(model, state)
    stock_steps(model, examples, job()["batch_size"])
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return Message(RecordDict({"arrays": ArrayRecord(trained)}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a round for each line that comes through the pipe, until it brings none."""
    folder, clients = Path(FOLDER), job()["clients"]
    while len(nodes := sorted(grid.get_node_ids())) < len(clients):
        time.sleep(0.1)
    while (folder / "go").read_text():
        messages = [
            Message(
                RecordDict({"arrays": ArrayRecord(state), "config": ConfigRecord({"client": number})}),
                dst_node_id=node,
                message_type="train",
            )
            for number, (node, (state, _)) in enumerate(zip(nodes, clients, strict=True))
        ]
        replies = list(grid.send_and_receive(messages))
        failed = [reply.error for reply in replies if reply.has_error()]
        with (folder / "done").open("w") as pipe:
            pipe.write(f"failed: {failed[0]}" if failed or len(replies) < len(clients) else "done")


if __name__ == "__main__":
    run_simulation(
        server_app,
        client_app,
        num_supernodes=len(job()["clients"]),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
