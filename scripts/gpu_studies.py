"""Runs studies of scripts/studies.py on a machine with a CUDA device, one after the other, within a given time.

    python scripts/gpu_studies.py --out runs/gpu --minutes 9 main:5 methods ten_times

A name may have minutes of its own, as ``main:5``; those left go to the studies behind it. The labels of the arms to run
may follow, as ``main:5:flexlora,aligned``. Many processes share the device, each busy with one run; with ``--mps``
their kernels run at the same time (CUDA's multi-process service, started here, ended here, left out if it does not
work). ``OUT/NAME.jsonl`` is brought up to date while a study runs.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY_SECONDS = 10.0
PROBE = "import torch; x = torch.ones(64, 64, device='cuda'); print(float((x @ x).sum()))"


def start_mps(scratch: Path) -> dict[str, str]:
    """Start the multi-process service and return the environment that uses it; an empty one if it does not work."""
    server = shutil.which("nvidia-cuda-mps-control")
    if server is None:
        print("mps: not installed", flush=True)
        return {}
    pipes, logs = scratch / "mps", scratch / "mps-log"
    for folder in (pipes, logs):
        folder.mkdir(parents=True, exist_ok=True)
    own = {"CUDA_MPS_PIPE_DIRECTORY": str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(logs)}
    try:
        subprocess.run([server, "-d"], env=os.environ | own, check=True, timeout=15)
        subprocess.run([sys.executable, "-c", PROBE], env=os.environ | own, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"mps: does not work here ({error})", flush=True)
        stop_mps(own)
        return {}
    print("mps: running", flush=True)
    return own


def stop_mps(own: dict[str, str]) -> None:
    """End the multi-process service that ``start_mps`` started."""
    if not own:
        return
    try:
        subprocess.run(
            ["nvidia-cuda-mps-control"], input="quit\n", text=True, env=os.environ | own, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"mps: could not be ended ({error})", flush=True)


def run_study(name: str, minutes: float, only: str, options: argparse.Namespace, env: dict[str, str]) -> None:
    """Run one study for so many minutes, and bring its rows to OUT all along."""
    folder = options.scratch / name
    command = [sys.executable, str(ROOT / "scripts/run_study.py"), name, "--out", str(folder)]
    command += ["--jobs", str(options.jobs), "--minutes", f"{minutes:.3f}"]
    command += ["--only", only] if only else []
    over = threading.Event()

    def copy() -> None:
        """Copy the rows as they grow."""
        while not over.wait(COPY_SECONDS):
            copy_rows(folder, options.out / f"{name}.jsonl")

    copying = threading.Thread(target=copy, daemon=True)
    copying.start()
    process = subprocess.Popen(command, env=os.environ | env, cwd=ROOT, start_new_session=True)
    try:
        process.wait(60 * minutes + options.grace)
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped, its time is over", flush=True)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    over.set()
    copying.join()
    copy_rows(folder, options.out / f"{name}.jsonl")


def copy_rows(folder: Path, target: Path) -> None:
    """Copy the rows of a study that runs; a torn last line is the reader's to drop."""
    rows = folder / "rows.jsonl"
    if rows.exists():
        shutil.copyfile(rows, target)


def main() -> None:
    """Run the studies that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="STUDY[:MINUTES[:ARM,ARM]]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/studies"))
    parser.add_argument("--minutes", type=float, required=True, help="for everything")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--grace", type=float, default=25.0, help="seconds a study may go on after its minutes")
    parser.add_argument("--mps", action="store_true")
    options = parser.parse_args()
    until = time.time() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    options.scratch.mkdir(parents=True, exist_ok=True)
    env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    mps = start_mps(options.scratch) if options.mps else {}
    try:
        for entry in options.studies:
            name, own, only = (*entry.split(":"), "", "")[:3]
            left = (until - time.time() - options.grace) / 60
            minutes = min(left, float(own)) if own else left
            if minutes > 0:
                run_study(name, minutes, only, options, env | mps)
    finally:
        stop_mps(mps)


if __name__ == "__main__":
    main()
