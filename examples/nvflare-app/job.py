"""Runs two clients, of ranks 2 and 8, in NVFlare's simulator, or exports the job for a real federation.

python examples/nvflare-app/job.py --workspace /tmp/nvflare-rounds
python examples/nvflare-app/job.py --export /tmp/jobs
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

import torch
from nvflare import FedJob
from nvflare.app_common.shareablegenerators import FullModelShareableGenerator
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from client import LORA_ALPHA, load_model  # noqa: E402

from flexlora.nvflare import AdapterPersistor, FlexLoraAggregator  # noqa: E402

SITES = {"site-1": (2, 24), "site-2": (8, 8)}
"""Name of a client -> its rank, and how many texts it has."""


def make_job(adapter: str, method: str, num_rounds: int) -> FedJob:
    """Return the job.

    Args:
        adapter: PEFT folder of the first adapter, at the largest rank of any client.
        method: Aggregation method.
        num_rounds: Rounds.
    """
    job = FedJob(name="flexlora", min_clients=len(SITES))
    job.to_server(FlexLoraAggregator(LORA_ALPHA, method), id="aggregator")
    job.to_server(AdapterPersistor(adapter), id="persistor")
    job.to_server(FullModelShareableGenerator(), id="shareable_generator")
    job.to_server(
        ScatterAndGather(
            min_clients=len(SITES),
            num_rounds=num_rounds,
            wait_time_after_min_received=0,
            persistor_id="persistor",
            ignore_result_error=True,  # A client that fails is left out; without this it ends the job.
        )
    )
    for site, (rank, num_texts) in SITES.items():
        arguments = f"--rank {rank} --num-texts {num_texts}"
        # NVFlare's converter for PyTorch wants the same shapes both ways; arrays may have the rank of their sender.
        job.to(ScriptRunner("client.py", script_args=arguments, framework=FrameworkType.NUMPY), site)
    return job


def absolute(path: str) -> Path:
    """Return a path that stays the same when the working directory changes."""
    return Path(path).absolute()


def main() -> None:
    """Write the first adapter, and run or export the job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=absolute, default="nvflare-rounds", help="folder of the simulator")
    parser.add_argument("--export", type=absolute, help="write the job below this folder and do not run it")
    parser.add_argument("--method", default="flexlora", help="flexlora, aligned, zero_pad, ...")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        load_model(rank=max(rank for rank, _ in SITES.values())).save_pretrained(folder)
        with contextlib.chdir(HERE):  # The job names client.py by this path, which must be right on every machine.
            job = make_job(folder, arguments.method, arguments.rounds)
            if arguments.export:
                job.export_job(str(arguments.export))
            else:
                job.simulator_run(str(arguments.workspace), threads=len(SITES))
                print(f"The adapter is in {arguments.workspace / 'server/simulate_job/adapter'}")


if __name__ == "__main__":
    main()
