"""What would make training a group of clients faster? Each lever against what is shipped, in turns within one process.

    python benchmarks/levers.py --batch-sizes 1,4 --repeats 5
    python benchmarks/levers.py --base FOLDER --device cuda --dtype bfloat16 --levers "own banks;written out"

One process with one thread trains the clients of ``benchmarks/simulation.py``. Reported: median seconds, the median
ratio of a lever's seconds to the shipped way's with its smallest and largest (below 1 is faster), the seconds of its
first run on top of a later one, and by how much the clients' mean training loss differs from the shipped way's.

    shipped            the decoder written out, float32, MKL's products
    autograd           the same clients through the network's own forward pass and autograd, attention by sdpa
    autograd, eager    likewise, attention written as products
    onednn             the shipped way with float32 products by oneDNN
    bfloat16           autograd with the base in bfloat16, factors in float32
    compiled           the shipped way, its norms, rotations and gates compiled
    own banks          no factors padded to the largest rank (they are on a GPU only)
    written out        the decoder written out on a GPU too
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from simulation import Setting, make_network, make_setting, now

from flexlora.training import group, group_backward, group_block, group_decoder
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.common_ranks import CommonRanks
from flexlora.training.group import TrainedClient, train_group

Trainer = Callable[[], float]


def train_with(setting: Setting, model: AdaptedModel) -> float:
    """Train everyone and return the mean training loss."""
    broadcasts = [job.broadcast for job in setting.jobs]
    outcomes = list(train_group(model, setting.jobs, setting.training, broadcasts=broadcasts))
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


def with_own_banks(setting: Setting) -> Trainer:
    def train() -> float:
        with swapped(group, common_ranks=lambda *_: CommonRanks(16)):
            return train_with(setting, setting.model)

    return train


def written_out(setting: Setting) -> Trainer:
    def train() -> float:
        with swapped(group_decoder, _DEVICES=frozenset({"cpu", "cuda"})):
            return train_with(setting, setting.model)

    return train


LEVERS: dict[str, Callable[[Setting], Trainer]] = {
    "shipped": lambda setting: lambda: train_with(setting, setting.model),
    "autograd": lambda setting: through_autograd(setting, "sdpa"),
    "autograd, eager": lambda setting: through_autograd(setting, "eager"),
    "onednn": by_onednn,
    "bfloat16": lambda setting: through_autograd(setting, "eager", torch.bfloat16),
    "compiled": compiled,
    "own banks": with_own_banks,
    "written out": written_out,
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
    if setting.device.type == "cuda":
        print(f"  most memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
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
    parser.add_argument("--base", default="embedded", help="embedded, smollm2, a folder, or HIDDENxLAYERS such as 64x2")
    parser.add_argument("--device", default="cpu", help="for example cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base")
    parser.add_argument("--distribution", default="uniform", help="of the four small device types")
    parser.add_argument("--ranks", default="1,4,16", help="SMALLEST,MIDDLE,LARGEST of the device types")
    parser.add_argument("--batch-sizes", default="1,4")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--levers", default=";".join(LEVERS), help="names, separated by semicolons")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds: fairer where others are busy")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if arguments.cpu_time else partial(now, torch.device(arguments.device))
    names = ["shipped", *(name for name in arguments.levers.split(";") if name != "shipped")]
    for batch_size in map(int, arguments.batch_sizes.split(",")):
        options = argparse.Namespace(
            base=arguments.base,
            device=arguments.device,
            dtype=arguments.dtype,
            attention="sdpa",
            clients=arguments.clients,
            steps=arguments.steps,
            distribution=arguments.distribution,
            ranks=arguments.ranks,
            central_batch=32,
            flower_python="",
        )
        setting = make_setting(options, batch_size)
        print(f"{arguments.base}; {arguments.clients} clients, {arguments.steps} steps of batch {batch_size}")
        measure(setting, names, arguments.repeats, clock)


if __name__ == "__main__":
    main()
