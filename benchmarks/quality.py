"""Which method makes the better global model? Paired seeds, each method at its own learning rate.

    python benchmarks/quality.py configs/demo.yaml --seeds 5 --jobs 2 --out runs/quality

For every seed, every method runs once per learning rate and is judged on the validation data of that seed's clients.
The learning rate with the lowest validation loss is the method's; only then is that model scored on the seed's unseen
tasks, which therefore decide nothing. Same seed means same clients, ranks, cohorts, data order and unseen tasks for all
methods. Differences are paired by seed, with a 95 % interval of Student's t over seeds. ``--methods fedit@0.048,
flexlora@0.024`` fixes learning rates that were chosen before, on other seeds.

Every finished run is one line of ``OUT/runs.jsonl``; the same command goes on where it was stopped.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

METHODS: dict[str, dict[str, Any]] = {
    "fedit": {"name": "fedit"},
    "zero_pad": {"name": "zero_pad"},
    "flexlora": {"name": "flexlora"},
    "flexlora+ec": {"name": "flexlora", "error_compensation": True},
    "flexlora+ec+fold": {"name": "flexlora", "error_compensation": True, "fold_tail": True},
}
MEASURES = ("rouge_l", "exact_match", "loss")


@dataclass(frozen=True)
class Run:
    """One method at one learning rate under one seed."""

    method: str
    learning_rate: float
    seed: int


def measure_seed(config_path: str, overrides: Sequence[str], runs: Sequence[Run], out: Path) -> list[dict[str, Any]]:
    """Run everything under one seed and return one result per run, unseen scores only for the chosen ones."""
    import torch

    from flexlora.experiment.baselines import at_smallest_ranks
    from flexlora.experiment.config_file import load_config
    from flexlora.experiment.loaded import LoadedRun
    from flexlora.experiment.method_config import read_method
    from flexlora.experiment.participants import gather_participants
    from flexlora.experiment.round_loop import round_loop
    from flexlora.experiment.scoring import Scorer, validation_loss
    from flexlora.rounds.loop import run_rounds

    torch.set_num_threads(1)
    seed = runs[0].seed
    config = load_config(config_path, [*overrides, f"seed={seed}"])
    loaded = LoadedRun.load(config, gather_participants(config))
    scorer, folder = Scorer(loaded), out / "scratch" / f"seed-{seed}"
    results, outcomes = [], {}
    for run in runs:
        # FedIT has one rank only: what the weakest client can afford.
        own = at_smallest_ranks(loaded) if run.method == "fedit" else loaded.participants.clients
        shutil.rmtree(folder, ignore_errors=True)
        loop = round_loop(loaded, read_method(METHODS[run.method]), own, folder, lambda event: None, run.learning_rate)
        loop = _validated_only(loop, loaded)
        outcome = run_rounds(loop)
        adapter = loop.aggregator.broadcast(outcome.state, loop.federation.server_ranks)
        loss = validation_loss(loaded, adapter)
        results.append({**vars(run), "validation_loss": loss})
        best = outcomes.get(run.method)
        if best is None or loss < best[0]:
            outcomes[run.method] = (loss, run.learning_rate, adapter)
    for method, (_, learning_rate, adapter) in outcomes.items():
        scores = scorer.scores(adapter)
        for result in results:
            if result["method"] == method and result["learning_rate"] == learning_rate:
                result["unseen"] = scores.unseen.model_dump()
    base = scorer.scores(None)
    results.append({"method": "base", "learning_rate": 0.0, "seed": seed, "unseen": base.unseen.model_dump()})
    shutil.rmtree(folder, ignore_errors=True)
    return results


def _validated_only(loop: Any, loaded: Any) -> Any:
    """Return the loop without its own evaluations: here only the model of the last round is looked at."""
    import dataclasses

    from flexlora.rounds.records import EvaluationRecord, ScoreRecord

    nothing = ScoreRecord(rouge_l=0.0, exact_match=0.0, loss=0.0, num_examples=0, num_tasks=0)

    class Silent:
        def scores(self, adapter: Any) -> EvaluationRecord:
            return EvaluationRecord(unseen=nothing, unseen_unweighted=nothing, categories={}, validation_loss=None)

        def rank_groups(self, broadcast: Callable[[Any], Any]) -> dict[str, Any]:
            return {}

    settings = dataclasses.replace(loop.settings, patience=None, checkpoint_every=loop.settings.num_rounds)
    return dataclasses.replace(loop, evaluator=Silent(), settings=settings)


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval (Student's t)."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, float("nan")
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return mean, float(stats.t.ppf(0.975, len(differences) - 1)) * error


def report(lines: Iterable[dict[str, Any]]) -> str:
    """Return the tables: scores per method, paired differences, and validation loss per learning rate."""
    lines = list(lines)
    chosen = {(line["method"], line["seed"]): line for line in lines if "unseen" in line}
    seeds = sorted({seed for _, seed in chosen})
    names = [name for name in ("base", *METHODS) if all((name, seed) in chosen for seed in seeds)]
    text = [
        f"{len(seeds)} seeds: {', '.join(map(str, seeds))}",
        "",
        "unseen tasks, mean over seeds (standard deviation)",
    ]
    text.append(f"{'method':20s}{'ROUGE-L':>16s}{'exact match':>16s}{'loss':>16s}  learning rates chosen")
    for name in names:
        columns = [[chosen[name, seed]["unseen"][measure] for seed in seeds] for measure in MEASURES]
        spread = [f"{statistics.fmean(c):.2f} ({statistics.stdev(c) if len(c) > 1 else 0:.2f})" for c in columns]
        rates = ", ".join(f"{chosen[name, seed]['learning_rate']:g}" for seed in seeds)
        text.append(f"{name:20s}{spread[0]:>16s}{spread[1]:>16s}{spread[2]:>16s}  {rates}")
    text += ["", "paired differences by seed, 95 % interval"]
    for other in ("base", "fedit", "flexlora"):
        for name in names:
            if name in ("base", other) or other not in names or (other == "flexlora" and "+" not in name):
                continue
            cells = []
            for measure in MEASURES:
                pairs = [chosen[name, s]["unseen"][measure] - chosen[other, s]["unseen"][measure] for s in seeds]
                mean, half = interval(pairs)
                cells.append(f"{measure} {mean:+.2f} +- {half:.2f}")
            text.append(f"{name} - {other}: " + ", ".join(cells))
    text += ["", "validation loss, mean over seeds, per learning rate"]
    rates = sorted({line["learning_rate"] for line in lines if line["method"] != "base"})
    text.append(f"{'method':20s}" + "".join(f"{rate:>10g}" for rate in rates))
    for name in names[1:]:
        row = []
        for rate in rates:
            losses = [
                line["validation_loss"] for line in lines if (line["method"], line["learning_rate"]) == (name, rate)
            ]
            row.append(f"{statistics.fmean(losses):>10.3f}" if losses else f"{'':>10s}")
        text.append(f"{name:20s}" + "".join(row))
    return "\n".join(text)


def parse_methods(text: str, rates: Sequence[float]) -> Iterable[tuple[str, float]]:
    """Yield every method with every learning rate it is to be tried with."""
    for entry in text.split(","):
        method, _, rate = entry.partition("@")
        if method not in METHODS:
            raise SystemExit(f"--methods must be among {', '.join(METHODS)}; got {method}")
        yield from ((method, own) for own in ([float(rate)] if rate else rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value, as for flexlora run")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--learning-rates", default="0.006,0.012,0.024,0.048")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    done_file = options.out / "runs.jsonl"
    lines = [json.loads(line) for line in done_file.read_text().splitlines()] if done_file.exists() else []
    done = {line["seed"] for line in lines}
    pairs = list(parse_methods(options.methods, [float(rate) for rate in options.learning_rates.split(",")]))
    todo = {
        seed: [Run(method, rate, seed) for method, rate in pairs]
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        if seed not in done
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool, done_file.open("a") as file:
        futures = {
            pool.submit(measure_seed, options.config, options.overrides, runs, options.out): seed
            for seed, runs in todo.items()
        }
        for future in as_completed(futures):
            results = future.result()
            file.writelines(json.dumps(result) + "\n" for result in results)
            file.flush()
            lines += results
            print(f"seed {futures[future]} done", flush=True)
    print(report(lines))


if __name__ == "__main__":
    main()
