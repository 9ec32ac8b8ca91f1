"""Does a run need more memory with more rounds, or with more clients, and how long until its first round begins?

    python benchmarks/scale.py                                    # 1,000 and 10,000 clients, 5 % a round, 10 rounds
    python benchmarks/scale.py --clients 10000 --rounds 3 --keep  # shorter, on examples that an earlier run has kept

Each case runs in a process of its own on the embedded base: generated tasks, mixed ranks, two local steps of four
examples. After every round the resident memory that belongs to no file is read (``anonymous``: what counts against a
machine; pages of mapped files go when others need them). ``grows`` is the slope of a straight line through it from the
second round on, with its standard error. The curve is called flat if the slope is not above zero by two standard errors
and even two more of them would add less than half a per cent a round. ``start`` is processor time from the end of the
imports to the first training step, without the evaluation of the base that comes before it, which is given apart; wall
time depends on what else the machine does.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

COHORT_SHARE = 0.05
# Tasks with the examples for many clients; the others serve fewer.
LARGE_TASKS = 1500
# Of all memory, in one round.
FLAT_SHARE = 0.005
COLUMNS = ("clients", "cohort", "start", "evaluation", "round 1", "last round", "peak", "mapped", "grows per round")


def settings(num_clients: int, num_rounds: int, steps: int, cache: str) -> dict:
    return {
        "model": {"num_threads": 1},
        "lora": {"scaling": "rslora", "lora_alpha": 2},
        "data": {
            "name": "generated",
            "num_clients": num_clients,
            "clients_per_task": math.ceil(num_clients / LARGE_TASKS),
            "examples_per_task": 20,
            "num_unseen_tasks": 16,
            "test_examples_per_task": 2,
            "validation_examples": 32,
            "max_length": 192,
            "cache": cache,
        },
        "clients": {"types": "small", "distribution": "uniform"},
        "training": {"learning_rate": 0.01, "batch_size": 4, "max_steps": steps},
        "rounds": {"num_rounds": num_rounds, "cohort_fraction": COHORT_SHARE},
        "evaluation": {
            "every": num_rounds,
            "max_new_tokens": 16,
            "rank_group_clients": 0,
            "local_only_clients": 0,
            "fedit_reference": False,
        },
    }


def memory() -> dict[str, int]:
    """Resident memory of this process and of those it has started, in bytes, by what it belongs to."""
    own, total = os.getpid(), {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    parents = {int(path.parent.name): _status(path) for path in Path("/proc").glob("[0-9]*/status")}
    wanted, found = [own], set()
    while wanted:
        process = wanted.pop()
        found.add(process)
        wanted += [child for child, fields in parents.items() if fields.get("PPid") == str(process)]
    for process in found:
        for name in total:
            total[name] += 1024 * int(parents.get(process, {}).get(name, "0").split()[0])
    return total


def _status(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except OSError:  # A process that is gone.
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def run_and_watch(num_clients: int, num_rounds: int, steps: int, cache: str) -> dict[str, object]:
    """Run the case and return what was seen."""
    from flexlora.experiment.config_file import parse_config
    from flexlora.experiment.run import run_experiment
    from flexlora.rounds.loop_parts import RoundEvent

    config = parse_config(settings(num_clients, num_rounds, steps, cache), "the benchmark")
    began = {"wall": time.perf_counter(), "cpu": time.process_time()}
    moments: dict[str, dict[str, float]] = {}
    curve: list[dict[str, float]] = []

    def note(event: object) -> None:
        if not isinstance(event, RoundEvent):
            return
        now = {"wall": time.perf_counter() - began["wall"], "cpu": time.process_time() - began["cpu"]}
        moments.setdefault(f"{event.kind} {event.server_round}", now)
        if event.kind == "done":
            curve.append({"round": event.server_round, **memory(), "seconds": now["wall"]})
            print(f"round {event.server_round}: {curve[-1]['RssAnon'] / 1e6:.1f} MB", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        result = run_experiment(config, Path(folder, "run"), notify=note)
        report_bytes = result.report.stat().st_size
        records_bytes = Path(folder, "run", "records.jsonl").stat().st_size
        num_ok = sum(record.num_ok for record in result.rounds)
    evaluation = _difference(moments["done 0"], moments["evaluating 0"])
    start = _difference(moments["cohort 1"], evaluation)
    grown, error = slope([(point["round"], point["RssAnon"]) for point in curve[2:]])
    return {
        "num_clients": num_clients,
        "cohort": round(COHORT_SHARE * num_clients),
        "start": start,
        "evaluation": evaluation,
        "curve": curve,
        "slope_bytes": grown,
        "slope_error_bytes": error,
        "verdict": verdict(grown, error, curve[-1]["RssAnon"]),
        "updates": num_ok,
        "report_bytes": report_bytes,
        "records_bytes": records_bytes,
    }


def _difference(later: dict[str, float], earlier: dict[str, float]) -> dict[str, float]:
    return {name: later[name] - earlier[name] for name in later}


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Slope of the line of least squares through the points and its standard error; not a number with too few."""
    if len(points) < 3:
        return math.nan, math.nan
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    left = sum((y - mean_y - rise * (x - mean_x)) ** 2 for x, y in points)
    return rise, math.sqrt(left / (len(points) - 2) / spread)


