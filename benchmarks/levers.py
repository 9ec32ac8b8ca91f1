"""What would make training a group of clients faster? Each lever against what is shipped, in turns within one process.

    python benchmarks/levers.py --batch-sizes 1,4 --repeats 5

One process with one thread trains the clients of ``benchmarks/simulation.py``. Reported: median seconds, the median
ratio of a lever's seconds to the shipped way's with its smallest and largest (below 1 is faster), the seconds of its
first run on top of a later one, and by how much the clients' mean training loss differs from the shipped way's.

    shipped            the decoder written out, float32, MKL's products
    autograd           the same clients through the network's own forward pass and autograd, attention by sdpa
    autograd, eager    likewise, attention written as products
    onednn             the shipped way with float32 products by oneDNN
    bfloat16           autograd with the base in bfloat16, factors in float32
    compiled           the shipped way, its norms, rotations and gates compiled
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from simulation import Setting, make_network, make_setting

from flexlora.training import group_backward, group_block
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.group import TrainedClient, train_group

Trainer = Callable[[], float]


def train_with(setting: Setting, model: AdaptedModel) -> float:
    """Train everyone and return the mean training loss."""
    outcomes = list(train_group(model, setting.jobs, setting.training))
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return statistics.mean(outcome.metrics["loss"] for outcome in outcomes if isinstance(outcome, TrainedClient))


@contextmanager
def swapped(owner: object, **values: object) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def through_autograd(setting: Setting, attention: str, dtype: torch.dtype = torch.float32) -> Trainer:
    network = make_network(setting.base, attention).to(dtype)
    model = AdaptedModel(network, setting.model.tokenizer)

    def train() -> float:
        with swapped(group_backward, decoder_of=lambda _: None):
            return train_with(setting, model)

    return train


def by_onednn(setting: Setting) -> Trainer:
    def train() -> float:
        # The name of the setting is a permission; a processor without bfloat16 products computes in float32.
        with swapped(torch.backends.mkldnn.matmul, fp32_precision="bf16"):
            return train_with(setting, setting.model)

    return train


def compiled(setting: Setting) -> Trainer:
    norm = group_block.RmsNorm
    values = {name: torch.compile(getattr(norm, name), dynamic=True) for name in ("forward", "backward")}
    rotate = torch.compile(group_block._rotate, dynamic=True)

    def train() -> float:
        with swapped(norm, **values), swapped(group_block, _rotate=rotate):
            return train_with(setting, setting.model)

    return train


LEVERS: dict[str, Callable[[Setting], Trainer]] = {
    "shipped": lambda setting: lambda: train_with(setting, setting.model),
    "autograd": lambda setting: through_autograd(setting, "sdpa"),
    "autograd, eager": lambda setting: through_autograd(setting, "eager"),
    "onednn": by_onednn,
    "bfloat16": lambda setting: through_autograd(setting, "eager", torch.bfloat16),
    "compiled": compiled,
}


def measure(setting: Setting, names: list[str], repeats: int, clock: Callable[[], float]) -> None:
    trainers = {name: LEVERS[name](setting) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    for _ in range(repeats + 1):
        for name, train in list(trainers.items()):
            start = clock()
            try:
                losses[name] = train()
            except Exception as error:
                print(f"  {name:16s} failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
                del trainers[name], seconds[name]
                continue
            seconds[name].append(clock() - start)
    for name, (first, *later) in seconds.items():
        median = statistics.median(later)
        ratios = [own / shipped for own, shipped in zip(later, seconds["shipped"][1:], strict=True)]
        print(
            f"  {name:16s}{median:8.2f} s   {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
            f"   first run +{max(0.0, first - median):.1f} s   loss {losses[name] - losses['shipped']:+.1e}",
            flush=True,
        )


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="embedded", help="embedded, or HIDDENxLAYERS such as 64x2")
    parser.add_argument("--batch-sizes", default="1,4")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--levers", default=";".join(LEVERS), help="names, separated by semicolons")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds: fairer where others are busy")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ["shipped", *(name for name in arguments.levers.split(";") if name != "shipped")]
    for batch_size in map(int, arguments.batch_sizes.split(",")):
        options = argparse.Namespace(
            base=arguments.base,
            device="cpu",
            dtype="float32",
            attention="sdpa",
            clients=arguments.clients,
            steps=arguments.steps,
            distribution="uniform",
            central_batch=32,
            flower_python="",
        )
        setting = make_setting(options, batch_size)
        print(f"{arguments.base}; {arguments.clients} clients, {arguments.steps} steps of batch {batch_size}")
        measure(setting, names, arguments.repeats, time.process_time if arguments.cpu_time else time.perf_counter)


if __name__ == "__main__":
    main()
