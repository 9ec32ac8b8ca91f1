"""How long does the server's step take for one module, against what one would do otherwise?

    python benchmarks/aggregation.py                                     # two shapes, 8 and 80 clients: some minutes
    python benchmarks/aggregation.py --shapes 4096x4096 --clients 8,80,1000 --repeats 3
    python benchmarks/aggregation.py --shapes all --clients all --spectra realistic,flat --device cuda

Clients have ranks 4, 8, 16, 32, 64, 200 in turn; the 200 leading directions are wanted back. ``realistic``: all clients
perturb one common update with singular values from 1 to 1e-3 (each factor row by 5 % in A, 10 % in B). ``flat``:
independent Gaussian factors, so that there is no gap anywhere. Every repetition runs all methods one after the other on
the same factors; ratios are taken within a repetition and reported as the median with the smallest and the largest.

    flexlora exact, fast  certified_decomposition
    fast random start     the same, without looking at the clients' rows to begin with
    fast last round       the same, from the right singular vectors of the aggregate that the clients started from
    fast model            the same as fast for a model of --modules such modules (made of the same factors) in one call,
                          side by side on one thread each where there is memory for it: seconds per module
    released              dense float32 sum and torch.linalg.svd of it, as in the code released with the paper
    peft                  PEFT's add_weighted_adapter(combination_type="svd")
    qr                    QR of both stacks and the SVD of the core, float32; left out above a total rank of 8192, where
                          it would take minutes and the memory of all factors twice
    randomized_svd        scikit-learn's, on the dense float32 sum (``pip install scikit-learn``)
    svd_lowrank           torch's, on the dense float32 sum
    floor                 reading every factor once, and two products of the stacks with 200 columns

``over optimal`` is the Frobenius error over that of the best approximation of rank 200 (float64), minus one. ``memory``
is the growth of the resident set at its peak, beyond the factors. The dense sum is taken once in a repetition, and its
time and memory count for each of the methods that need it. At the end every other way that is as accurate as a setting
of ours (within 1e-3 for fast, 1e-6 for exact) is compared with it, and rows where it was quicker are named.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexlora.lora.certificate import Accuracy, Certificate
from flexlora.lora.factors import LoraFactors
from flexlora.lora.product import ProductSum, add_product, certified_decomposition, certified_decompositions

RANKS = (4, 8, 16, 32, 64, 200)
WANTED = 200
ALL_SHAPES = ("2048x2048", "5504x2048", "4096x4096", "14336x4096", "1024x4096")
ALL_CLIENTS = (8, 80, 1000)
MOST_COLUMNS_OF_QR = 8192
OTHERS = {"released", "peft", "qr", "randomized_svd", "svd_lowrank"}


@dataclass(frozen=True)
class Row:
    """One module's updates."""

    shape: tuple[int, int]
    num_clients: int
    spectrum: str
    clients: list[LoraFactors]
    device: torch.device
    last_Vh: Tensor

    @property
    def weight(self) -> float:
        return 1.0 / self.num_clients


def make_row(shape: tuple[int, int], num_clients: int, spectrum: str, dtype: torch.dtype, device: str) -> Row:
    m, n = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    S = torch.logspace(0, -3, max(RANKS))
    U, V = torch.linalg.qr(normal(m, max(RANKS))).Q, torch.linalg.qr(normal(n, max(RANKS))).Q.T
    clients = []
    for index in range(num_clients):
        rank = RANKS[index % len(RANKS)]
        A, B = normal(rank, n) / n**0.5, normal(m, rank) / m**0.5
        if spectrum == "realistic":
            A, B = V[:rank] + 0.05 * A, (U[:, :rank] + 0.1 * B) * S[:rank]
        clients.append(LoraFactors(A.to(device, dtype).contiguous(), B.to(device, dtype).contiguous(), 1.0))
    return Row(shape, num_clients, spectrum, clients, torch.device(device), V.to(device))


