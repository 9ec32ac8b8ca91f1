"""How many rounds does each run take to a target loss, and what does that cost? The paper's Table 4 from run folders.

    python benchmarks/rounds_to_target.py runs/homogeneous runs/heavy_tail_light runs/uniform

``R`` is the first evaluated round whose loss on unseen tasks is at most the target, ``cost a round`` the mean bytes
that the clients of a round receive and send, relative to the first run, ``total`` their product. The first run should
be the one with one rank for all. The paper's target is a loss of 2, "about 75 % of convergence progress"; without
``--target`` it is that share of the way that the first run goes from the base model to its own lowest loss. Evaluate
every round (evaluation.every=1), or R is only known up to the rounds between.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from flexlora.report.run_folder import RunFolder, read_run

SHARE_OF_PROGRESS = 0.75


def losses(run: RunFolder) -> dict[int, float]:
    """Return round -> loss on unseen tasks, of the rounds that were evaluated; round 0 is the base."""
    return {record.server_round: record.evaluation.unseen.loss for record in run.records if record.evaluation}


def bytes_a_round(run: RunFolder) -> float:
    """Return the mean bytes down and up in a round."""
    rounds = [record for record in run.records if record.server_round]
    return sum(record.down_bytes + record.up_bytes for record in rounds) / len(rounds)


def target_of(run: RunFolder) -> float:
    """Return the loss after the share of the progress that this run makes."""
    found = losses(run)
    if 0 not in found:
        raise SystemExit(f"{run.path} has no score of the base model in round 0; give --target")
    return found[0] - SHARE_OF_PROGRESS * (found[0] - min(found.values()))


def table(runs: Sequence[RunFolder], target: float) -> str:
    """Return one line per run."""
    first = bytes_a_round(runs[0])
    text = [
        f"target: loss {target:.4f} on unseen tasks",
        f"{'run':<32s}{'R':>6s}{'cost a round':>16s}{'total':>12s}{'lowest loss':>14s}",
    ]
    for run in runs:
        found = losses(run)
        reached = next((number for number, loss in sorted(found.items()) if loss <= target), None)
        cost = bytes_a_round(run) / first
        total = "never" if reached is None else f"{reached * cost:.2f}"
        text.append(f"{run.name:<32s}{reached or '-':>6}{cost:>16.3f}{total:>12s}{min(found.values()):>14.4f}")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, the one with one rank first")
    parser.add_argument("--target", type=float, help="loss in nats per answer token")
    options = parser.parse_args()
    runs = [read_run(path) for path in options.runs]
    for run in runs:
        if not any(record.server_round for record in run.records) or not losses(run):
            raise SystemExit(f"{run.path} has no round that was evaluated")
    print(table(runs, options.target if options.target is not None else target_of(runs[0])))


if __name__ == "__main__":
    main()
