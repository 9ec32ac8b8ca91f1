"""Can one tell from the final model whether a client took part? Two standard attacks, with and without noise.

    python benchmarks/membership.py --runs 10 --jobs 2

Each run takes a random half of a pool of clients (generated tasks, one a client) and trains a federation on it, once
without and once with differential privacy of clients. The attacker has the final model and all examples of a client:

    threshold   the lower the loss on its examples, the more likely it took part (Yeom et al., 2018)
    lira        how much more likely that loss is in runs with the client than in runs without it, by a normal
                distribution of each, from all other runs (Carlini et al., 2022, with one variance for all clients)

An area under the curve (AUC) of 0.5 is guessing. Differential privacy bounds every attack: with epsilon and delta, the
share of members found is at most ``exp(epsilon)`` times the share of others taken for members, and delta more.
"""

import argparse
import math
import secrets
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

import flexlora
from flexlora import Example
from flexlora.experiment.base import load_base
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import load_config
from flexlora.experiment.corpora import corpus_of
from flexlora.federation.messages import Broadcast
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.evaluation import answer_loss

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
HELD_OUT = 16
EXAMPLES = 16
"""Of a client, that the attacker looks at."""
FALSE_POSITIVES = 0.05
Pool = dict[str, list[Example]]


def settings_of(options: argparse.Namespace, epsilon: float | None, seed: int) -> dict[str, Any]:
    """Return the settings of a run."""
    settings: dict[str, Any] = {
        "seed": seed,
        "model": {"num_processes": 1},
        "method": {"name": "aligned"},
        "clients": {
            "types": {"rank-1": {"attention": 1, "ffn": 1}, "rank-2": {"attention": 2, "ffn": 2}},
            "distribution": {"rank-1": 1.0, "rank-2": 1.0},
        },
        "rounds": {"num_rounds": options.rounds, "cohort_size": options.cohort, "sampling": "poisson"},
        "evaluation": {
            "every": options.rounds,
            "max_new_tokens": 1,
            "local_only_clients": 0,
            "rank_group_clients": 0,
            "fedit_reference": False,
            "fedit_largest_reference": False,
            "large_alone_reference": False,
        },
    }
    if epsilon is not None:
        settings["privacy"] = {
            "differential": {
                "clip": options.clip,
                "target_epsilon": epsilon,
                "delta": options.delta,
                "noise_seed": secrets.randbits(62),
            }
        }
    return settings


def pool_of(config: Config, size: int) -> tuple[Pool, Pool]:
    """Return the examples of the clients that may take part, and of those whose data are held out."""
    corpus, _ = corpus_of(config)
    clients = iter(sorted(corpus.clients.items()))
    held_out = {name: list(splits.train) for name, splits in islice(clients, HELD_OUT)}
    return {name: list(splits.train) for name, splits in islice(clients, size)}, held_out


def run_once(options: argparse.Namespace, epsilon: float | None, number: int) -> tuple[list[bool], list[float], float]:
    """Return who of the pool took part, the final model's loss on each, and its loss on held-out clients."""
    torch.set_num_threads(1)
    disable_progress_bar()
    config = load_config(CONFIG)
    pool, held_out = pool_of(config, options.clients)
    is_member = np.random.default_rng(number).permutation(len(pool)) < len(pool) // 2
    taking_part = [name for name, is_in in zip(pool, is_member, strict=True) if is_in]
    rows = [(name, example) for name in taking_part for example in pool[name]]
    rows += [(name, example) for name, examples in held_out.items() for example in examples]
    with tempfile.TemporaryDirectory(prefix="flexlora-benchmark-") as folder:
        result = flexlora.run(
            "demo",
            Path(folder) / "run",
            data=rows,
            data__unseen_owners=list(held_out),
            quiet=True,
            **settings_of(options, epsilon, number),
        )
        adapter = Broadcast(result.adapter())
        unseen = result.rounds[-1].evaluation
    base, tokenizer = load_base(config, "cpu")
    model = AdaptedModel(base, tokenizer)
    template, max_length = config.data.template, config.data.max_length
    losses = [answer_loss(model, adapter, examples[:EXAMPLES], template, max_length) for examples in pool.values()]
    assert unseen is not None
    return is_member.tolist(), losses, unseen.unseen.loss


def lira(members: np.ndarray, losses: np.ndarray, target: int) -> np.ndarray:
    """Return for each client how much more likely its loss in one run is if it took part; others are the shadows."""
    others = np.arange(len(members)) != target
    inside = np.ma.array(losses[others], mask=~members[others])
    outside = np.ma.array(losses[others], mask=members[others])
    mean_in, mean_out, own = inside.mean(axis=0), outside.mean(axis=0), losses[target]
    var_in, var_out = ((inside - mean_in) ** 2).mean(), ((outside - mean_out) ** 2).mean()
    # A client that was in all other runs, or in none, cannot be judged.
    return ((own - mean_out) ** 2 / var_out - (own - mean_in) ** 2 / var_in).filled(0.0)


def area(scores: np.ndarray, members: np.ndarray) -> float:
    """Return the area under the curve: how often a member scores above another client."""
    above = np.sign(scores[members][:, None] - scores[~members][None, :])
    return float((above + 1).mean() / 2)


def found(scores: np.ndarray, members: np.ndarray) -> float:
    """Return the share of members above the score that ``FALSE_POSITIVES`` of the others exceed."""
    return float((scores[members] > np.quantile(scores[~members], 1 - FALSE_POSITIVES)).mean())


def told(values: list[float]) -> str:
    """Return a mean over runs with the half width of its 95 % interval."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {half:.3f}"


def main() -> None:
    """Attack runs without and with noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=400, help="in the pool; half of them take part in a run")
    parser.add_argument("--cohort", type=int, default=100, help="expected, by Poisson sampling")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--runs", type=int, default=10, help="of each kind; each is the target once")
    parser.add_argument("--epsilon", type=float, nargs="*", default=[8.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--clip", type=float, default=8.0)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.runs < 4:
        parser.error("--runs must be at least 4: runs with and without a client are needed beside the target")
    print(f"{'noise':>12} | {'unseen loss':>15} | {'threshold AUC':>15} | {'LiRA AUC':>15} | members found at 5 %")
    with ProcessPoolExecutor(options.jobs) as pool:
        for epsilon in (None, *options.epsilon):
            runs = [pool.submit(run_once, options, epsilon, number) for number in range(options.runs)]
            members, losses = (np.array([run.result()[part] for run in runs]) for part in (0, 1))
            scores = [lira(members, losses, target) for target in range(options.runs)]
            columns = (
                [run.result()[2] for run in runs],
                [area(-losses[target], members[target]) for target in range(options.runs)],
                [area(scores[target], members[target]) for target in range(options.runs)],
                [found(scores[target], members[target]) for target in range(options.runs)],
            )
            name = "none" if epsilon is None else f"epsilon {epsilon:g}"
            print(f"{name:>12} | " + " | ".join(f"{told(values):>15}" for values in columns), flush=True)


if __name__ == "__main__":
    main()