Triple = tuple[Tensor, Tensor, Tensor]


def dense_sum(row: Row) -> Tensor:
    total = torch.zeros(row.shape, device=row.device)
    for client in row.clients:
        total += (client.B.float() @ client.A.float()) * row.weight
    return total


def stacks(row: Row) -> tuple[Tensor, Tensor]:
    left = torch.cat([client.B.float() * row.weight for client in row.clients], 1)
    return left, torch.cat([client.A.float() for client in row.clients])


def released(total: Tensor) -> Triple:
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    return U[:, :WANTED], S[:WANTED], Vh[:WANTED]


def stacked_qr(row: Row) -> Triple:
    left, right = stacks(row)
    Q1, R1 = torch.linalg.qr(left)
    Q2, R2 = torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(R1 @ R2.T, full_matrices=False)
    return Q1 @ U[:, :WANTED], S[:WANTED], Vh[:WANTED] @ Q2.T


def svd_lowrank(total: Tensor) -> Triple:
    U, S, V = torch.svd_lowrank(total, q=WANTED + 20, niter=2)
    return U[:, :WANTED], S[:WANTED], V.T[:WANTED]


def randomized_svd(total: Tensor) -> Triple:
    from sklearn.utils.extmath import randomized_svd as sklearn_svd

    U, S, Vh = sklearn_svd(total.numpy(), n_components=WANTED, random_state=0)
    return torch.from_numpy(U.copy()), torch.from_numpy(S.copy()), torch.from_numpy(Vh.copy())