def verdict(grown: float, error: float, total: float) -> str:
    if grown > 2 * error:
        return "grows"
    return "flat" if grown + 2 * error < FLAT_SHARE * total else "too few rounds to tell"


def cells(row: dict) -> list[str]:
    def megabytes(point: dict) -> str:
        return f"{point['RssAnon'] / 1e6:.0f} MB"

    curve = row["curve"]
    return [
        f"{row['num_clients']:,}",
        f"{row['cohort']:,}",
        f"{row['start']['cpu']:.2f} s",
        f"{row['evaluation']['cpu']:.2f} s",
        megabytes(curve[1]),
        megabytes(curve[-1]),
        f"{curve[-1]['VmHWM'] / 1e6:.0f} MB",
        f"{curve[-1]['RssFile'] / 1e6:.0f} MB",
        f"{row['slope_bytes'] / 1e6:+.2f} ± {row['slope_error_bytes'] / 1e6:.2f} MB",
    ]


def draw(curve: list[dict], write: Callable[[str], None] = print) -> None:
    """Draw the curve, from nothing to its highest point."""
    highest = max(point["RssAnon"] for point in curve)
    for point in curve:
        bar = "#" * round(60 * point["RssAnon"] / highest)
        write(f"  round {point['round']:>3} {point['RssAnon'] / 1e6:8.1f} MB {bar}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1000,10000", help="Numbers of clients, with commas between.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="Local steps of a client.")
    parser.add_argument("--keep", action="store_true", help="Keep examples and tokens in the user's cache folder.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cache = "user" if arguments.keep else "none"
    numbers = [int(number) for number in arguments.clients.split(",")]
    if arguments.watch:
        print(json.dumps(run_and_watch(numbers[0], arguments.rounds, arguments.steps, cache)))
        return
    rows = []
    if not arguments.json:
        print(("{:>12}" * 8).format(*COLUMNS), "", COLUMNS[8])
    for number in numbers:
        # A process of its own: what another case has left behind must not count.
        command = [sys.executable, __file__, "--watch", "--clients", str(number), "--rounds", str(arguments.rounds)]
        command += ["--steps", str(arguments.steps), *(["--keep"] if arguments.keep else [])]
        rows.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
        if not arguments.json:
            *columns, grows = cells(rows[-1])
            print(("{:>12}" * 8).format(*columns), "", grows, f"({rows[-1]['verdict']})", flush=True)
            draw(rows[-1]["curve"])
            print(f"  {rows[-1]['updates']:,} updates; report.html {rows[-1]['report_bytes'] / 1e6:.1f} MB")
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
