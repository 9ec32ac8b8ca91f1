"""How many facts does a rank store, and whose facts survive aggregation?

    python benchmarks/capacity.py central      # one client has all facts: exact match by rank and number of facts
    python benchmarks/capacity.py federated    # every client has its own: exact match by rank of owner and of reader
    python benchmarks/capacity.py report

A phone book has nothing to generalise, so exact match is the share of facts that a model recalls. ``central`` is the
federation of ``configs/capacity.yaml`` with a single client, which FedIT leaves as it is. In ``federated`` the owner is
the client that has a fact; the reader is the global adapter cut to a rank, without the branch that some methods add, as
a device of that rank can keep it. Draw 0 is for choosing learning rates, by exact match over all facts at the largest
rank; the other draws have other names, numbers, owners and initial factors and use the chosen rates.

Rows go to ``results/capacity.jsonl``, those of a run all at once; the same command goes on where it was stopped. One
process, one thread.
"""

import argparse
import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.report.capacity_tables import TUNING_DRAW, capacity_tables, chosen_rate

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "capacity.yaml"
ROWS = ROOT / "results" / "capacity.jsonl"
RANKS = (1, 4, 16, 64)
CENTRAL_FACTS = (32, 64, 128, 256, 512)
# Learning rates are chosen at this number of facts, for each rank.
PROBED_FACTS = 128
# Per cent.
ALL = 99.0
# All facts of the configuration.
FEDERATED_FACTS = 128
# Tried first; where the best one is at an edge, the next one beyond it is tried too, by factors of two.
RATES = (0.01, 0.02, 0.04)
MOST_RATES = 6
CENTRAL_PASSES = 100

FLEXLORA = {"name": "flexlora"}
METHODS: dict[str, dict[str, Any]] = {
    "fedit": {"name": "fedit"},
    "fedit smallest": {"name": "fedit"},
    "fedit largest": {"name": "fedit"},
    "flexlora": FLEXLORA,
    "flexlora largest": FLEXLORA,
    "flexlora+ec+fold": {**FLEXLORA, "error_compensation": True, "fold_tail": True},
    "aligned": {"name": "aligned"},
    "fed_plora": {"name": "fed_plora"},
    "aligned half": {"name": "aligned", "holder_exponent": 0.5},
}

# ``smallest`` and ``largest``: all clients at the rank that all can afford, or at the largest as if all could.
FEDERATED_METHODS = tuple(name for name in METHODS if name != "fedit")

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training: rows of a finished run hold these fields."""

    study: str
    method: str
    learning_rate: float
    draw: int
    num_facts: int
    rank: int | None = None

    def is_of(self, row: Row) -> bool:
        """Return whether a row was measured by this run."""
        return all(row[name] == value for name, value in vars(self).items())


def measure(run: Run, overrides: Sequence[str]) -> list[Row]:
    """Train and return one row per group of owners and rank of the reader."""
    import torch

    from flexlora.experiment.config_file import load_config
    from flexlora.experiment.loaded import LoadedRun
    from flexlora.experiment.method_config import read_method
    from flexlora.experiment.participants import gather_participants
    from flexlora.experiment.round_loop import round_loop
    from flexlora.rounds.loop import run_rounds

    torch.set_num_threads(1)
    config = load_config(CONFIG, [*_settings(run), *overrides])
    loaded = LoadedRun.load(config, gather_participants(config))
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        clients = _clients(run, loaded)
        loop = round_loop(
            loaded,
            read_method(METHODS[run.method]),
            clients,
            Path(folder),
            lambda event: None,
            run.learning_rate,
        )
        outcome = run_rounds(dataclasses.replace(loop, evaluator=_silent()))
    seconds = round(time.process_time() - start, 1)
    largest = max(loop.federation.server_ranks.values())
    return [
        {**vars(run), "owner": owner, "reader": reader, **scores, "cpu_seconds": seconds}
        for reader in RANKS
        if reader <= largest
        for owner, scores in _recalled(loaded, _cut(loop, outcome.state, reader)).items()
    ]


def _settings(run: Run) -> Iterator[str]:
    yield from (f"seed={run.draw}", f"data.corpus_seed={run.draw}")
    if run.study == "central":
        yield from (
            "data.num_clients=1",
            f"data.facts_per_client={run.num_facts}",
            f"clients.counts={{rank{run.rank}: 1}}",
        )
        # As many steps as rounds of local epochs would make, with the learning rate falling ten times.
        yield from ("rounds.num_rounds=10", "rounds.cohort_size=1", "training.batch_size=32")
        yield from (f"training.num_epochs={CENTRAL_PASSES // 10}", f"data.test_examples_per_task={run.num_facts}")


def _clients(run: Run, loaded: Any) -> list[Any]:
    """Return the clients at the ranks that they train with: their own, or one that all have."""
    from flexlora.experiment.control_clients import at_smallest_ranks
    from flexlora.federation.clients import RankPlan, largest_ranks

    clients = list(loaded.participants.clients)
    if run.method.endswith(" smallest"):
        return at_smallest_ranks(loaded)
    if run.method.endswith(" largest"):
        ranks = largest_ranks({client.plan for client in clients}, loaded.shapes)
        plan = RankPlan("largest", tuple((f"^{re.escape(module)}$", rank) for module, rank in ranks.items()))
        return [dataclasses.replace(client, plan=plan) for client in clients]
    return clients


def _cut(loop: Any, state: Any, rank: int) -> Any:
    """Return the global adapter at a rank, without a frozen branch."""
    import torch

    from flexlora.aggregators.settings import traits_of
    from flexlora.federation.messages import Broadcast

    aggregator, federation = loop.aggregator, loop.federation
    if not traits_of(aggregator).needs_one_rank:
        return Broadcast(aggregator.broadcast(state, dict.fromkeys(federation.server_ranks, rank)).trainable)
    spectra, scaling = aggregator.spectra(state), federation.scaling(rank)
    return Broadcast({module: own.factors(rank, scaling).to(torch.float32) for module, own in spectra.items()})


def _recalled(loaded: Any, adapter: Any) -> dict[str, dict[str, float]]:
    """Return exact match and loss by the client type of the owner, and over all facts."""
    from flexlora.experiment.scoring import combined_record, score, unseen_tasks

    unseen = loaded.participants.corpus.unseen
    scores = score(loaded, adapter, unseen_tasks(loaded))
    owners = {name: unseen[name].category for name in scores}
    records = {
        group: combined_record([own for name, own in scores.items() if owners[name] == group])
        for group in sorted(set(owners.values()), key=_rank_of)
    } | {"all": combined_record(scores.values())}
    return {
        group: {"exact_match": round(own.exact_match, 3), "loss": round(own.loss, 4)} for group, own in records.items()
    }


def _rank_of(group: str) -> int:
    return int(group.removeprefix("rank"))


def _silent() -> Any:
    """Return an evaluator that scores nothing: only the last model is looked at, and by its readers."""
    from flexlora.rounds.records import EvaluationRecord, ScoreRecord

    nothing = ScoreRecord(rouge_l=0.0, exact_match=0.0, loss=0.0, num_examples=0, num_tasks=0)

    class Silent:
        def scores(self, adapter: Any) -> EvaluationRecord:
            return EvaluationRecord(unseen=nothing, unseen_unweighted=nothing, categories={}, validation_loss=None)

        def rank_groups(self, broadcast: Callable[[Any], Any]) -> dict[str, Any]:
            return {}

    return Silent()


class Rows:
    """The rows measured so far, in a file that holds all rows of a run or none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = list(map(json.loads, path.read_text().splitlines())) if path.exists() else []

    def of(self, run: Run) -> list[Row]:
        """Return the rows of a run, none if it has not been measured."""
        return [row for row in self.rows if run.is_of(row)]

    def measured(self, run: Run, overrides: Sequence[str]) -> list[Row]:
        """Return the rows of a run, measured now if they are not there."""
        found = self.of(run)
        if not found:
            from flexlora.files import write_whole

            found = measure(run, overrides)
            self.rows += found
            self.path.parent.mkdir(exist_ok=True)
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            print(run, f"{recall(found):.1f} % of all facts", flush=True)
        return found