def peft_svd(row: Row) -> Callable[[], Triple]:
    """Return the call to time; the adapters are in a model already."""
    from peft import LoraConfig, get_peft_model

    m, n = row.shape
    network = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False))
    model = None
    names = []
    for index, client in enumerate(row.clients):
        config = LoraConfig(r=client.rank, lora_alpha=client.rank, target_modules=["0"])
        name = f"client{index}"
        if model is None:
            model = get_peft_model(network, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        layer = model.base_model.model[0]
        layer.lora_A[name].weight.data = client.A.float()
        layer.lora_B[name].weight.data = client.B.float()
        names.append(name)
    assert model is not None

    def call() -> Triple:
        model.add_weighted_adapter(
            names, [row.weight] * len(names), "merged", combination_type="svd", svd_rank=WANTED, svd_full_matrices=False
        )
        layer = model.base_model.model[0]
        B, A = layer.lora_B["merged"].weight.data.clone(), layer.lora_A["merged"].weight.data.clone()
        scaling = layer.scaling["merged"]
        model.delete_adapter("merged")
        return B * scaling, torch.ones(WANTED), A

    return call


def ours(
    row: Row, accuracy: Accuracy, certificates: dict[str, Certificate], name: str, start: Tensor | None = None
) -> Triple:
    spectrum, certificates[name] = certified_decomposition(sum_of(row), WANTED, accuracy=accuracy, start=start)
    return spectrum.U, spectrum.S, spectrum.Vh


def our_model(row: Row, num_modules: int) -> Triple:
    totals = [sum_of(row) for _ in range(num_modules)]
    spectra = certified_decompositions(totals, [WANTED] * num_modules, accuracy="fast")
    spectrum, _ = spectra[-1]
    return spectrum.U, spectrum.S, spectrum.Vh


def sum_of(row: Row) -> ProductSum:
    total = ProductSum(*row.shape, keep_factors=True)
    for client in row.clients:
        total = add_product(total, client, row.weight)
    return total


def floor_seconds(row: Row) -> tuple[float, float]:
    """Return seconds to read every factor once, and seconds of two products with ``WANTED`` columns.

    Where both stacks do not fit into memory beside the factors, the products are timed with a part and scaled up.
    """
    start = clock(row.device)
    for client in row.clients:
        client.A.sum()
        client.B.sum()
    read = clock(row.device) - start
    part = [client for index, client in enumerate(row.clients) if index < 200]
    share = sum(client.rank for client in part) / sum(client.rank for client in row.clients)
    left, right = stacks(replace(row, clients=part))
    X = torch.randn(row.shape[1], WANTED, device=row.device)
    start = clock(row.device)
    Y = left @ (right @ X)
    right.T @ (left.T @ Y)
    return read, (clock(row.device) - start) / share


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_at_peak(device: torch.device, call: Callable[[], Triple]) -> tuple[Triple, float, float]:
    """Return result, seconds, and MB that the call needed at its peak beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = status_kb("VmRSS")
    start = clock(device)
    result = call()
    seconds = clock(device) - start
    if device.type == "cuda":
        return result, seconds, (torch.cuda.max_memory_allocated() - before) / 1e6
    return result, seconds, (status_kb("VmHWM") - before) * 1024 / 1e6


def status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


class Oracle:
    """The float64 sum, and how far a result is from the best approximation of it."""

    def __init__(self, row: Row) -> None:
        self.W = torch.zeros(row.shape, dtype=torch.float64, device=row.device)
        for client in row.clients:
            self.W.addmm_(client.B.double() * row.weight, client.A.double())
        W = self.W if self.W.shape[0] >= self.W.shape[1] else self.W.T
        values = torch.linalg.eigvalsh(W.T @ W).flip(0).clamp_min(0)
        self.best = float(values[WANTED:].sum()) ** 0.5
        self.norm = float(values.sum()) ** 0.5

    def over_optimal(self, triple: Triple) -> float:
        U, S, Vh = (tensor.to(self.W) for tensor in triple)
        error = float(torch.linalg.matrix_norm(torch.addmm(self.W, U * S, Vh, beta=1.0, alpha=-1.0)))
        return error / self.best - 1


def measure(row: Row, methods: list[str], repeats: int, num_modules: int) -> dict[str, object]:
    certificates: dict[str, Certificate] = {}
    calls: dict[str, Callable[[], Triple]] = {
        "flexlora exact": lambda: ours(row, "exact", certificates, "flexlora exact"),
        "flexlora fast": lambda: ours(row, "fast", certificates, "flexlora fast"),
        "fast random start": lambda: ours(row, "fast", certificates, "fast random start", row.last_Vh[:0]),
        "fast last round": lambda: ours(row, "fast", certificates, "fast last round", row.last_Vh),
        "fast model": lambda: our_model(row, num_modules),
        "qr": lambda: stacked_qr(row),
    }
    of_dense = {"released": released, "svd_lowrank": svd_lowrank, "randomized_svd": randomized_svd}
    if sum(client.rank for client in row.clients) > MOST_COLUMNS_OF_QR:
        methods = [name for name in methods if name != "qr"]
    if "peft" in methods:
        calls["peft"] = peft_svd(row)
    oracle = Oracle(row)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    seconds["floor read"], seconds["floor products"] = [], []
    memory: dict[str, float] = {}
    over: dict[str, float] = {}
    for _ in range(repeats):
        # First, so that no method pays for factors that the system has put out of memory meanwhile.
        read, products = floor_seconds(row)
        seconds["floor read"].append(read)
        seconds["floor products"].append(products)
        for name in methods:
            if name not in of_dense:
                triple, taken, memory[name] = memory_at_peak(row.device, calls[name])
                seconds[name].append(taken / num_modules if name == "fast model" else taken)
                over[name] = oracle.over_optimal(triple)
                del triple
        dense_methods = [name for name in methods if name in of_dense]
        if dense_methods:
            (total, *_), summing, size = memory_at_peak(row.device, lambda: (dense_sum(row),) * 3)
        for name in dense_methods:
            triple, taken, grown = memory_at_peak(row.device, partial(of_dense[name], total))
            seconds[name].append(summing + taken)
            memory[name] = size + grown
            over[name] = oracle.over_optimal(triple)
            del triple
    return {
        "part": "aggregation",
        "device": str(row.device),
        "dtype": str(row.clients[0].A.dtype),
        "shape": row.shape,
        "clients": row.num_clients,
        "spectrum": row.spectrum,
        "total_rank": sum(client.rank for client in row.clients),
        "best_over_norm": oracle.best / oracle.norm,
        "seconds": seconds,
        "memory_mb": memory,
        "over_optimal": over,
        "certificates": {name: vars(certificate) for name, certificate in certificates.items()},
    }


def report(result: dict) -> str:
    m, n = result["shape"]
    seconds = result["seconds"]
    lines = [
        f"{m}x{n}, {result['clients']} clients, total rank {result['total_rank']}, {result['spectrum']} spectrum; "
        f"best error {result['best_over_norm']:.1e} of the norm",
        f"  {'method':16s}{'seconds':>10s}{'over fast: median (range)':>32s}{'over optimal':>14s}{'memory MB':>11s}",
    ]
    reference = seconds.get("flexlora fast") or seconds["flexlora exact"]
    for name, own in seconds.items():
        ratios = [other / mine for other, mine in zip(own, reference, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        error = f"{result['over_optimal'][name]:.1e}" if name in result["over_optimal"] else ""
        memory = f"{result['memory_mb'][name]:.0f}" if name in result["memory_mb"] else ""
        lines.append(f"  {name:16s}{statistics.median(own):>10.3f}{spread:>32s}{error:>14s}{memory:>11s}")
    if "fast model" in seconds and "released" in seconds:
        ratios = [other / mine for other, mine in zip(seconds["released"], seconds["fast model"], strict=True)]
        lines.append(
            f"  released over fast model: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        )
    for name, certificate in result["certificates"].items():
        lines.append(
            f"  {name}: {certificate['method']}, excess <= {certificate['excess']:.1e}, {certificate['reason']}"
        )
    return "\n".join(lines)


def quicker_ways(result: dict) -> list[str]:
    """Return a line for every other way that was as accurate as a setting of ours and took less time."""
    lines = []
    for ours, tolerance in (("flexlora fast", 1e-3), ("flexlora exact", 1e-6)):
        for name in OTHERS & set(result["over_optimal"]):
            own, other = result["seconds"].get(ours), result["seconds"][name]
            if own is None or result["over_optimal"][name] > tolerance:
                continue
            ratio = statistics.median(theirs / mine for theirs, mine in zip(other, own, strict=True))
            if ratio < 1:
                m, n = result["shape"]
                where = f"{m}x{n}, {result['clients']} clients, {result['spectrum']}"
                lines.append(f"{where}: {name} in {ratio:.2f} of the time of {ours}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="2048x2048,1024x4096")
    parser.add_argument("--clients", default="8,80")
    parser.add_argument("--spectra", default="realistic")
    parser.add_argument("--methods", default="flexlora exact,flexlora fast,released,qr,svd_lowrank")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modules", type=int, default=4, help="of the model of fast model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="append one JSON line per row")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = ALL_SHAPES if options.shapes == "all" else options.shapes.split(",")
    clients = ALL_CLIENTS if options.clients == "all" else [int(number) for number in options.clients.split(",")]
    quicker: list[str] = []
    for shape in shapes:
        m, n = (int(side) for side in shape.split("x"))
        for num_clients in clients:
            for spectrum in options.spectra.split(","):
                row = make_row((m, n), num_clients, spectrum, getattr(torch, options.dtype), options.device)
                result = measure(row, options.methods.split(","), options.repeats, options.modules)
                print(report(result) + "\n", flush=True)
                quicker += quicker_ways(result)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(result) + "\n")
    print("Quicker at equal accuracy than flexlora: " + ("; ".join(quicker) if quicker else "nothing, on no row"))


if __name__ == "__main__":
    main()
