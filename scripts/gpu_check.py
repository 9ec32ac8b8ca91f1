"""Checks a machine with a CUDA device in one go, within a given time and without a network.

    python scripts/gpu_check.py --out runs/gpu --base models/smollm2-135m-instruct --tasks natural-instructions
    python scripts/gpu_check.py --out runs/gpu --dry-run

The parts, in order; each is a process of its own with a time limit, and one that fails does not stop the next:

    tests        the tests marked ``gpu``
    run          a short run on the CPU and on the device, and one on the device that is stopped and resumed
    aggregation  the server's step at the sizes of large models, 80 and 1,000 clients, bfloat16
    simulation   cohorts of 16 and 64 against stock PEFT and centralised training, bfloat16
    comparison   methods on Natural Instructions at the paper's scale, bfloat16, in the time that is left

``--base`` is a folder in Hugging Face format; without it the embedded base stands in. ``--tasks`` is a folder of
Natural Instructions; without it the comparison takes the generated corpus. ``OUT/rows.jsonl`` grows by one line
whenever a part or a piece of it is done, ``OUT/log.txt`` holds what the parts print. ``--dry-run`` makes everything
tiny and stays on the CPU: two minutes on two cores.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "run", "aggregation", "simulation", "comparison")
PACKAGES = ("torch", "transformers", "peft", "numpy", "scipy", "pydantic", "jaxtyping", "beartype", "triton")
LAST_LINES = 12
# Below this no command is started.
FEWEST_SECONDS = 10.0
RUN_OVERRIDES = (
    "data.num_clients=60",
    "data.num_unseen_tasks=8",
    "data.examples_per_task=20",
    "training.schedule=constant",
    "rounds.cohort_size=6",
    "evaluation.every=1",
    "evaluation.rank_group_clients=0",
    "evaluation.local_only_clients=0",
    "evaluation.fedit_reference=false",
    "evaluation.fedit_largest_reference=false",
    "evaluation.large_alone_reference=false",
)
# A step of Adam changes a weight by about scaling * sqrt(rank) * rate: with rslora the same at every rank.
OVERRIDES_OF_BASE = ("lora.scaling=rslora", "lora.lora_alpha=4", "training.learning_rate=0.002")
# As in configs/demo.yaml.
OVERRIDES_OF_EMBEDDED = ("lora.scaling=rslora", "lora.lora_alpha=2", "training.learning_rate=0.024")
COMPARISON_OVERRIDES = (
    "clients.distribution=heavy_tail_strong",
    "data.num_clients=1000",
    "data.max_length=256",
    "data.num_unseen_tasks=60",
    "data.test_examples_per_task=4",
    "data.validation_examples=512",
    "rounds.cohort_fraction=0.05",
    "training.schedule=linear",
    "training.max_steps=6",
    "training.batch_size=4",
    "evaluation.max_new_tokens=24",
    "evaluation.rank_group_clients=0",
)
TYPES = "clients.types={{type1: {{attention: {0}, ffn: {0}}}, type2: {{attention: {1}, ffn: {1}}}, " + (
    "type3: {{attention: {1}, ffn: {2}}}, type4: {{attention: {2}, ffn: {2}}}}}"
)


@dataclass(frozen=True)
class Command:
    """One process: its part, its name, what to run, and the most seconds it may take."""

    part: str
    name: str
    arguments: Sequence[str | Path]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


class Report:
    """The files of ``--out``."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.rows, self.log = out / "rows.jsonl", out / "log.txt"

    def add(self, **row: object) -> None:
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def versions() -> dict[str, object]:
    """Return what the numbers depend on: packages, processor cores, and the device."""
    found: dict[str, object] = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "card_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def test_commands(options: argparse.Namespace) -> Iterator[Command]:
    """Yield one run of the tests marked ``gpu``."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    # Other versions of packages may warn of what those that the project is tested with do not.
    arguments = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-o", "filterwarnings=default", *files]
    if importlib.util.find_spec("beartype") is None:
        arguments += ["-o", "addopts=--import-mode=importlib"]
    yield Command("tests", "gpu", arguments, 120)


def run_commands(options: argparse.Namespace) -> Iterator[Command]:
    """Yield short runs of the demo: on the CPU, on the device, and on the device in two pieces."""

    def flexlora(name: str, folder: str, *more: str) -> Command:
        command = ["-c", "from flexlora.cli import main; main()", "run", ROOT / "configs" / "demo.yaml"]
        settings = [*RUN_OVERRIDES, *more, "--out", options.scratch / folder]
        return Command("run", name, [sys.executable, *command, *settings], 90)

    device = f"model.device={options.device}"
    if options.dry_run:
        yield flexlora("device", "device", device, "rounds.num_rounds=1", "--overwrite")
        return
    yield flexlora("cpu", "cpu", "model.device=cpu", "rounds.num_rounds=3", "--overwrite")
    yield flexlora("device", "device", device, "rounds.num_rounds=3", "--overwrite")
    yield flexlora("begun", "resumed", device, "rounds.num_rounds=1", "--overwrite")
    yield flexlora("resumed", "resumed", device, "rounds.num_rounds=3", "--resume")


def compare_runs(options: argparse.Namespace, report: Report) -> None:
    """Say how far the runs are apart: the CPU's from the device's, and the resumed one, which must not differ."""
    losses = {}
    for folder in ("cpu", "device", "resumed"):
        lines = (options.scratch / folder / "records.jsonl").read_text("utf-8").splitlines()
        losses[folder] = [json.loads(line)["evaluation"]["validation_loss"] for line in lines]
    report.add(part="run", name="losses", resumed_alike=losses["resumed"] == losses["device"], **losses)
    report.say(f"validation losses: {losses}")


def aggregation_commands(options: argparse.Namespace) -> Iterator[Command]:
    """Yield one process per row, so that one that fails takes no other along."""
    shapes, numbers = ("4096x4096", "14336x4096"), (80, 1000)
    if options.dry_run:
        shapes, numbers = ("512x512",), (6,)
    methods = "flexlora exact,flexlora fast,fast last round,svd_lowrank"

    def command(shape: str, clients: int, methods: str, repeats: int) -> Command:
        script = [sys.executable, ROOT / "benchmarks" / "aggregation.py", "--shapes", shape, "--clients", str(clients)]
        script += ["--dtype", "bfloat16", "--device", options.device, "--methods", methods]
        script += ["--repeats", str(repeats), "--out", report_file(options)]
        return Command("aggregation", f"{shape} {clients} {methods}", script, 75)

    for number in numbers:
        for shape in shapes:
            yield command(shape, number, methods, 1 if options.dry_run else 5)
    # A decomposition of the dense sum takes its time on a GPU: last, and once.
    yield command(shapes[0], numbers[0], "flexlora fast,released", 1)


def simulation_commands(options: argparse.Namespace) -> Iterator[Command]:
    """Yield one process per cohort."""
    base = str(options.base) if options.base else "embedded"
    for clients, steps in ((2, 1),) if options.dry_run else ((16, 2), (64, 2)):
        script = [sys.executable, ROOT / "benchmarks" / "simulation.py", "--base", base, "--device", options.device]
        script += ["--dtype", "bfloat16", "--clients", str(clients), "--steps", str(steps), "--batch-sizes", "4"]
        ways = "ours-1" if options.dry_run else "ours"
        script += ["--methods", f"{ways},swapped,central", "--repeats", "1" if options.dry_run else "2"]
        script += ["--profile"] if options.device == "cuda" else []
        yield Command("simulation", f"{clients} clients", [*script, "--out", report_file(options)], 110)


def comparison_commands(options: argparse.Namespace) -> Iterator[Command]:
    """Yield the one process that starts those of all arms."""
    of_base = OVERRIDES_OF_BASE if options.base else OVERRIDES_OF_EMBEDDED
    ranks = options.ranks or ("2,8,64" if options.base else "1,4,16")
    overrides = [
        *COMPARISON_OVERRIDES,
        *of_base,
        TYPES.format(*ranks.split(",")),
        f"model.name_or_path={options.base or 'embedded'}",
        f"model.device={options.device}",
        "model.dtype=bfloat16",
        f"model.num_threads={1 if options.dry_run else max(1, len(os.sched_getaffinity(0)) // options.jobs)}",
        f"data.cache={options.scratch / 'corpora'}",
    ]
    if options.learning_rate:
        overrides += [f"training.learning_rate={options.learning_rate}"]
    if options.tasks:
        config = ROOT / "configs" / "natural_instructions.yaml"
        overrides += [f"data.path={options.tasks}"]
    else:
        config = ROOT / "configs" / "demo.yaml"
    if options.dry_run:
        overrides += ["data.num_clients=40", "data.validation_examples=8", "data.num_unseen_tasks=4"]
        overrides += ["training.max_steps=1", "data.max_length=128", "evaluation.max_new_tokens=4"]
    script = [sys.executable, ROOT / "benchmarks" / "timed_comparison.py", config, *overrides]
    minutes = max(0.0, left(options) - FEWEST_SECONDS) / 60
    script += ["--out", options.out, "--scratch", options.scratch / "arms"]
    script += ["--minutes", f"{minutes:.2f}", "--jobs", str(options.jobs)]
    script += ["--arms", options.arms] if options.arms else []
    script += ["--most-rounds", "2"] if options.dry_run else []
    yield Command("comparison", "arms", script, math.inf)


COMMANDS = {
    "tests": test_commands,
    "run": run_commands,
    "aggregation": aggregation_commands,
    "simulation": simulation_commands,
    "comparison": comparison_commands,
}


def report_file(options: argparse.Namespace) -> Path:
    """Return the file of rows."""
    return options.out / "rows.jsonl"


def left(options: argparse.Namespace) -> float:
    """Return the seconds that are left."""
    return options.until - time.monotonic()


def run(command: Command, options: argparse.Namespace, report: Report) -> bool:
    """Run one command within its time, show and log what it prints, and return whether it succeeded."""
    seconds = min(command.seconds, left(options))
    what = f"{command.part}, {command.name}"
    if seconds < FEWEST_SECONDS:
        report.say(f"== {what}: left out, no time")
        report.add(part=command.part, name=command.name, outcome="left out")
        return False
    report.say(f"== {what}: at most {seconds:.0f} s")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "XDG_CACHE_HOME": str(options.scratch / "cache"),
    }
    start, tail = time.monotonic(), list[str]()
    process = subprocess.Popen(
        list(map(str, command.arguments)),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    timer = threading.Timer(seconds, stop, [process])
    timer.start()
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            report.say(line.rstrip("\n")[:500])
            tail = [*tail[1 - LAST_LINES :], line.rstrip("\n")[:500]]
    code = process.wait()
    timer.cancel()
    spent = time.monotonic() - start
    row: dict[str, object] = {"outcome": "done" if code == 0 else "failed", "exit_code": code, "seconds": spent}
    report.add(part=command.part, name=command.name, **row, **({"last_lines": tail} if code else {}))
    report.say(f"== {what}: exit code {code} after {spent:.0f} s")
    return code == 0


def stop(process: "subprocess.Popen[str]") -> None:
    """End a command with all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, folders that are not there left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="folder of a base model; the embedded one where it does not exist")
    parser.add_argument("--tasks", type=Path, help="folder of Natural Instructions")
    parser.add_argument("--minutes", type=float, default=12.0, help="for everything")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--ranks", help="of the comparison: SMALLEST,MIDDLE,LARGEST")
    parser.add_argument("--learning-rate", help="of the comparison")
    parser.add_argument("--arms", help="of the comparison")
    parser.add_argument("--jobs", type=int, default=4, help="arms of the comparison that train at the same time")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    options.scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    options.device = "cpu" if options.dry_run else "cuda"
    options.until = time.monotonic() + 60 * options.minutes
    options.out = options.out.resolve()
    for name in ("base", "tasks"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            print(f"--{name}: there is no folder {folder}; going on without it", flush=True)
            setattr(options, name, None)
        elif folder is not None:
            setattr(options, name, folder.resolve())
    unknown = set(options.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts must be among {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    """Run all parts and exit with 1 if one of them failed or was cut off."""
    options = parse()
    report = Report(options.out)
    failed = []
    try:
        found = versions()
        report.add(part="versions", **found)
        report.say(f"== versions: {found}")
    except Exception:
        report.say(traceback.format_exc())
        report.add(part="versions", outcome="failed", reason=traceback.format_exc()[-1000:])
    for part in options.parts.split(","):
        try:
            succeeded = [run(command, options, report) for command in COMMANDS[part](options)]
            if part == "run" and not options.dry_run:
                compare_runs(options, report)
            failed += [] if all(succeeded) else [part]
        except Exception:
            failed.append(part)
            report.say(traceback.format_exc())
            report.add(part=part, outcome="failed", reason=traceback.format_exc()[-1000:])
    shutil.rmtree(options.scratch, ignore_errors=True)
    report.say(f"== {'failed or cut off: ' + ', '.join(failed) if failed else 'every part is done'}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