def recall(rows: Iterable[Row]) -> float:
    """Return the exact match over all facts at the largest rank of a run."""
    return max((row["reader"], row["exact_match"]) for row in rows if row["owner"] == "all")[1]


def tuned(rows: Rows, run: Run, overrides: Sequence[str]) -> Run:
    """Return the run with the learning rate that does best."""

    def tried(rate: float) -> list[Row]:
        """Return the rows of the run at a rate."""
        return rows.measured(dataclasses.replace(run, learning_rate=rate), overrides)

    results = {rate: tried(rate) for rate in RATES}
    while len(results) < MOST_RATES and (best := chosen_rate(results)) in (min(results), max(results)):
        beyond = best / 2 if best == min(results) else best * 2
        results[beyond] = tried(beyond)
    return dataclasses.replace(run, learning_rate=chosen_rate(results))


def central(rows: Rows, overrides: Sequence[str], ranks: Sequence[int], numbers: Sequence[int]) -> None:
    """Measure every rank at every number of facts, each rank at the learning rate it does best with at one number."""
    for rank in ranks:
        best = tuned(rows, Run("central", "fedit", 0.0, TUNING_DRAW, PROBED_FACTS, rank), overrides)
        stores_all = recall(rows.of(best)) >= ALL
        for num_facts in numbers:
            # What stores all of them stores fewer, too.
            if num_facts > PROBED_FACTS or not stores_all:
                rows.measured(dataclasses.replace(best, num_facts=num_facts), overrides)


def federated(rows: Rows, overrides: Sequence[str], methods: Sequence[str], draws: int) -> None:
    """Measure every method: learning rates on the tuning draw, then the chosen one on ``draws`` others."""
    for method in methods:
        best = tuned(rows, Run("federated", method, 0.0, TUNING_DRAW, FEDERATED_FACTS), overrides)
        for draw in range(TUNING_DRAW + 1, TUNING_DRAW + 1 + draws):
            rows.measured(dataclasses.replace(best, draw=draw), overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=("central", "federated", "report"))
    parser.add_argument("overrides", nargs="*", help="key=value, as for flexlora run; use another --rows with them")
    parser.add_argument("--methods", default=",".join(FEDERATED_METHODS))
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="of the central study")
    parser.add_argument("--facts", default=",".join(map(str, CENTRAL_FACTS)), help="of the central study")
    parser.add_argument("--draws", type=int, default=2, help="besides the one that learning rates are chosen on")
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    methods = options.methods.split(",")
    if unknown := sorted(set(methods) - set(FEDERATED_METHODS)):
        parser.error(f"--methods must be among {', '.join(FEDERATED_METHODS)}; got {', '.join(unknown)}")
    rows = Rows(options.rows)
    if options.study == "central":
        ranks, numbers = (list(map(int, text.split(","))) for text in (options.ranks, options.facts))
        central(rows, options.overrides, ranks, numbers)
    if options.study == "federated":
        federated(rows, options.overrides, methods, options.draws)
    print("\n".join(capacity_tables(rows.rows)))


if __name__ == "__main__":
    main()
