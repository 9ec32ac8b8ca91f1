"""How much does a rank leave out? The truncation error phi of a run, per rank and module and over rounds.

    python benchmarks/truncation.py runs/demo
    python benchmarks/truncation.py runs/demo --modules q_proj --ranks 1,4,16 --json

Reads the spectra in a run folder's records; nothing is computed again. For a rank ``r`` and the global change ``G`` of
a module with singular values ``sigma_j``,

    phi_r = ||G - T_r(G)||_F = sqrt(sum_{j > r} sigma_j^2),        relative: phi_r / ||G||_F

(Eckart and Young; arXiv:2402.11505 assumes ``||SVD(W_g, r) - W_g|| <= phi``). What the server's own rank cut off in
that round counts as left out at every rank. Several modules together: the root of the sum of the squares of each, for
``phi`` and the norm alike. With ``--modules q_proj`` and ``--modules k_proj``, the ratio after the last round is the
error ratio of the paper's figs. 6 and 8.

The last column bounds what ``phi`` does to the number of samples that the paper's theorem asks of each client. Its form
is INFERRED, its constants were never available to us (d: dimension, |C|: clients, L and L': Lipschitz constants):

    N = O( d / (|C| eps^2) * log(R L (L' + phi) / eps)  +  1 / (|C| eps^2) * log(1 / delta) )

``phi`` stands inside a logarithm, next to an unknown L' >= 0. From ``phi_s``, that of the smallest rank listed, to
``phi_r`` the logarithm therefore falls by ``log((L' + phi_s) / (L' + phi_r))``, which lies between 0 (large L') and
``log(phi_s / phi_r)`` (L' = 0). The column gives that upper end, in units of ``d / (|C| eps^2)``; it is no number of
samples.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora.report.run_folder import RunFolder, read_run
from flexlora.rounds.records import RoundRecord, SpectrumRecord


def left_out(spectrum: SpectrumRecord, rank: int) -> float:
    """Return the squared norm of what ``rank`` directions leave of the change, the server's cut included."""
    return sum(value**2 for value in spectrum.singular_values[rank:]) + spectrum.tail**2


def phi(spectra: Iterable[SpectrumRecord], rank: int) -> float:
    """Return the truncation error of several modules together at one rank."""
    return math.sqrt(sum(left_out(spectrum, rank) for spectrum in spectra))


def ratio(spectra: Sequence[SpectrumRecord], rank: int) -> float:
    """Return the relative truncation error, 0 to 1; 0 for the zero change."""
    norm = phi(spectra, 0)
    return phi(spectra, rank) / norm if norm else 0.0


def most_saved(spectra: Sequence[SpectrumRecord], smallest: int, rank: int) -> float:
    """Return ``log(phi_smallest / phi_rank)``; infinite if the larger rank leaves nothing out."""
    before, after = phi(spectra, smallest), phi(spectra, rank)
    if before == 0:
        return 0.0
    return math.log(before / after) if after else math.inf


def matching(record: RoundRecord, pattern: str) -> dict[str, SpectrumRecord]:
    """Return module -> spectrum of the modules that the pattern is found in."""
    return {module: spectrum for module, spectrum in record.spectra.items() if re.search(pattern, module)}


def by_kind(spectra: Mapping[str, SpectrumRecord]) -> dict[str, list[SpectrumRecord]]:
    """Return last part of the path -> spectra of all layers."""
    kinds: dict[str, list[SpectrumRecord]] = {}
    for module, spectrum in spectra.items():
        kinds.setdefault(module.rpartition(".")[2], []).append(spectrum)
    return dict(sorted(kinds.items()))


def ranks_of(run: RunFolder) -> list[int]:
    """Return the ranks that clients of the run have in any module, ascending."""
    return sorted({rank for ranks in run.plan_ranks.values() for rank in ranks.values()})


def measure(run: RunFolder, ranks: Sequence[int], pattern: str) -> dict[str, Any]:
    """Return phi and its ratio over rounds, and per module and kind of module after the last round."""
    recorded = [(record.server_round, found) for record in run.records if (found := matching(record, pattern))]
    if not recorded:
        raise SystemExit(f"{run.path} has no recorded spectrum of a module that --modules={pattern} is found in")
    server_round, last = recorded[-1]
    groups = {"all modules": list(last.values()), **by_kind(last), **{name: [one] for name, one in last.items()}}

    def row(spectra: Sequence[SpectrumRecord]) -> dict[str, Any]:
        return {
            "norm": phi(spectra, 0),
            "phi": {rank: phi(spectra, rank) for rank in ranks},
            "ratio": {rank: ratio(spectra, rank) for rank in ranks},
        }

    return {
        "run": str(run.path),
        "rounds": {number: row(list(found.values())) for number, found in recorded},
        "last_round": server_round,
        "modules": {name: row(spectra) for name, spectra in groups.items()},
        "inferred_most_saved": {rank: most_saved(groups["all modules"], ranks[0], rank) for rank in ranks},
    }


def tables(found: Mapping[str, Any], ranks: Sequence[int], shown: int) -> str:
    """Return the measurements for a person, at most ``shown`` rounds of them."""
    head = "".join(f"{f'rank {rank}':>12s}" for rank in ranks)

    def line(name: object, row: Mapping[str, Any], what: str) -> str:
        return f"{name!s:<44s}{row['norm']:>12.4g}" + "".join(f"{row[what][rank]:>12.4g}" for rank in ranks)

    rounds = list(found["rounds"].items())
    kept = sorted({round(place * (len(rounds) - 1) / max(1, shown - 1)) for place in range(shown)})
    text = [
        str(found["run"]),
        "",
        "phi / ||G|| over rounds, all modules together",
        f"{'round':<44s}{'||G||':>12s}{head}",
    ]
    text += [line(number, row, "ratio") for number, row in (rounds[place] for place in kept)]
    for what, title in (("phi", "phi"), ("ratio", "phi / ||G||")):
        text += ["", f"{title} after round {found['last_round']}", f"{'module':<44s}{'||G||':>12s}{head}"]
        text += [line(name, row, what) for name, row in found["modules"].items()]
    saved = found["inferred_most_saved"]
    text += [
        "",
        f"Most by which the logarithm in the paper's sample bound falls from rank {ranks[0]}, in d / (|C| eps^2)",
        "(form of the bound INFERRED, see --help; between 0 and this, depending on an unknown constant)",
        f"{'all modules':<44s}{'':>12s}" + "".join(f"{saved[rank]:>12.4g}" for rank in ranks),
    ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--ranks", default="", help="such as 1,4,16; those of the run's clients if not given")
    parser.add_argument("--modules", default="", help="regular expression over module paths; all if not given")
    parser.add_argument("--rounds", type=int, default=10, help="most rounds in the first table")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    run = read_run(options.run)
    ranks = sorted({int(rank) for rank in options.ranks.split(",")}) if options.ranks else ranks_of(run)
    if not ranks or ranks[0] < 1:
        raise SystemExit(f"--ranks must be whole numbers of at least 1; got {options.ranks or ranks}")
    found = measure(run, ranks, options.modules)
    print(json.dumps(found, indent=1) if options.json else tables(found, ranks, options.rounds))


if __name__ == "__main__":
    main()
